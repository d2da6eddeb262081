"""Side-by-side comparison: same jobs for every server, medians and ratios, failures and interrupts kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from sglang_margingate.bench import bench_report
from sglang_margingate.bench.client import Client, Prompt, ServerError
from sglang_margingate.bench.compare import Cell, Comparison, Workload, compare
from sglang_margingate.bench.fake import FakeServer
from sglang_margingate.bench.timing import Arrivals

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
    def start(label: str, _flags: Sequence[str]) -> Iterator[Client]:
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
    assert result.failures == {"always": "the server died (exit 1): no memory"}
    assert saves == 2 * 4 + 4
    table = bench_report.markdown(result, w, FACTS)
    assert "| gate | 10% |" in table
    assert "| always | not measured: the server died" in table
    columns = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert columns == {11}
    document = json.dumps(bench_report.to_dict(result, w, FACTS, False), allow_nan=False)
    assert json.loads(document)["cells"][2]["identical"] == {"numerator": 40, "denominator": 40}


def test_median_and_spread() -> None:
    cell = Cell("gate", 100.0, [{"tokens_per_s": x} for x in (3.0, 1.0, 2.0)])
    assert cell.median("tokens_per_s") == 2.0
    assert cell.spread("tokens_per_s") == (1.0, 3.0)
    assert math.isnan(Comparison([cell]).ratio(cell, "tokens_per_s")), "no ratio without stock"
