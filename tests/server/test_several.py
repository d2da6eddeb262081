"""Servers over two ranks, and of two schedulers: the same answers whoever gives them, one run, one status; then one is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from one_request import run_as_one

from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone
from sglang_margingate.bench.servers.process import Server, serve
from sglang_margingate.trace import list_runs, read_run

pytestmark = pytest.mark.xdist_group("several")

TOKENS = 32
LONG = 96
IN_FLIGHT = 12


def start(folder: Path, *flags: str) -> Any:
    own = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical", "--margingate-map-dir", "off",
           "--margingate-trace-dir", str(folder / "traces"), "--enable-metrics", "--max-total-tokens", "20000",
           "--max-running-requests", "16"]  # fmt: skip
    return serve([*own, *flags], log=folder / "server.log", timeout=300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two schedulers."""
    with start(tmp_path_factory.mktemp("schedulers"), "--dp-size", "2") as running:
        yield running


@pytest.fixture(scope="module")
def alone(server: Server, prompts: list[Prompt]) -> list[Completion]:
    return run_alone(server.client, prompts[:IN_FLIGHT], max_new_tokens=LONG)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [list(c.tokens) for c in completions]


def settled(server: Server, requests: int) -> dict[str, Any]:
    """Return the status once so many requests have ended."""
    while (status := server.client.status())["totals"]["requests"] < requests:
        time.sleep(0.2)
    return status


def test_answers_over_two_ranks_do_not_depend_on_the_batch(prompts: list[Prompt], tmp_path: Path) -> None:
    few = prompts[:IN_FLIGHT]
    with start(tmp_path, "--tp-size", "2") as server:
        alone = run_alone(server.client, few, max_new_tokens=TOKENS)
        together = run_as_one(server.client, few, TOKENS)
        status = settled(server, 2 * len(few))
    assert status["batch_rows"]["max"] >= 8, "no batch formed, so the test proves nothing"
    assert tokens(together) == tokens(alone)
    assert {c.margingate["guarantee"] for c in together} == {"structural"}
    assert [rank["rank"] for rank in status["ranks"]] == [0, 1]
    assert len({rank["decides"] for rank in status["ranks"]}) == 1
    assert status["notes"] == [], "ranks that count otherwise would lower the labels"
    assert status["totals"]["requests"] >= 2 * len(few)
    (layer,) = [x for x in status["invariance"]["map"]["layers"] if x["name"] == "all-reduce"]
    assert {label for _, _, label in layer["classes"]} == {0}, "two numbers have one sum"
    (run,) = list_runs(tmp_path / "traces")
    assert run.request_rows == status["totals"]["requests"], "one rank writes"


def test_answers_do_not_depend_on_batch_or_scheduler(
    server: Server, prompts: list[Prompt], alone: list[Completion]
) -> None:
    together = run_as_one(server.client, prompts[:IN_FLIGHT], LONG)
    one_more = run_alone(server.client, prompts[:1], max_new_tokens=8)  # so that the next ones change places
    again = run_alone(server.client, prompts[:4], max_new_tokens=LONG)
    status = server.client.status()
    assert min(each["batch_rows"]["max"] for each in status["schedulers"]) >= 4, (
        "no batch formed, so the test proves nothing"
    )
    assert tokens(together) == tokens(alone)
    assert tokens(again) == tokens(alone[:4])
    everything = [*alone, *together, *one_more, *again]
    assert {c.margingate["guarantee"] for c in everything} == {"structural"}
    numbers = [c.margingate["request"] for c in everything]
    assert len(set(numbers)) == len(numbers)
    by = [{n % 2 for n in (a.margingate["request"], b.margingate["request"])} for a, b in zip(alone[:4], again)]
    assert {0, 1} in by, "no prompt met both schedulers"


def test_all_of_them_are_one_server(server: Server, alone: list[Completion]) -> None:
    requests = sum(each["totals"]["requests"] for each in server.client.status()["schedulers"])
    status = settled(server, requests)
    assert status["notes"] == []
    assert [each["scheduler"]["dp_rank"] for each in status["schedulers"]] == [0, 1]
    for each in status["schedulers"]:
        assert [rank["rank"] for rank in each["ranks"]] == [0]
        assert each["totals"]["steps"] > 0
    assert status["totals"]["steps"] == sum(each["totals"]["steps"] for each in status["schedulers"])
    lines = httpx.get(server.base_url + "/metrics").text.splitlines()
    steps = [line for line in lines if line.startswith("margingate_steps_total")]
    assert len(steps) == 2
    assert sum(float(line.split()[-1]) for line in steps) == status["totals"]["steps"], "each step is counted once"


def test_a_killed_scheduler_is_reported_and_the_trace_of_the_other_is_whole(server: Server) -> None:
    status = server.client.status()
    run, process = Path(status["trace"]["path"]), status["schedulers"][1]["scheduler"]["pid"]
    kept = status["schedulers"][0]["totals"]
    os.kill(process, signal.SIGKILL)
    server.process.wait()
    assert f"scheduler 1 (rank 0, process {process}) has ended" in server.log_path.read_text()
    (info,) = list_runs(run.parent)
    found = read_run(run)
    assert info.manifest["schedulers"][0]["closed_at"]
    assert not info.manifest["schedulers"][1]["closed_at"]
    mine = found.requests["request"] % 2 == 1
    assert mine.sum() == kept["requests"]
    assert (found.steps["request"] % 2 == 1).sum() == kept["steps"]
    assert found.requests["request"].is_unique
    assert all("scheduler-1" in warning for warning in found.warnings)
