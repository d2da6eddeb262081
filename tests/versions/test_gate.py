"""The gate on every tested SGLang: alone against batch, warm cache, what requests ask for, and what the run says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from served_versions import CONCURRENCY, PROMPTS, TOKENS, VERSIONS, identical, serving

from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server


class Served(NamedTuple):
    version: str
    server: Server
    alone: list[Completion]


@pytest.fixture(scope="module", params=VERSIONS)
def gate(request: Any, prompts: list[Prompt], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("gate") / "server.log"
    flags = ["--margingate-policy", "gate", "--margingate-fast-path", "stock", "--margingate-threshold", "0.5"]
    with serving(request.param, *flags, log=log) as server:
        yield Served(request.param, server, run_alone(server.client, prompts, max_new_tokens=TOKENS))


def test_it_is_the_version_that_it_should_be(gate: Served) -> None:
    assert gate.server.client.status()["versions"]["sglang"] == gate.version


def test_gated_sequences_do_not_depend_on_the_batch(gate: Served, prompts: list[Prompt]) -> None:
    client = gate.server.client
    client.flush_cache()
    together = run_together(client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
    assert client.status()["batch_rows"]["max"] >= 8, "no batch formed, so the test proves nothing"
    assert identical(f"SGLang {gate.version} gate, together", gate.alone, together) == PROMPTS
    backwards = run_together(client, prompts[::-1], CONCURRENCY, max_new_tokens=TOKENS)[::-1]
    assert identical(f"SGLang {gate.version} gate, warm and in reverse", gate.alone, backwards) == PROMPTS
    assert sum(c.margingate["cached_tokens"] for c in backwards) > 0
    assert {c.margingate["guarantee"] for c in (*together, *backwards)} == {"gated"}
    assert sum(c.margingate["triggers"] for c in together) > 0


def test_requests_of_many_lengths_in_one_batch(gate: Served, prompts: list[Prompt]) -> None:
    texts = [(p.text * 4)[: 60 + 90 * (i % 9)] for i, p in enumerate(prompts)]
    uneven = [Prompt(p.id, t, p.dataset, max_tokens=1 + 13 * i % 60) for i, (p, t) in enumerate(zip(prompts, texts))]
    alone = run_alone(gate.server.client, uneven)
    together = run_together(gate.server.client, uneven, CONCURRENCY, background=prompts[:2])
    assert identical(f"SGLang {gate.version} gate, uneven", alone, together) == PROMPTS


def test_a_grammar_is_kept_in_a_batch(gate: Served, prompts: list[Prompt]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 48, "sampling": {"regex": r"[a-z ]{30,60}"}}
    alone = run_alone(gate.server.client, prompts[:8], **options)
    together = run_together(gate.server.client, prompts[:8], 8, **options)
    assert identical(f"SGLang {gate.version} gate, regex", alone, together) == 8
    assert all(set(c.text) <= set("abcdefghijklmnopqrstuvwxyz ") for c in together)


def test_every_answer_of_a_large_batch_has_its_summary(gate: Served) -> None:
    """A batch makes all its waiters before it awaits one: the first are answered by then."""
    texts = [f"{number} plus one is" for number in range(150)]
    code, out = gate.server.client.post({"text": texts, "sampling_params": {"temperature": 0, "max_new_tokens": 1}})
    assert code == 200
    assert len(out) == 150
    assert all(isinstance(answer["meta_info"]["margingate"], dict) for answer in out)


def test_wrong_parameters_are_refused(gate: Served) -> None:
    params = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"margingate_policy": "maybe"}}
    code, _ = gate.server.client.post({"text": "x", "sampling_params": params})
    assert code == 400


def test_the_run_names_the_settings_that_sglang_decided_on(gate: Served) -> None:
    (path,) = (gate.server.log_path.parent / "traces").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["attention_backend"] == "torch_native"
    assert gate.server.client.status()["attention_backend"] == "torch_native"
    flags = manifest["flags"]["sglang"]
    assert len(flags) > 250
    assert flags["page_size"] == 1
