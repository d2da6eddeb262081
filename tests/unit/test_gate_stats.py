"""Exact bounds, rates and tail fits."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sglang_margingate.gate.stats import (
    MIN_TAIL,
    Rate,
    _distance,
    _pareto,
    _quantile,
    _quantum,
    _spread,
    _survival,
    binomial_lower,
    binomial_upper,
    fit_tail,
    percent,
    trials_needed,
)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (9, 10), (12, 4000), (0, 1_000_000), (10, 10)])
def test_bounds_are_clopper_pearson(k: int, n: int, confidence: float) -> None:
    exact = stats.binomtest(k, n)
    upper = exact.__class__(k, n, "less", 0.5, 1.0).proportion_ci(confidence).high
    lower = exact.__class__(k, n, "greater", 0.5, 1.0).proportion_ci(confidence).low
    assert Rate(k, n).upper(confidence) == pytest.approx(upper, rel=1e-6)
    assert Rate(k, n).lower(confidence) == pytest.approx(lower, rel=1e-6)


def test_rule_of_three() -> None:
    for n in (100, 4000, 10**6):
        assert Rate(0, n).upper() == pytest.approx(1 - 0.05 ** (1 / n))
        assert 0.97 * 3 / n < Rate(0, n).upper() < 3 / n
    assert trials_needed(0.003) == 998
    assert Rate(0, 998).upper() <= 0.003 < Rate(0, 997).upper()
    assert trials_needed(1.0) == 1
    with pytest.raises(ValueError, match="above 0"):
        trials_needed(0.0)


def test_bounds_cover_in_at_least_the_stated_share() -> None:
    rng = np.random.default_rng(3)
    for n, p in ((100, 0.01), (5000, 0.0004), (5000, 0.01), (50, 0.5)):
        found = rng.binomial(n, p, 20_000)
        assert (binomial_upper(found, n) >= p).mean() >= 0.947  # 95% less three standard errors of 20,000
        assert (binomial_lower(found, n) <= p).mean() >= 0.947


def test_text_always_has_its_counts() -> None:
    assert str(Rate(12, 4000)) == "12/4,000 (0.30%, at most 0.49% at 95%)"
    assert str(Rate(0, 4000)) == "0/4,000 (0%, at most 0.075% at 95%)"
    assert Rate(1, 10).describe(0.9).endswith("at 90%)")
    assert str(Rate(0, 0)) == "0/0 (nothing observed)"
    assert "at most 0.000030% at 95%" in str(Rate(0, 10_000_000)), "small rates keep two digits, without exponents"


def test_percent_rounds_bounds_up_only() -> None:
    assert percent(0.00301, up=True) == "0.31%"
    assert percent(0.003, up=True) == "0.30%"
    assert percent(0.00301) == "0.30%"


def test_no_trials() -> None:
    empty = Rate(0, 0)
    assert math.isnan(empty.value)
    assert (empty.lower(), empty.upper()) == (0.0, 1.0)


def test_counts_are_checked_and_plain() -> None:
    rate = Rate(np.int64(3), np.int32(7))
    assert json.dumps([rate.numerator, rate.denominator]) == "[3, 7]"
    for k, n in ((-1, 3), (4, 3), (1.5, 3), (1, None)):
        with pytest.raises(ValueError, match=r"numerator|whole"):
            Rate(k, n)


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.3])
def test_tail_functions_are_scipys(shape: float) -> None:
    x = np.linspace(0, 6, 50)
    assert _survival(x, shape, 2.0) == pytest.approx(stats.genpareto.sf(x, shape, scale=2.0))
    share = np.array([0.9, 0.1, 1e-4])
    assert _quantile(share, shape, 2.0) == pytest.approx(stats.genpareto.isf(share, shape, scale=2.0))


@pytest.mark.parametrize("quantum", [0.0, 0.0625])
def test_tail_fit_finds_a_known_tail(quantum: float) -> None:
    rng = np.random.default_rng(5)
    accepted, thresholds = 0, []
    for _ in range(20):
        x = rng.exponential(0.25, 400)
        x = np.ceil(x / quantum) * quantum if quantum else x
        exponential, pareto = fit_tail(x, 100_000)
        accepted += exponential.accepted + pareto.accepted
        thresholds.append(exponential.threshold)
    assert accepted >= 35, "a true model is refused at 5%"
    exact = -0.25 * math.log(-math.log(0.95) / 400)  # 5% chance that 400 more flips exceed it
    assert np.median(thresholds) == pytest.approx(exact, rel=0.1)


def test_tail_fit_refuses_the_wrong_family() -> None:
    x = np.random.default_rng(6).uniform(0, 1, 1000)
    exponential, pareto = fit_tail(x, 100_000)
    assert not exponential.accepted
    assert pareto.accepted, "the uniform is a generalized Pareto of shape -1"
    assert pareto.shape == pytest.approx(-1, abs=0.25)
    assert pareto.threshold == pytest.approx(1, abs=0.05)


def test_tail_fit_needs_a_tail() -> None:
    assert fit_tail(np.array([]), 100) == ()
    assert fit_tail(np.zeros(500), 1000) == (), "exact ties are no tail"
    assert fit_tail(np.array([0.1] * 5 + [np.inf] * 50), 1000) == ()
    assert fit_tail(np.repeat([0.0625, 0.125], 300), 1000) == (), "two grid points fit anything"


@pytest.mark.parametrize(
    ("quantum", "target", "fits"),
    [
        (0.0, 0.0, (("exponential", 0.0, 0.18224411, 0.16054113, 30, 0.15517285, 0.23880597, 1.32168993),
                    ("generalized Pareto", -0.51632815, 0.27634188, 0.16054113, 30, 0.11887971, 0.25373134, 0.67580316))),
        (0.0625, 0.01, (("exponential", 0.0, 0.171875, 0.1875, 28, 0.12628464, 0.19402985, 0.36446584),
                        ("generalized Pareto", -0.49797242, 0.25746401, 0.1875, 28, 0.1190109, 0.04975124, 0.3948976))),
    ],
)  # fmt: skip
def test_one_sample_always_gives_one_report(quantum: float, target: float, fits: tuple[tuple[Any, ...], ...]) -> None:
    """Numbers as they came out once, of code that the tests above hold to what it should be."""
    x = np.random.default_rng(5).exponential(0.25, 60)
    for found, wanted in zip(
        fit_tail(np.ceil(x / quantum) * quantum if quantum else x, 1000, target), fits, strict=True
    ):
        family, *numbers = astuple(found)
        assert family == wanted[0]
        assert numbers == pytest.approx(wanted[1:], rel=1e-4)


def test_the_upper_half_is_fitted_where_there_are_enough() -> None:
    assert {fit.start for fit in fit_tail(np.linspace(0.1, 1, 39), 1000)} == {0.0}
    assert {round(fit.start, 6) for fit in fit_tail(np.linspace(0.1, 1, 40), 1000)} == {0.538462}, "a value of the data"
    assert len(fit_tail(np.linspace(0.1, 1, MIN_TAIL), 1000)) == 2
    assert fit_tail(np.linspace(0.1, 1, MIN_TAIL - 1), 1000) == ()
    assert len(fit_tail(np.repeat([0.1, 0.2, 0.4], 5), 1000)) == 2
    assert len(fit_tail(np.append(np.linspace(0.1, 1, 39), [0.0, np.inf, np.nan]), 1000)) == 2
    assert {fit.start for fit in fit_tail(np.append(np.linspace(0.1, 1, 39), [0.0, np.inf, np.nan]), 1000)} == {0.0}


def test_a_target_that_more_flips_may_miss_needs_no_tail() -> None:
    assert {fit.threshold for fit in fit_tail(np.linspace(0.1, 1, 20), 1000, 0.02)} == {0.0}, "all 20 may be missed"
    assert min(fit.threshold for fit in fit_tail(np.linspace(0.1, 1, 20), 1000, 0.019)) > 0


def test_parts_of_a_fit() -> None:
    assert _quantum(np.array([0.0625, 0.0625, 0.125, 0.25])) == 0.0625
    assert _quantum(np.array([0.5, 0.5, 0.5, 1.0])) == 0.5
    assert _quantum(np.array([0.1, 0.2, 0.3, 0.4, 0.4])) == pytest.approx(0.1), "4 of 5 distinct are a grid"
    assert _quantum(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])) == 0.0
    assert _pareto(np.arange(1, 6.0)) == pytest.approx((-1.06122449, 6.18367347))
    assert _spread(np.array([1.0, 1, 2]), 0.5).tolist() == [0.625, 0.875, 1.75]
    assert _distance(np.array([1.0, 1, 2]), 0.0, 1.0, 0.5) == pytest.approx(math.exp(-2))
    assert _distance(np.array([0.5, 1, 2]), 0.0, 1.0, 0.0) == pytest.approx(1 - math.exp(-0.5))


def test_defaults_and_roundings_of_a_rate() -> None:
    assert Rate(3, 100).lower() == Rate(3, 100).lower(0.95) != Rate(3, 100).lower(0.9)
    assert str(Rate(0, 100)) == "0/100 (0%, at most 2.96% at 95%)", "2.9513%, rounded up"
    assert binomial_lower(3, 100) == binomial_lower(np.int8(3), np.float32(100))
