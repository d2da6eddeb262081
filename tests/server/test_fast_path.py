"""The canonical fast path: the same tokens in any batch, without a verify; and what happens where it cannot hold."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from one_request import run_as_one

from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server, serve

FLAGS = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical", "--margingate-trace", "off"]
SPLIT_AT = 20
LONG = 1500


@pytest.fixture(scope="module")
def split_server(tmp_path_factory: pytest.TempPathFactory, canonical_server: Server) -> Iterator[Server]:
    """One layer sums in another order for 20 rows and fewer: two classes where the kept map says one."""
    folder = tmp_path_factory.mktemp("split")
    shutil.copytree(canonical_server.log_path.parent / "maps", folder / "maps")
    env = {"MARGINGATE_TEST_SPLIT": f"layers.0.mlp.gate_up_proj@{SPLIT_AT}"}
    with serve([*FLAGS, *maps_in(folder)], log=folder / "server.log", env=env) as server:
        yield server


@pytest.fixture(scope="module")
def split_alone(split_server: Server, prompts: list[Prompt], tokens: int) -> list[Completion]:
    return run_alone(split_server.client, prompts, max_new_tokens=tokens)


def maps_in(folder: Path) -> list[str]:
    return ["--margingate-map-dir", str(folder / "maps")]


def map_of(server: Server) -> dict[str, Any]:
    return server.client.status()["invariance"]["map"]


def the_map_file(server: Server) -> Path:
    (path,) = (server.log_path.parent / "maps").iterdir()
    return path


def line(server: Server, text: str) -> str:
    """Return the one line of the server's log that holds ``text``."""
    (found,) = [each for each in server.log_path.read_text().splitlines() if text in each]
    return found


def guarantees(runs: list[Any]) -> set[str]:
    return {c.margingate["guarantee"] for c in runs}


def structural(run: Any) -> bool:
    """Return whether every decode step of an answer was: a server with a fault put in labels none of them."""
    return run.margingate["structural"] == run.margingate["steps"] - 1


def test_the_ungated_server_differs_and_the_canonical_one_does_not(
    log_both: tuple[list[Completion], list[Completion]],
    canonical_server: Server,
    canonical_alone: list[Completion],
    prompts: list[Prompt],
    tokens: int,
) -> None:
    batch = run_together(canonical_server.client, prompts, 16, max_new_tokens=tokens)
    for (alone, together), identical in ((log_both, False), ((canonical_alone, batch), True)):
        assert max(c.margingate["max_batch_rows"] for c in together) >= 12, "no batch formed"
        assert all(a.same_as(b) for a, b in zip(alone, together)) is identical
    assert guarantees(together) == {"structural"}
    assert sum(c.margingate["triggers"] + c.margingate["verified"] for c in together) == 0


def test_the_map_says_where_the_machines_classes_lie(canonical_server: Server) -> None:
    found = canonical_server.client.status()["invariance"]
    assert found["decode_ok"]
    shapes = {tuple(layer["shape"]) for layer in found["map"]["layers"]}
    assert len(shapes) == 5, "qkv, o, gate_up, down and the head of the embedded model"
    assert all(layer["classes"][0][0] == 1 for layer in found["map"]["layers"])


def test_neighbours_that_ask_for_prompt_log_probabilities_leave_the_gated_ones_in_their_class(
    canonical_server: Server, prompts: list[Prompt]
) -> None:
    """1,500 rows of the layer that makes logits, where a prefill brings one a request: they run in blocks of probed sizes."""
    client, some = canonical_server.client, prompts[:8]
    alone = run_alone(client, some, max_new_tokens=64)
    scored: list[int] = []
    done = threading.Event()

    def score(worker: int) -> None:
        rng = random.Random(worker)
        while not done.is_set():
            body = {
                "input_ids": [rng.randrange(5, 200) for _ in range(LONG)], "return_logprob": True, "logprob_start_len": 0,
                "sampling_params": {"max_new_tokens": 2, "custom_params": {"margingate_policy": "off"}},
            }  # fmt: skip
            code, out = client.post(body)
            assert code == 200, out
            scored.append(len(out["meta_info"]["input_token_logprobs"]))

    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(score, worker) for worker in range(2)]
        try:
            together = run_together(client, some, 8, max_new_tokens=64)
        finally:
            done.set()
        for worker in workers:
            worker.result()
    assert len(scored) >= 2, "no neighbour was scored meanwhile"
    assert set(scored) == {LONG}
    assert all(a.same_as(b) for a, b in zip(alone, together))
    assert guarantees(together) == {"structural"}


def test_always_still_verifies_every_step(canonical_server: Server, prompts: list[Prompt]) -> None:
    done = canonical_server.client.generate(prompts[0], 24, custom={"margingate_policy": "always"})
    assert done.margingate["verified"] == done.margingate["steps"] - 1
    assert done.margingate["flips"] == 0


def test_a_request_that_samples_is_left_alone(canonical_server: Server, prompts: list[Prompt]) -> None:
    done = canonical_server.client.generate(prompts[0], 8, {"temperature": 1.0})
    assert done.margingate["guarantee"] == "none"


