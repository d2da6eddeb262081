"""A mixture of experts on the CPU: the same tokens in any batch, every step in class; and the ungated server that differs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_moe
from one_request import run_as_one

from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone
from sglang_margingate.bench.servers.process import Server, serve

pytestmark = pytest.mark.xdist_group("experts")

CANONICAL = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical", "--margingate-trace", "off"]
NEW = 96
PROMPTS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tiny_moe.write(tmp_path_factory.mktemp("experts") / "model")
    assert sum(path.stat().st_size for path in found.iterdir()) < 4e6
    return found


@pytest.fixture(scope="module")
def expert_server(folder: Path) -> Iterator[Server]:
    flags = [*CANONICAL, "--model-path", str(folder), "--margingate-map-dir", str(folder.parent / "maps")]
    with serve(flags, log=folder.parent / "canonical.log") as server:
        yield server


def both(server: Server, prompts: list[Prompt]) -> tuple[list[Completion], list[Completion]]:
    some = prompts[:PROMPTS]
    alone = run_alone(server.client, some, max_new_tokens=NEW)
    together = run_as_one(server.client, some, NEW)
    assert max(c.margingate["max_batch_rows"] for c in together) >= 8, "no batch formed"
    return alone, together


def test_sequences_of_a_mixture_do_not_depend_on_the_batch(expert_server: Server, prompts: list[Prompt]) -> None:
    alone, together = both(expert_server, prompts)
    assert [a.first_difference(b) for a, b in zip(alone, together)] == [None] * PROMPTS
    assert {c.margingate["guarantee"] for c in (*alone, *together)} == {"structural"}
    assert sum(c.margingate["triggers"] + c.margingate["verified"] for c in together) == 0
    assert len({token for c in alone for token in c.tokens}) > 100, "the model says the same all the time"


def test_the_map_has_the_bank_and_its_router(expert_server: Server) -> None:
    found = {layer["name"]: layer for layer in expert_server.client.status()["invariance"]["map"]["layers"]}
    bank = found["model.layers.0.mlp.experts"]
    assert bank["shape"] == [2 * tiny_moe.INNER, tiny_moe.HIDDEN]
    assert bank["kind"].endswith("2 of 4 experts")
    assert all(label is not None for _, _, label in bank["classes"]), "a row's bits depend on who goes to its experts"
    assert found["model.layers.0.mlp.gate"]["shape"] == [tiny_moe.EXPERTS, tiny_moe.HIDDEN]


def test_the_ungated_server_fails_the_same_test(folder: Path, prompts: list[Prompt]) -> None:
    flags = ["--model-path", str(folder), "--margingate-policy", "log", "--margingate-trace", "off"]
    with serve(flags, log=folder.parent / "log.log") as server:
        alone, together = both(server, prompts)
    assert any(not a.same_as(b) for a, b in zip(alone, together))


def test_experts_broken_on_purpose_are_found_and_left_to_the_gate(folder: Path, expert_server: Server) -> None:
    flags = [*CANONICAL, "--model-path", str(folder), "--margingate-map-dir", str(folder.parent / "maps")]
    with serve(flags, log=folder.parent / "broken.log", env={"MARGINGATE_TEST_EXPERTS": "4"}) as server:
        found = server.client.status()["invariance"]
    assert expert_server.client.status()["invariance"]["decode_ok"]
    assert not found["decode_ok"]
    assert any(note.startswith("decode differs from the verify at ") for note in found["notes"])
