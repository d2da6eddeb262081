"""The main job: the same tokens alone and in a batch, and proof that the test can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from one_request import run_as_one

from sglang_margingate.bench.servers.client import Client, Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server, serve

CONCURRENCY = 16
POISON = 7


def differences(alone: list[Completion], other: list[Completion]) -> list[str]:
    return [f"{a.prompt_id} at token {a.first_difference(b)}" for a, b in zip(alone, other) if not a.same_as(b)]


def largest_batch(client: Client) -> int:
    return client.status()["batch_rows"]["max"]


@pytest.mark.parametrize("arrival", ["together", "staggered", "mixed"])
def test_gated_sequences_do_not_depend_on_the_batch(
    gate_server: Server, prompts: list[Prompt], gate_alone: list[Completion], arrival: str, tokens: int
) -> None:
    together = run_together(
        gate_server.client, prompts, CONCURRENCY, stagger_seconds=0.3 if arrival == "staggered" else 0.0,
        background=prompts[:3] if arrival == "mixed" else (), max_new_tokens=tokens,
    )  # fmt: skip
    assert largest_batch(gate_server.client) >= 8, "no batch formed, so the test proves nothing"
    assert differences(gate_alone, together) == []
    assert all(c.margingate["guarantee"] == "gated" for c in together)
    assert sum(c.margingate["triggers"] for c in together) > 0


def test_always_is_bitwise_alone_and_together(gate_server: Server, prompts: list[Prompt]) -> None:
    few, custom = prompts[:9], {"margingate_policy": "always"}
    alone = run_alone(gate_server.client, few, max_new_tokens=64, custom=custom)
    together = run_as_one(gate_server.client, few, 64, custom=custom)
    assert max(c.margingate["max_batch_rows"] for c in together) >= 8, "no batch formed"
    assert differences(alone, together) == []
    assert [a.margingate["kv_digest"] for a in alone] == [b.margingate["kv_digest"] for b in together]
    assert {c.margingate["guarantee"] for c in together} == {"verified"}


def test_the_ungated_server_fails_the_same_test(
    log_server: Server,
    log_both: tuple[list[Completion], list[Completion]],
    prompts: list[Prompt],
    tokens: int,
    tmp_path: Path,
) -> None:
    alone, together = log_both
    assert largest_batch(log_server.client) >= 8
    found = differences(alone, together)
    if not found:  # this CPU's kernels may not flip by themselves: inject what others do
        flags = ["--margingate-policy", "log", "--margingate-trace", "off"]
        with serve(flags, log=tmp_path / "server.log", env={"MARGINGATE_TEST_FLIP_RATE": "0.01"}) as server:
            alone = run_alone(server.client, prompts, max_new_tokens=tokens)
            found = differences(alone, run_together(server.client, prompts, CONCURRENCY, max_new_tokens=tokens))
    assert found
    assert {c.margingate["guarantee"] for c in together} == {"none"}


@pytest.fixture(scope="module")
def poisoned_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Every 7th step the fast path picks the runner-up and spoils its K/V column; the verify must restore both."""
    flags = ["--margingate-policy", "gate", "--margingate-threshold", "0.0625", "--margingate-trace", "off"]
    env = {"MARGINGATE_TEST_POISON": str(POISON), "MARGINGATE_KV_DIGEST": "1"}
    with serve(flags, log=tmp_path_factory.mktemp("poisoned") / "server.log", env=env) as server:
        yield server


def poisoned_steps(clean: list[Completion]) -> int:
    return sum((len(c.tokens) - 1) // POISON for c in clean)


def test_poisoned_fast_path_is_repaired(gate_server: Server, poisoned_server: Server, prompts: list[Prompt]) -> None:
    few, always = prompts[:6], {"margingate_policy": "always"}
    clean = run_alone(gate_server.client, few, max_new_tokens=60, custom=always)
    repaired = run_as_one(poisoned_server.client, few, 60, custom=always)
    ungated = run_alone(poisoned_server.client, few[:2], max_new_tokens=60, custom={"margingate_policy": "log"})
    assert differences(clean, repaired) == []
    assert [c.margingate["kv_digest"] for c in clean] == [c.margingate["kv_digest"] for c in repaired]
    # At a natural near tie the runner-up that the poison lifted may be the verify's own choice: no flip there.
    poisoned = poisoned_steps(clean)
    assert poisoned * 0.8 <= sum(c.margingate["flips"] for c in repaired) <= poisoned * 1.2
    assert differences(clean[:2], ungated), "the poison does nothing, so the repair proves nothing"
    assert {c.margingate["guarantee"] for c in repaired} == {"none"}, "a server with a fault put in claims nothing"


def test_poisoned_gate_repairs_what_its_margin_shows(
    gate_server: Server, poisoned_server: Server, prompts: list[Prompt]
) -> None:
    """The poison leaves a near tie, so the gate must catch every poisoned step by its margin alone."""
    few = prompts[:6]
    clean = run_alone(gate_server.client, few, max_new_tokens=60)
    repaired = run_as_one(poisoned_server.client, few, 60)
    assert differences(clean, repaired) == []
    assert sum(c.margingate["flips"] for c in repaired) >= poisoned_steps(clean) * 0.8
