"""Side-by-side comparison: same jobs for every server, medians and ratios, failures and interrupts kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_server import FakeServer

from sglang_margingate.bench.servers.client import Client, Prompt, ServerError
from sglang_margingate.bench.servers.timing import Arrivals
from sglang_margingate.bench.side_by_side import report as bench_report
from sglang_margingate.bench.side_by_side.compare import MODES, Cell, Comparison, Workload, compare
from sglang_margingate.bench.side_by_side.join import JoinError, join
from sglang_margingate.gate.stats import Rate

PROMPTS = tuple(Prompt(f"p-{i}", f"prompt {i}", "fake") for i in range(20))
FACTS = {"model": "fake", "device": "no device", "date": "2026-01-01T00:00:00Z", "versions": {"sglang": "0"}}


def workload(**options: object) -> Workload:
    return Workload(PROMPTS, Arrivals(8), 16, 2, **options)  # type: ignore[arg-type]


def test_jobs_are_the_same_for_every_server_and_the_share_is_kept() -> None:
    w = workload(shares=(10.0, 50.0, 100.0))
    for share, count in ((10.0, 2), (50.0, 10), (100.0, 20), (2.0, 1)):
        jobs = w.jobs(share, 0)
        assert jobs == workload().jobs(share, 0)
        assert sum(j.deterministic for j in jobs) == count
        assert len({j.rid for j in jobs}) == len(PROMPTS)
    assert {j.repeat for j in w.jobs(50.0, 1)} == {2}, "0 is the pass alone"
    again = {j.prompt.id: j.deterministic for j in w.jobs(50.0, 1)}
    assert again == {j.prompt.id: j.deterministic for j in w.jobs(50.0, 0)}


def test_poisson_arrivals_are_fixed_by_the_seed() -> None:
    times = Arrivals(rate=10.0, seed=3).times(1000)
    assert times == Arrivals(rate=10.0, seed=3).times(1000)
    assert times[-1] / 999 == pytest.approx(0.1, rel=0.15)
    assert Arrivals(4).times(2) == [0.0, 0.0]


def test_compare_measures_identity_and_speed_of_each_mode() -> None:
    opted_out: list[int] = []

    @contextmanager
    def start(label: str, _mode: str) -> Iterator[Client]:
        if label == "always":
            raise ServerError("the server died (exit 1): no memory")
        with FakeServer(flip_rate=0.02 if label == "stock" else 0.0, seconds=0.01) as fake:
            yield Client(fake.base_url)
            customs = [b["sampling_params"]["custom_params"] for b in fake.seen]
            opted_out.append(sum("margingate_policy" in c for c in customs))

    result = Comparison()
    saves = 0

    def saved() -> None:
        nonlocal saves
        saves += 1

    w = workload(shares=(10.0, 100.0))
    compare(("stock", "gate", "always", "stock"), w, start, result, saved=saved)
    cells = [(c.mode, c.share, c.identical.denominator) for c in result.cells]
    assert cells == [("stock", 100.0, 40), ("gate", 10.0, 4), ("gate", 100.0, 40), ("stock (2)", 100.0, 40)]
    assert opted_out == [0, 2 * 18, 0]
    stock, gate = result.cells[0], result.cells[2]
    assert stock.identical.numerator < 40
    assert gate.identical.numerator == 40
    assert gate.proof.largest > 1
    assert result.ratio(stock, "tokens_per_s") == 1.0
    low, high = result.ratio_spread(stock, "tokens_per_s")
    assert low <= 1.0 <= high
    assert result.failures == {"always": "the server died (exit 1): no memory"}
    assert saves == 2 * 4 + 4
    document = json.dumps(bench_report.to_dict(result, w, FACTS, False), allow_nan=False)
    assert json.loads(document)["cells"][2]["identical"] == {"numerator": 40, "denominator": 40}


def test_canonical_is_the_gate_at_every_share_and_stock_takes_no_parameters_of_ours() -> None:
    assert MODES["canonical"].flags == ("--margingate-policy", "gate", "--margingate-fast-path", "canonical")
    seen: dict[str, list[dict[str, object]]] = {}

    @contextmanager
    def start(label: str, _mode: str) -> Iterator[Client]:
        gauge = "loads" if label == "stock" else "margingate"
        with FakeServer(gauge=gauge, seconds=0.002) as fake:  # `loads`: no /margingate/status, as SGLang alone
            yield Client(fake.base_url)
            seen[label] = [b["sampling_params"] for b in fake.seen]

    result = Comparison()
    compare(("stock", "canonical"), workload(shares=(2.0, 50.0)), start, result)
    assert [(c.mode, c.share) for c in result.cells] == [("stock", 100.0), ("canonical", 2.0), ("canonical", 50.0)]
    assert not any("custom_params" in p for p in seen["stock"])
    assert all("custom_params" in p for p in seen["canonical"])


def test_server_that_dies_in_the_middle_keeps_its_runs_and_the_others() -> None:
    @contextmanager
    def start(label: str, _mode: str) -> Iterator[Client]:
        # 20 alone, 8 to warm up, 20 a run: gate dies in its second one.
        with FakeServer(dies_after=60 if label == "gate" else None, seconds=0.002) as fake:
            yield Client(fake.base_url)

    result = Comparison()
    w = workload()
    compare(("gate", "stock"), w, start, result)
    assert [(c.mode, len(c.repeats)) for c in result.cells] == [("gate", 1), ("stock", 2)]
    assert list(result.failures) == ["gate"]
    text = " ".join(bench_report.markdown(result, w, FACTS).split())
    assert "**gate: stopped after 1 run, which are above**: POST http://127.0.0.1" in text


def test_tables_fit_100_columns_and_say_what_is_missing() -> None:
    speed = {"tokens_per_s": 123456.0, "requests_per_s": 99.0}
    speed |= dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"), 12345.678)
    slow = {k: v / 17 for k, v in speed.items()}
    cells = [Cell("stock", 100.0, [slow]), Cell("stock (2)", 100.0, [speed])]
    cells += [Cell("canonical (2)", 2.0, [slow, speed]), Cell("log", 100.0, [])]
    cells[2].triggered = cells[2].flips = Rate(234_567, 2_345_678)
    result = Comparison(cells, failures={"always": "the server died (exit 1): " + "no memory " * 30})
    result.notes.append("Not measured: SGLang's deterministic mode needs CUDA and does not exist on a CPU.")
    facts = {**FACTS, "server_flags": [f"--flag-{i}" for i in range(40)]}
    lines = bench_report.markdown(result, workload(), facts).splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert "| stock         |     - |" in text, "all requests are alike there"
    assert "| canonical (2) |    2% |" in text
    assert "9.00 (1.00-17.00)" in text, "median and spread over stock's median"
    assert "| log" not in text, "nothing was measured"
    assert "**always: not measured**: the server died" in text
    assert "does not exist on a CPU" in text


def test_earlier_results_join_one_table(tmp_path: Path) -> None:
    def cell(mode: str, rate: float) -> Cell:
        times = dict.fromkeys(("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms"), float("nan"))
        return Cell(mode, 100.0, [{"tokens_per_s": rate, **times}], Rate(3, 4))

    first = Comparison([cell("stock", 100.0), Cell("gate", 2.0)], servers={"stock": {}, "gate": {}})
    first.failures["gate"] = "the server died"
    path = tmp_path / "a.json"
    path.write_text(json.dumps(bench_report.to_dict(first, workload(), FACTS, True)))
    result = Comparison()
    join(path, result, workload(), FACTS)
    result.cells.append(cell("gate", 50.0))
    assert result.ratio(result.cells[1], "tokens_per_s") == 0.5
    assert result.cells[0].identical == Rate(3, 4)
    assert math.isnan(result.cells[0].median("tpot_p50_ms"))
    assert not result.failures, "gate had not been measured there and is measured now"
    assert any("Measured before" in note and "stock" in note for note in result.notes)
    with pytest.raises(JoinError, match="stock is in another joined file"):
        join(path, result, workload(), FACTS)
    with pytest.raises(JoinError, match="measured with seed 0, this run has 1"):
        join(path, Comparison(), workload(seed=1), FACTS)
    with pytest.raises(JoinError, match="measured with device 'no device'"):
        join(path, Comparison(), workload(), {**FACTS, "device": "another"})
    found = json.loads(path.read_text())
    del found["cells"][0]["repeats"][0]["tpot_p99_ms"]
    path.write_text(json.dumps(found))
    with pytest.raises(JoinError, match="not a results file"):
        join(path, Comparison(), workload(), FACTS)
    path.write_text("[]")
    with pytest.raises(JoinError, match="not a results file"):
        join(path, Comparison(), workload(), FACTS)


def test_median_and_spread() -> None:
    cell = Cell("gate", 100.0, [{"tokens_per_s": x} for x in (3.0, 1.0, 2.0)])
    assert cell.median("tokens_per_s") == 2.0
    assert cell.spread("tokens_per_s") == (1.0, 3.0)
    assert math.isnan(Comparison([cell]).ratio(cell, "tokens_per_s")), "no ratio without stock"
