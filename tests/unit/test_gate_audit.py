"""The audit's sampler and counter."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sglang_margingate.gate.audit import AuditCounter, AuditSampler

ROOT = Path(__file__).resolve().parents[2]


def test_draws_do_not_depend_on_order_company_or_process() -> None:
    pairs = [(f"req-{i}", step) for i in range(50) for step in range(40)]
    a, b = AuditSampler(0.05, seed=7), AuditSampler(0.05, seed=7)
    first = {p: a.draw(*p) for p in pairs}
    random.Random(0).shuffle(pairs)
    b._streams.update(dict.fromkeys(map(str, range(65_530)), 0))  # the cache overflows on the way
    assert {p: b.draw(*p) for p in pairs} == first
    code = "from sglang_margingate.gate.audit import *; s = AuditSampler(0.05, 7); "
    code += "print(sum(s.draw(f'req-{i}', t) for i in range(50) for t in range(40)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(out.stdout) == sum(first.values()), "Python's own hash would differ from process to process"


def test_rate_is_met_evenly_over_requests_and_steps() -> None:
    sampler = AuditSampler(0.1, seed=1)
    drawn = np.array([[sampler.draw(f"r{i}", t) for t in range(200)] for i in range(500)])
    assert drawn.mean() == pytest.approx(0.1, abs=0.004)
    assert drawn.mean(0).std() == pytest.approx(np.sqrt(0.09 / 500), rel=0.2)
    assert drawn.mean(1).std() == pytest.approx(np.sqrt(0.09 / 200), rel=0.2)
    together = (drawn[:, 1:] & drawn[:, :-1]).mean()
    assert together == pytest.approx(0.01, abs=0.002), "neighbouring steps are independent"


def test_edges_and_seeds() -> None:
    assert not any(AuditSampler(0.0).draw("r", t) for t in range(1000))
    assert all(AuditSampler(1.0).draw("r", t) for t in range(1000))
    one, two = AuditSampler(0.5, seed=1), AuditSampler(0.5, seed=-2)
    assert [one.draw("r", t) for t in range(64)] != [two.draw("r", t) for t in range(64)]
    assert AuditSampler(0.5).draw("é" * 1000, 2**31) in (True, False)
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="audit rate"):
            AuditSampler(rate)


def test_bound_covers_although_flips_come_in_clusters() -> None:
    # 40 requests of 50 untriggered steps; all 60 missed flips sit in two of them: far from independent steps.
    population = np.zeros((40, 50), bool)
    population[3, 10:40] = population[17, 20:] = True
    assert population.sum() == 60
    covered = 0
    for seed in range(1000):
        sampler = AuditSampler(0.1, seed)
        counter = AuditCounter()
        for i, row in enumerate(population):
            drawn = [flipped for t, flipped in enumerate(row) if sampler.draw(str(i), t)]
            counter.audited += len(drawn)
            counter.missed += int(sum(drawn))
        covered += counter.bound() >= population.mean()
    assert covered >= 940


def test_counter() -> None:
    c = AuditCounter()
    assert c.bound() == c.bound_per_step() == 1.0
    assert c.verdict(0.01) == "undecided"
    for i in range(1000):
        c.add_untriggered(audited=i % 2 == 0, flipped=bool(i % 2))
    c.add_triggered(3000)
    assert (c.audited, c.missed, c.untriggered) == (500, 0, 1000), "flipped means nothing where nothing was audited"
    assert c.bound() == pytest.approx(0.005974, rel=1e-3)
    assert c.bound_per_step() == pytest.approx(c.bound() / 4)
    assert c.verdict(0.01) == "within"
    assert c.verdict(0.001) == "undecided"
    assert "2,995 audited steps without a flip would show 0.001" in c.describe(0.001)
    other = AuditCounter()
    other.add_untriggered(audited=True, flipped=True)
    c.add(other)
    assert str(c.rate).startswith("1/501 (0.20%")
    assert c.verdict(0.001) == "exceeded"
    assert "exceeded" in c.describe(0.001)
    assert c.verdict(0.005) == "undecided"
    assert c.describe().startswith("missed flips 1/501")


def test_counters_add_up() -> None:
    c, other = AuditCounter(), AuditCounter(5, 2, 7, 11)
    c.add_triggered()
    c.add_triggered()
    for _ in range(2):
        c.add_untriggered(audited=True, flipped=True)
    c.add_untriggered(audited=True)
    assert c == AuditCounter(3, 2, 3, 2)
    c.add(other)
    c.add(other)
    assert c == AuditCounter(13, 6, 17, 24)


def test_a_verdict_at_its_border() -> None:
    c = AuditCounter(100, 10, 100, 0)
    assert c.verdict(c.bound()) == "within"
    assert c.verdict(0.1) == "undecided", "the observed rate is not above"
    assert c.verdict(0.0999) == "exceeded"


def test_what_an_undecided_audit_says() -> None:
    nothing_found, found = AuditCounter(100, 0, 300, 0), AuditCounter(100, 1, 300, 0)
    assert nothing_found.describe(0.01, 0.9).endswith("230 audited steps without a flip would show 0.01")
    assert nothing_found.describe(0.01).endswith("299 audited steps without a flip would show 0.01")
    assert nothing_found.describe(0.0).endswith("300 untriggered; undecided (largest acceptable 0)")
    assert found.describe(0.02).endswith("undecided (largest acceptable 0.02)"), "no more steps without a flip can come"
    assert found.describe(0.5).endswith("within (largest acceptable 0.5)")
    # Whether it is within depends on the confidence that was asked for.
    assert nothing_found.describe(0.025, 0.9).endswith("within (largest acceptable 0.025)")
    assert "would show 0.025" in nothing_found.describe(0.025, 0.95)


@pytest.mark.parametrize(
    ("seed", "request_id", "drawn"),
    [
        (0, "r", [3, 9, 27, 29, 54]),
        (0, "é", [7, 34, 40, 58]),
        (7, "r", [21, 26, 29, 42, 47, 49, 55, 56]),
        (-2, "é", [6, 17, 18, 30, 59]),
    ],
)
def test_which_steps_are_drawn_is_the_same_in_every_version(seed: int, request_id: str, drawn: list[int]) -> None:
    sampler = AuditSampler(0.1, seed)
    assert [step for step in range(60) if sampler.draw(request_id, step)] == drawn
    assert AuditSampler(0.1).seed == 0