def test_a_split_layer_is_on_the_map_and_its_border_is_kept(
    split_server: Server, split_alone: list[Completion], prompts: list[Prompt], tokens: int
) -> None:
    found = split_server.client.status()["invariance"]
    layer = next(x for x in found["map"]["layers"] if x["name"] == "model.layers.0.mlp.gate_up_proj")
    classes = {m: label for first, last, label in layer["classes"] for m in (first, last)}
    assert classes[SPLIT_AT] != classes[SPLIT_AT + 1]
    together = run_together(split_server.client, prompts, 16, max_new_tokens=tokens)
    assert all(a.same_as(b) for a, b in zip(split_alone, together))
    assert all(map(structural, together))
    assert guarantees(together) == {"none"}, "the fault was put in on purpose"


def test_beyond_the_class_the_gate_takes_over(
    split_server: Server, split_alone: list[Completion], prompts: list[Prompt], tokens: int
) -> None:
    """Batches of more than 20 rows leave the class: their steps are gated by margin, and the response says so."""
    many = [Prompt(f"{p.id}-{k}", p.text, p.dataset) for p in prompts for k in range(2)]
    alone = {p.id: answer for p, answer in zip(prompts, split_alone)}
    together = run_as_one(split_server.client, many, tokens)
    assert max(c.margingate["max_batch_rows"] for c in together) > SPLIT_AT, "no batch left the class"
    assert not all(map(structural, together))
    assert sum(c.margingate["triggers"] for c in together) > 0
    assert all(c.same_as(alone[c.prompt_id.rsplit("-", 1)[0]]) for c in together)


def test_attention_that_depends_on_the_batch_is_found_and_gated(tmp_path: Path, prompts: list[Prompt]) -> None:
    flags = [*FLAGS, *maps_in(tmp_path)]
    with serve(flags, log=tmp_path / "server.log", env={"MARGINGATE_TEST_ATTENTION": "8"}) as server:
        found = server.client.status()["invariance"]
        assert not found["decode_ok"]
        assert any("decode differs from the verify at 1 requests" in note for note in found["notes"])
        alone = run_alone(server.client, prompts[:12], max_new_tokens=96)
        together = run_as_one(server.client, prompts[:12], 96)
        assert max(c.margingate["max_batch_rows"] for c in together) > 8, "no batch left the split"
        assert sum(c.margingate["structural"] for c in (*alone, *together)) == 0
        assert guarantees(together) == {"none"}, "the fault was put in on purpose"
        assert sum(c.margingate["triggers"] for c in together) > 0
        assert all(a.same_as(b) for a, b in zip(alone, together))


def test_the_map_is_kept_in_a_file_that_says_what_it_is_bound_to(canonical_server: Server) -> None:
    found, path = map_of(canonical_server), the_map_file(canonical_server)
    assert (found["file"], found["checked_seconds"]) == (str(path), None)
    assert f"kept in {path}" in line(canonical_server, "margingate: map of 5 kinds of layers, probed in ")
    kept = json.loads(path.read_text())
    assert kept["layers"] == found["layers"]
    assert kept["environment"] == found["environment"]
    assert kept["environment"].keys() >= {"device", "torch", "sglang", "threads", "OMP_NUM_THREADS"}


def test_the_next_start_reads_the_kept_map_and_checks_it(
    canonical_server: Server, tmp_path: Path, prompts: list[Prompt]
) -> None:
    shutil.copytree(canonical_server.log_path.parent / "maps", tmp_path / "maps")
    with serve([*FLAGS, *maps_in(tmp_path)], log=tmp_path / "server.log") as server:
        found, path = map_of(server), the_map_file(server)
        assert found["checked_seconds"] < 5
        assert found["layers"] == map_of(canonical_server)["layers"]
        assert re.search(
            rf"read from {re.escape(str(path))}, spot check \d+\.\d s", line(server, "margingate: map of 5 kinds")
        )
        assert path.read_bytes() == the_map_file(canonical_server).read_bytes()
        done = server.client.generate(prompts[0])
        assert done.same_as(canonical_server.client.generate(prompts[0]))
        assert done.margingate["guarantee"] == "structural"


def test_a_kept_map_that_no_longer_holds_is_probed_anew_and_a_broken_model_never_kept(
    canonical_server: Server, split_server: Server
) -> None:
    said = line(split_server, "failed its spot check")
    assert "model.layers.0.mlp.gate_up_proj at M = " in said
    assert said.count(" at M = ") == 1, "the other layers are healthy"
    assert "not kept" in line(split_server, "margingate: map of 5 kinds of layers, probed in ")
    found = map_of(split_server)
    assert (found["file"], found["checked_seconds"]) == (None, None)
    assert the_map_file(split_server).read_bytes() == the_map_file(canonical_server).read_bytes()


def test_a_map_folder_that_cannot_be_used_is_a_warning_and_the_server_serves(
    tmp_path: Path, prompts: list[Prompt]
) -> None:
    (tmp_path / "maps").write_text("a file in the folder's place")
    with serve([*FLAGS, *maps_in(tmp_path)], log=tmp_path / "server.log") as server:
        assert "cannot be kept" in line(server, "margingate: --margingate-map-dir: ")
        assert map_of(server)["file"] is None
        assert server.client.generate(prompts[0], 8).margingate["guarantee"] == "structural"
