"""What the gate leaves to others, on every tested SGLang: without it the test fails, the fast path alone passes, retraction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served_versions import CONCURRENCY, PROMPTS, TOKENS, VERSIONS, identical, serving

from sglang_margingate.bench.evidence import log_probabilities
from sglang_margingate.bench.evidence.answers import seeded
from sglang_margingate.bench.servers.client import Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server

KIND = 9
"""Greedy requests that ask for log-probabilities, and as many scored ones: every way of asking is among them."""

versions = pytest.mark.parametrize("version", VERSIONS)


@versions
def test_without_a_gate_answers_depend_on_the_batch(version: str, prompts: list[Prompt], tmp_path: Path) -> None:
    with serving(version, "--margingate-policy", "log", log=tmp_path / "server.log") as server:
        alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
        server.client.flush_cache()
        together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
        same = identical(f"SGLang {version} log, together", alone, together)
        numbers = log_probabilities.compare(server.client, log_probabilities.requests_of(KIND), CONCURRENCY)
    if same == PROMPTS:  # this CPU's kernels may not flip by themselves: inject what others do
        flags = ["--margingate-policy", "log"]
        with serving(
            version, *flags, log=tmp_path / "flips" / "server.log", MARGINGATE_TEST_FLIP_RATE="0.01"
        ) as server:
            together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
        same = identical(f"SGLang {version} log with injected flips, together", alone, together)
    assert same < PROMPTS
    assert {c.margingate["guarantee"] for c in together} == {"none"}
    assert sum(c.margingate["verified"] for c in together) == 0
    print(f"SGLang {version} log, log-probabilities: {numbers.identical}")
    assert min(int(share.split("/")[0]) for share in numbers.identical.values()) < KIND
    assert numbers.labels == {"none batch": 4 * KIND}


@pytest.fixture(scope="module", params=VERSIONS)
def canonical(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Server]]:
    flags = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical"]
    with serving(request.param, *flags, log=tmp_path_factory.mktemp("canonical") / "server.log") as server:
        yield request.param, server


def test_the_canonical_fast_path_needs_no_verify(canonical: tuple[str, Server], prompts: list[Prompt]) -> None:
    version, server = canonical
    alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
    server.client.flush_cache()
    together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
    warm = run_together(server.client, prompts[::-1], CONCURRENCY, max_new_tokens=TOKENS)[::-1]
    assert max(c.margingate["max_batch_rows"] for c in together) >= 8, "no batch formed, so the test proves nothing"
    assert identical(f"SGLang {version} canonical, together", alone, together) == PROMPTS
    assert identical(f"SGLang {version} canonical, warm and in reverse", alone, warm) == PROMPTS
    assert {c.margingate["guarantee"] for c in (*alone, *together, *warm)} == {"structural"}
    assert sum(c.margingate["verified"] for c in together) == 0


def test_answers_with_seeds_depend_on_seed_and_prompt_alone(canonical: tuple[str, Server]) -> None:
    """The test of tests/server/test_seeded.py."""
    version, server = canonical
    found = seeded.compare(server.client, seeded.requests_of(14), max_new_tokens=20)
    print(f"SGLang {version} canonical, seeds: {found.same}/{found.asked} identical")
    assert found.same == found.asked == 36, found
    assert found.guarantees == {"structural": 28}
    assert found.max_batch_rows >= 8
    assert found.distinct == 14, "samples are no greedy answers"


def test_log_probabilities_are_exact(canonical: tuple[str, Server]) -> None:
    """The test of tests/server/test_log_probabilities.py; the log that must fail is asked above."""
    version, server = canonical
    found = log_probabilities.compare(server.client, log_probabilities.requests_of(KIND), CONCURRENCY)
    print(f"SGLang {version} canonical, log-probabilities: {found.identical}")
    assert found.max_batch_rows >= 4, "no batch formed"
    assert found.neighbours > 0, "nobody had a long prompt scored meanwhile"
    assert set(found.identical.values()) == {f"{KIND}/{KIND}"}
    assert found.labels == {"structural exact": 4 * KIND}


@versions
def test_a_retracted_request_goes_on_with_the_same_tokens(version: str, prompts: list[Prompt], tmp_path: Path) -> None:
    flags = ["--margingate-policy", "gate", "--margingate-fast-path", "stock", "--margingate-threshold", "0.5"]
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"}
    with serving(version, *flags, log=tmp_path / "server.log", **retract) as server:
        alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
        together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
    assert sum(c.margingate["retractions"] for c in together) > 0, "nothing was retracted, so the test proves nothing"
    assert identical(f"SGLang {version} gate with retractions, together", alone, together) == PROMPTS
    assert {c.margingate["guarantee"] for c in together} == {"gated"}
