"""Workloads without servers: arrivals, requests, metrics of hand-made traces, what the GPU and SGLang show."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.prompts.datasets import DatasetError
from sglang_margingate.bench.prompts.random_ids import parse as lengths
from sglang_margingate.bench.servers.client import Completion, Prompt
from sglang_margingate.bench.servers.timing import Job, Timed
from sglang_margingate.bench.workload.alone import Identity
from sglang_margingate.bench.workload.drive import Run, measure
from sglang_margingate.bench.workload.loads import Limits, Load, parse
from sglang_margingate.bench.workload.requests import chains, follow, replayed, sharegpt, spread
from sglang_margingate.bench.workload.rounds import Cell, Results
from sglang_margingate.bench.workload.watch import Moments, Pool, check_pool, server_facts
from sglang_margingate.gate.stats import Rate

TALK = {"from": "human", "value": "How long is a rope?"}, {"from": "gpt", "value": "Twice half its length, always."}


def test_loads_and_their_defaults() -> None:
    found = parse("closed:48,poisson:12.5,burst:32:4,sessions:8:3:512,closed,poisson", concurrency=6, rate=2.0)
    assert [load.name for load in found] == [
        "closed:48", "poisson:12.5", "burst:32:4", "sessions:8:3:512", "closed:6", "poisson:2"
    ]  # fmt: skip
    assert [load.in_flight for load in found] == [48, None, 32, 8, 6, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no load; use closed, poisson"),
        ("zigzag:4", "'zigzag' is no kind of load; use closed, poisson, burst, sessions, replay"),
        ("poisson:0", "poisson:0: RATE '0' is not a number above 0; write poisson:RATE"),
        ("poisson", "RATE is missing"),
        ("closed:0", "N '0' is not a whole number of at least 1"),
        ("burst:4:0", "SECONDS '0' is not a number above 0"),
        ("sessions:4:2:-1", "PREFIX '-1' is not a whole number of at least 0"),
        ("closed:4:5", "too many numbers; write closed:N"),
        ("closed:4,closed:4", "stands there twice"),
        ("replay", "FILE is missing"),
    ],
)
def test_wrong_loads_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_arrivals() -> None:
    assert Load("closed", 8).times(3, seed=0) == [0.0, 0.0, 0.0]
    assert Load("burst", 3, gap=2.0).times(7, seed=0) == [0, 0, 0, 2, 2, 2, 4]
    poisson = Load("poisson", rate=20.0)
    times = poisson.times(4000, seed=3)
    assert times == poisson.times(4000, seed=3), "the same for every server"
    assert times != poisson.times(4000, seed=4)
    assert times[0] == 0.0
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) > 0
    # Of an exponential distribution mean and deviation are both 1/rate; 4,000 of it are within 5% of them.
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.06)


def test_random_lengths_fill_their_range() -> None:
    prompts = lengths("random:64-1024:32-256").prompts(2000, seed=0)
    sizes, new = [len(p.ids) for p in prompts], [p.max_tokens or 0 for p in prompts]
    assert (min(sizes), max(sizes), min(new), max(new)) == (64, 1024, 32, 256)
    assert statistics.mean(sizes) == pytest.approx(544, rel=0.05)
    assert statistics.mean(new) == pytest.approx(144, rel=0.05)


def test_datasets_take_turns() -> None:
    prompts = [Prompt(f"{d}{i}", "x", d) for d, n in (("a", 3), ("b", 1), ("c", 2)) for i in range(n)]
    assert [p.id for p in spread(prompts)] == ["a0", "b0", "c0", "a1", "c1", "a2"]


def ids(name: str, *values: int) -> Prompt:
    return Prompt(name, "", "random", ids=values, max_tokens=2)


def test_conversations_share_prefixes_and_stand_on_answers() -> None:
    prompts = [ids(f"p{i}", i, i) for i in range(10)]
    made = chains(Load("sessions", 2, turns=2, prefix=3), prompts, 10, [ids("x", 7, 7, 7), ids("y", 8, 8, 8)])
    assert [len(c.turns) for c in made] == [2] * 5
    assert [c.turns[0].ids for c in made] == [
        (7, 7, 7, 0, 0), (7, 7, 7, 2, 2), (7, 7, 7, 4, 4), (7, 7, 7, 6, 6), (8, 8, 8, 8, 8)
    ]  # fmt: skip
    assert made[0].most_tokens() == 5 + 2 + 2 + 2
    second = follow(made[0].turns[0], Completion("p0", (21, 22), "length"), made[0].turns[1])
    assert (second.id, second.ids) == ("p1", (7, 7, 7, 0, 0, 21, 22, 1, 1))
    said = follow(
        Prompt("a", "<u>hi<a>", "d"), Completion("a", (1,), "stop", text="yes"), Prompt("b", "<u>why<a>", "d"), "<e>"
    )
    assert said.text == "<u>hi<a>yes<e><u>why<a>"


def test_sharegpt_has_the_lengths_of_its_replies(tmp_path: Path) -> None:
    file = tmp_path / "talks.json"
    file.write_text(json.dumps([{"conversations": [*TALK, *TALK]}, {"conversations": [TALK[1], *TALK]}]))
    found = sharegpt(file, 10)
    assert [(p.text, p.max_tokens) for p in found] == [(TALK[0]["value"], 8)] * 3
    assert len(sharegpt(file, 2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversation": []}', "line 2: field 'conversations' is missing or no list"),
        ('{"conversations": [{"from": "human"}]}', "line 2: field 'conversations[0].value' is missing or no text"),
        ('{"conversations": [', "line 2 is not valid JSON"),
    ],
)
def test_broken_sharegpt_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "talks.jsonl"
    file.write_text(json.dumps({"conversations": TALK}) + "\n" + line + "\n")
    with pytest.raises(DatasetError, match=r"talks\.jsonl") as error:
        sharegpt(file, 10)
    assert message in str(error.value)


def test_replayed_requests_are_sent_by_their_time(tmp_path: Path) -> None:
    file = tmp_path / "day.jsonl"
    rows = [{"at": 2.5, "input": 30, "output": 5}, {"at": 0, "prompt": "Hi", "output": 4}]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = replayed(file)
    assert (first.at, first.turns[0].text, first.turns[0].max_tokens) == (0.0, "Hi", 4)
    assert (second.at, len(second.turns[0].ids), second.turns[0].max_tokens) == (2.5, 30, 5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": 30, "output": 5}, "line 2: field 'at' is missing; give a number from 0 up"),
        ({"at": -1, "input": 30, "output": 5}, "line 2: field 'at' is -1"),
        ({"at": 0, "input": 30.5, "output": 5}, "line 2: field 'input' is 30.5; give a whole number from 1 up"),
        ({"at": 0, "input": 30}, "line 2: field 'output' is missing"),
        ({"at": 0, "prompt": " ", "output": 5}, "line 2: field 'prompt' is ' '; give text, or input in tokens"),
        ([1], "line 2 is not an object with the fields at, input or prompt, output"),
    ],
)
def test_broken_lines_of_a_workload_file_are_named(tmp_path: Path, row: object, message: str) -> None:
    file = tmp_path / "day.jsonl"
    file.write_text(json.dumps({"at": 0, "input": 30, "output": 5}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DatasetError) as error:
        replayed(file)
    assert message in str(error.value)


def timed(name: str, tokens: int, ttft: float, tpot: float, **meta: object) -> Timed:
    completion = Completion(name, tuple(range(tokens)), "length", seconds=ttft + tpot * (tokens - 1), meta=dict(meta))
    return Timed(
        Job(ids(name, 1, 2, 3), True, f"{name}/closed:2/0"), completion, ttft, tpot if tokens > 1 else math.nan
    )


def test_metrics_of_a_hand_made_trace() -> None:
    outcomes = [
        timed("a", 11, 0.1, 0.010, prompt_tokens=100, cached_tokens=60),
        timed("b", 21, 0.2, 0.020, prompt_tokens=50),
        timed("c", 31, 0.6, 0.010),
        timed("d", 1, 0.3, 0.0),
    ]
    found = measure(Run(tuple(outcomes), 2.0, late=0.01), Limits(500, 15))
    assert found["tokens_per_s"] == 32.0
    assert found["requests_per_s"] == 2.0
    assert found["ttft_p50_ms"] == pytest.approx(250)
    assert found["ttft_p99_ms"] == pytest.approx(591)
    assert found["tpot_p50_ms"] == pytest.approx(10)
    assert found["tpot_p99_ms"] == pytest.approx(19.8)
    assert found["prompt_tokens"] == 100 + 50 + 3 + 3
    assert found["cached_tokens"] == 60
    assert found["goodput"] == 0.5, "a is quick enough; b is slow by token, c to the first one; d has one token only"
    assert found["client_late_ms"] == pytest.approx(10)
    assert "goodput" not in measure(Run(tuple(outcomes), 2.0))


def test_what_cannot_be_read_is_absent() -> None:
    assert server_facts(None, None, [], 10.0) == {}
    assert server_facts(Moments(5, 5), Moments(5, 5), [], 10.0) == {}
    steps = server_facts(Moments(100, 800), Moments(1100, 32_800), [], 10.0)
    assert steps == {"decode_steps": 1000, "decode_rows": 32, "decode_step_ms": 10.0}
    both = server_facts(Moments(0, 0), Moments(1000, 32_000), [0.7, 0.9], 10.0)
    assert both["gpu_busy"] == pytest.approx(0.8)
    assert both["host_ms_per_step"] == pytest.approx(2.0), "a fifth of 10 s, over 1,000 steps"


def test_a_load_beyond_the_pool_is_refused_with_what_fits() -> None:
    load = Load("closed", 3)
    made = chains(load, [Prompt(str(i), "", "random", ids=(0,) * 90, max_tokens=10) for i in range(5)], 5)
    check_pool("stock", Pool(300, 3), load, made, 64)
    check_pool("stock", Pool(None, None), load, made, 64)
    with pytest.raises(
        UsageError, match="3 in flight may hold 300 tokens, but the pool of the server stock holds 250; ask for 2 "
    ):
        check_pool("stock", Pool(250, 64), load, made, 64)
    with pytest.raises(UsageError, match="server ours runs at most 2 requests at once; ask for 2, or give"):
        check_pool("ours", Pool(300, 2), load, made, 64)
    check_pool("stock", Pool(250, 2), Load("poisson", rate=5.0), made, 64)


def test_identity_counts_what_was_claimed() -> None:
    found = Identity()
    good, other = timed("a", 4, 0.1, 0.1), timed("a", 5, 0.1, 0.1)
    found.add(good, good.completion, claimed=True)
    found.add(good, other.completion, claimed=False)
    assert (found.same, found.promised, found.broken) == (Rate(1, 2), Rate(1, 1), 0)
    assert found.first == "a/closed:2/0: token 4"
    found.add(good, other.completion, claimed=True)
    assert found.broken == 1
    assert found.first.endswith("though it claimed to be identical")


def test_ratios_are_of_the_same_round() -> None:
    load = Load("closed", 2)
    cells = [Cell("stock", load, [{"x": 2.0}, {"x": 4.0}]), Cell("ours", load, [{"x": 1.0}, {"x": 4.0, "y": 1.0}])]
    results = Results(cells=cells, labels=["stock", "ours"])
    assert results.ratios(cells[1], "x") == [0.5, 1.0]
    assert results.ratios(cells[1], "y") == []
    assert cells[1].median("y") == 1.0
