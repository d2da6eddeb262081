"""Thresholds from samples: chosen well, and bounded honestly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sglang_margingate.gate.calibration import CalibrationError, threshold_for, trade_off, transfer_matrix
from sglang_margingate.gate.stats import binomial_upper

SCALE, FLIP, WIDTH = 4.0, 0.5, 0.05
"""Margins are exponential(SCALE); a step of margin m flips with probability FLIP * exp(-m / WIDTH)."""


def simulate(rng: np.random.Generator, steps: int, quantum: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    margins = rng.exponential(SCALE, steps)
    flipped = rng.random(steps) < FLIP * np.exp(-margins / WIDTH)
    return (np.ceil(margins / quantum) * quantum if quantum else margins), flipped


def true_miss_rate(threshold: float) -> float:
    """Flips above the threshold per step; exact for quantised margins too, at grid points."""
    decay = 1 / SCALE + 1 / WIDTH
    return FLIP / SCALE / decay * math.exp(-threshold * decay)


@pytest.mark.parametrize("quantum", [0.0, 0.0625])
@pytest.mark.parametrize("target", [0.0, 0.001])
def test_bound_covers_the_true_miss_rate(target: float, quantum: float) -> None:
    rng = np.random.default_rng(11)
    covered = kept = 0
    for _ in range(4000):  # 94% of 1,000 would be 1.5 standard errors from the exact 95%; here it is 3
        c = threshold_for(*simulate(rng, 5000, quantum), target, tail=False)
        truth = true_miss_rate(c.threshold)
        covered += truth <= c.miss_upper
        kept += truth <= target
    assert covered >= 0.94 * 4000, "the threshold comes from the sample, and the bound holds all the same"
    if target:
        assert kept >= 0.94 * 4000


def test_simulation_is_what_it_says() -> None:
    m, f = simulate(np.random.default_rng(1), 2_000_000)
    assert f.mean() == pytest.approx(true_miss_rate(0.0), rel=0.03)
    assert (f & (m > 0.1)).mean() == pytest.approx(true_miss_rate(0.1), rel=0.1)


def test_default_threshold_is_the_largest_flip() -> None:
    m = np.array([0.0, 0.1, 0.3, 0.2, 5.0, 7.0], np.float32)
    f = np.array([1, 0, 1, 1, 0, 0])
    c = threshold_for(m, f)
    assert c.threshold == float(np.float32(0.3)), "exactly a float32 margin: the step itself triggers"
    assert not m[2] > c.threshold
    assert (c.triggered.numerator, c.flips.numerator, c.missed.numerator) == (4, 3, 0)
    assert c.met
    assert c.miss_upper == pytest.approx(1 - 0.05 ** (1 / 6))


def test_target_allows_misses_and_is_shown() -> None:
    m, f = simulate(np.random.default_rng(2), 100_000)
    strict, loose = threshold_for(m, f), threshold_for(m, f, 1e-4)
    assert loose.threshold < strict.threshold
    assert loose.missed.numerator == 4
    assert loose.miss_upper <= 1e-4
    next_lower = np.sort(m[f])[-6]
    assert trade_off(m, f, [next_lower])["miss_upper"].item() > 1e-4, "the smallest that meets it"
    assert loose.tail[0].threshold == pytest.approx(loose.threshold, rel=0.35)


def test_target_that_the_sample_cannot_show() -> None:
    m, f = simulate(np.random.default_rng(2), 1000)
    c = threshold_for(m, f, 1e-4)
    assert not c.met
    assert c.missed.numerator == 0
    assert "needs at least 29,956 steps" in c.statement()


def test_the_sentence_names_the_bound_that_it_gives() -> None:
    """A target allows misses whatever the sample holds: then the bound is theirs, not the rule of three."""
    found = threshold_for(np.linspace(0.1, 5, 1538), np.zeros(1538, bool), target_miss=0.01, tail=False)
    assert found.allowed > 0
    assert found.miss_upper == pytest.approx(float(binomial_upper(found.allowed, 1538)))
    assert "rule of three" not in found.statement()
    assert f"the bound of the {found.allowed} misses" in found.statement()
    sure = threshold_for(np.linspace(0.1, 5, 1538), np.zeros(1538, bool), confidence=0.99375, tail=False).statement()
    assert "of steps flip at 99.375%; " in sure, "three is the rule of 95% alone"


def test_dataset_that_never_flips() -> None:
    m = np.concatenate([np.zeros(3), np.ones(9997)])
    c = threshold_for(m, np.zeros(10_000))
    assert c.threshold == 0.0
    assert c.triggered.numerator == 3
    assert math.isnan(c.largest_flip)
    assert c.statement().startswith("no flip in 10,000 steps: at most 0.030% of steps flip at 95% (rule of three)")
    assert "exact ties only, 3 here" in c.statement()


def test_flips_at_ties_only() -> None:
    c = threshold_for([0.0] * 50 + [1.0] * 50, [True] * 50 + [False] * 50)
    assert (c.threshold, c.missed.numerator, c.tail) == (0.0, 0, ())
    assert "Too few flips" in c.statement()


def test_nan_and_infinite_margins() -> None:
    c = threshold_for([np.nan, 0.5, np.inf], [True, False, False])
    assert (c.threshold, c.missed.numerator, c.triggered.numerator) == (0.0, 0, 1), "NaN always triggers"
    assert threshold_for([np.inf, 1.0], [True, False]).threshold == math.inf


def test_statement_gives_a_reason_beyond_the_largest_seen() -> None:
    c = threshold_for(*simulate(np.random.default_rng(4), 100_000, 0.03125))
    assert c.best_tail is not None
    assert c.best_tail.family == "exponential"
    assert c.best_tail.threshold > c.largest_flip, "a repeat without a miss needs more than the largest seen"
    assert c.best_tail.scale == pytest.approx(1 / (1 / SCALE + 1 / WIDTH), rel=0.2)
    assert "fits (exponential, p = " in c.statement()
    assert f"misses 0 of {c.flips.numerator} flips" in c.statement()


@pytest.mark.parametrize(
    ("margins", "flipped", "options", "message"),
    [
        ([], [], {}, "no verified steps"),
        ([1.0, 2.0], [True], {}, "one length"),
        ([[1.0]], [[True]], {}, "one length"),
        ([-0.5], [True], {}, "negative"),
        ([1.0], [True], {"target_miss": 1.0}, "target miss"),
        ([1.0], [True], {"target_miss": math.nan}, "target miss"),
        ([1.0], [True], {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_is_one_clear_line(margins, flipped, options, message) -> None:
    with pytest.raises(CalibrationError, match=message) as e:
        threshold_for(margins, flipped, **options)
    assert "\n" not in str(e.value)


def test_trade_off() -> None:
    table = trade_off([0.0, 0.0625, 0.0625, 0.5, 3.0], [1, 0, 1, 1, 0], [1.0, 0.0, 0.0625])
    assert table["threshold"].tolist() == [0.0, 0.0625, 1.0]
    assert table["triggered"].tolist() == [1, 3, 4]
    assert table["missed"].tolist() == [2, 1, 0]
    assert (table["steps"] == 5).all()
    assert table["miss_rate"].tolist() == [0.4, 0.2, 0.0]
    assert table["miss_upper"].iloc[2] == pytest.approx(1 - 0.05**0.2)
    assert trade_off([0.0, 0.25, 1.0], [0, 1, 0])["threshold"].tolist() == [0.0, 0.25]
    assert trade_off([0.5, 1.0], [0, 0])["missed"].tolist() == [0]


def test_transfer_matrix() -> None:
    rng = np.random.default_rng(9)
    easy, hard = simulate(rng, 20_000), simulate(rng, 20_000)
    hard = (hard[0] * 2, hard[1])  # its flips reach twice as far
    table = transfer_matrix({"easy": easy, "hard": hard, "calm": (np.ones(100), np.zeros(100))})
    cell = table.set_index(["calibrated_on", "applied_to"])
    assert len(table) == 9
    assert cell.loc[("easy", "easy"), "missed"] == 0
    assert cell.loc[("easy", "hard"), "missed"] > 0
    assert cell.loc[("hard", "easy"), "missed"] == 0
    assert cell.loc[("calm", "calm"), "triggered"] == 0
    fixed = transfer_matrix({"easy": easy}, {"profile": 0.25})
    assert fixed.loc[0, ["calibrated_on", "threshold"]].tolist() == ["profile", 0.25]


@pytest.mark.parametrize(
    ("steps", "target", "confidence", "says"),
    [
        (20_000, 0.0, 0.95, "threshold 0.25 triggers 1,224/20,000 steps (6.12%) and misses 0 of 141 flips; miss rate at most 0.015% "
         "of steps at 95%. The tail of 65 flips fits (exponential, p = 0.65) and puts a repeat without a miss at 95% at 0.3421."),
        (20_000, 1e-3, 0.95, "threshold 0.125 triggers 624/20,000 steps (3.12%) and misses 7 of 141 flips; miss rate at most 0.098% "
         "of steps at 95%. The tail of 65 flips fits (exponential, p = 0.65) and puts a miss rate of 0.001 at 0.08253."),
        (1_000, 1e-3, 0.9, "threshold 0.15625 triggers 33/1,000 steps (3.30%) and misses 0 of 7 flips; miss rate at most 0.23% of steps "
         "at 90%. Too few flips for a tail fit: rely on the bound. Not shown: target 0.001 needs at least 2,302 steps."),
    ],
)  # fmt: skip
def test_a_statement_word_by_word(steps: int, target: float, confidence: float, says: str) -> None:
    found = threshold_for(*simulate(np.random.default_rng(4), steps, 0.03125), target, confidence)
    assert found.statement() == says


def test_bounds_in_a_statement_are_rounded_up() -> None:
    calm = threshold_for([1.0] * 100, [0] * 100).statement()
    assert calm.startswith("no flip in 100 steps: at most 2.96% of steps flip at 95%"), "2.9513%"
    one = threshold_for([1.0] * 100, [1] + [0] * 99, tail=False).statement()
    assert "miss rate at most 2.96% of steps at 95%" in one


def test_what_a_sample_that_cannot_be_used_is_told() -> None:
    with pytest.raises(CalibrationError, match=r"^margin -2 is negative; a margin is top-1 minus top-2$"):
        threshold_for([0.0, 0.5, -2.0], [0, 0, 0])
    with pytest.raises(
        CalibrationError, match=r"^no verified steps; run prompts under a policy that verifies every step$"
    ):
        threshold_for([], [])
    assert threshold_for([0, 3, 1], [0, 0, 1]).threshold == 1.0, "whole numbers will do"


def test_a_tail_is_fitted_where_it_is_asked_for_and_at_the_confidence() -> None:
    sample = simulate(np.random.default_rng(4), 20_000)
    assert threshold_for(*sample, tail=False).tail == ()
    low, high = (threshold_for(*sample, confidence=c).tail[0].threshold for c in (0.5, 0.99))
    assert low < high
    assert threshold_for([0.0, 1.0], [1, 0]).largest_flip == 0.0


def test_a_target_at_its_border() -> None:
    """59 steps without a flip show 5% at 95%, 93 with one; at 90%, 45 and 77."""
    flips = np.linspace(1, 2, 93), np.ones(93)
    for steps, confidence, met, missed in ((58, 0.95, False, 0), (59, 0.95, True, 0), (92, 0.95, True, 0), (93, 0.95, True, 1),
                                           (44, 0.9, False, 0), (45, 0.9, True, 0), (77, 0.9, True, 1)):  # fmt: skip
        found = threshold_for(flips[0][:steps], flips[1][:steps], 0.05, confidence, tail=False)
        assert (found.met, found.missed.numerator) == (met, missed), steps
    at = threshold_for(np.ones(59), np.zeros(59)).miss_upper
    assert threshold_for(np.ones(59), np.zeros(59), at).met, "a bound equal to the target shows it"
    with pytest.raises(CalibrationError, match="confidence 0 is not in"):
        threshold_for([1.0], [True], confidence=0.0)


def test_every_column_of_a_trade_off() -> None:
    table = trade_off([0.0, 0.5, 1.0, 3.0], [1, 1, 0, 0], [0, 1], 0.9)
    assert list(table) == [
        "threshold",
        "steps",
        "triggered",
        "trigger_rate",
        "flips",
        "missed",
        "miss_rate",
        "miss_upper",
    ]
    assert table["threshold"].dtype == np.float64
    assert table["trigger_rate"].tolist() == [0.25, 0.75]
    assert table["flips"].tolist() == [2, 2]
    assert table["miss_upper"].iloc[1] == pytest.approx(1 - 0.1**0.25)


def test_a_transfer_matrix_has_its_own_rows_and_confidence() -> None:
    sample = [0.0, 0.5, 1.0, 3.0], [1, 1, 0, 0]
    table = transfer_matrix({"a": sample, "b": sample}, target_miss=0.6, confidence=0.5)
    assert list(table)[:3] == ["calibrated_on", "applied_to", "threshold"]
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table["applied_to"].tolist() == ["a", "b", "a", "b"]
    assert set(table["threshold"]) == {threshold_for(*sample, 0.6, 0.5).threshold}
    assert table["miss_upper"].tolist() == trade_off(*sample, table["threshold"][:1], 0.5)["miss_upper"].tolist() * 4
    assert len(transfer_matrix({})) == 0


@pytest.mark.parametrize("count", [1, 7, 8, 40])
def test_few_thresholds_are_counted_as_many_are(count: int) -> None:
    rng = np.random.default_rng(count)
    margin = np.round(rng.exponential(2, 5000) * 16) / 16
    margin[::97] = np.nan  # always triggers
    flip = rng.random(5000) < 0.02
    taus = rng.choice(np.unique(margin[np.isfinite(margin)]), count, replace=False)
    table = trade_off(margin, flip, taus)
    for _, row in table.iterrows():
        low = ~(margin > row["threshold"])
        assert (row["triggered"], row["missed"]) == (int(low.sum()), int((flip & ~low).sum()))
