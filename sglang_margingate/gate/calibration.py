"""Calibration: from (margin, flipped) of every step to a threshold, its price and its bound.

Pure functions on arrays. A step with ``margin <= threshold`` triggers; a flip above the threshold is missed. The *miss
rate* here is missed flips per step of any kind.

Why the bound of a threshold chosen from the same sample is honest: let a step's score be its margin if it flips, else
minus infinity. The default threshold is the largest score of N steps; the chance that a further step scores higher is
then Beta(1, N), whatever the distribution (Wilks, Ann. Math. Stat. 12, 1941), whose 95% point is the rule of three.
Allowing k misses, k fixed by N and the target alone, gives Beta(k + 1, N - k): Clopper-Pearson's bound again. bf16
margins are quantised; ties only move the threshold's coverage up. Assumed: steps are exchangeable. Steps of one request
are not quite, so sample many short requests rather than few long ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from sglang_margingate.gate.stats import (
    ACCEPT_P,
    Array,
    Rate,
    TailFit,
    binomial_upper,
    fit_tail,
    percent,
    trials_needed,
)

if TYPE_CHECKING:
    import pandas as pd


FEW = 8
"""Thresholds fewer than these are counted one by one."""


class CalibrationError(ValueError):
    """The sample cannot be used; one line with the reason and the fix."""


@dataclass(frozen=True)
class Calibration:
    """A chosen threshold and the sample behind it."""

    threshold: float
    """The smallest threshold (tau), in logits, that meets the target in this sample."""
    target_miss: float
    confidence: float
    met: bool
    """Whether the target is shown at that confidence; always true of the default target, which speaks of the sample."""
    triggered: Rate
    """Steps with margin <= threshold, of all steps."""
    flips: Rate
    """Flips of all steps."""
    missed: Rate
    """Flips above the threshold, of all steps."""
    miss_upper: float
    """Upper bound of the miss rate at `confidence`, for further steps of the same traffic."""
    largest_flip: float
    """Largest margin of any flip, in logits; NaN without flips."""
    tail: tuple[TailFit, ...]
    """Fits of the tail, simplest first; empty with too few flips."""
    allowed: int = 0
    """Misses that the target allowed in a sample of this size, whatever it holds; the bound is that of this number."""

    @property
    def best_tail(self) -> TailFit | None:
        """The simplest accepted fit, if any."""
        return next((t for t in self.tail if t.accepted), None)

    def statement(self) -> str:
        """Return what the sample shows, in one or two sentences with their counts."""
        at = f"{100 * self.confidence:g}%"
        n = self.flips.denominator
        if self.flips.numerator:
            text = (
                f"threshold {self.threshold:g} triggers {self.triggered.numerator:,}/{n:,} steps "
                f"({percent(self.triggered.value)}) and misses {self.missed.numerator:,} of {self.flips.numerator:,} "
                f"flips; miss rate at most {percent(self.miss_upper, up=True)} of steps at {at}. "
                + self._tail_reason(at)
            )
        else:
            verb = "are missed" if self.allowed else "flip"
            rule = " (rule of three)" if self.confidence == 0.95 else ""  # three is that of 95%
            if self.allowed:
                rule = f" (the bound of the {self.allowed:,} misses that the target allows)"
            text = f"no flip in {n:,} steps: at most {percent(self.miss_upper, up=True)} of steps {verb} at {at}{rule}; threshold {self.threshold:g} verifies exact ties only, {self.triggered.numerator:,} here."
        if not self.met:
            need = trials_needed(self.target_miss, self.confidence)
            text += f" Not shown: target {self.target_miss:g} needs at least {need:,} steps."
        return text

    def _tail_reason(self, at: str) -> str:
        fit = self.best_tail
        if fit:
            aim = f"a miss rate of {self.target_miss:g}" if self.target_miss else f"a repeat without a miss at {at}"
            return (
                f"The tail of {fit.tail_flips:,} flips fits ({fit.family}, p = {fit.p_value:.2f}) and puts {aim} at "
                f"{fit.threshold:.4g}."
            )
        if self.tail:
            return f"No tail fit is acceptable (p < {ACCEPT_P:g}): rely on the bound."
        return "Too few flips for a tail fit: rely on the bound."


def check_sample(margins: ArrayLike, flipped: ArrayLike) -> tuple[Array, Array]:
    """Return margins (float64; a NaN, which always triggers, becomes -inf) and flips (bool), both of shape (steps,).

    Raises
    ------
    CalibrationError
        Empty, of different lengths, or with negative margins.
    """
    m, f = np.asarray(margins, dtype=np.float64), np.asarray(flipped, dtype=bool)
    if m.ndim != 1 or m.shape != f.shape:
        raise CalibrationError(f"margins {m.shape} and flipped {f.shape} must be of one length")
    if not m.size:
        raise CalibrationError("no verified steps; run prompts under a policy that verifies every step")
    if (m < 0).any():
        raise CalibrationError(f"margin {m[m < 0][0]:g} is negative; a margin is top-1 minus top-2")
    return np.where(np.isnan(m), -np.inf, m), f


def threshold_for(
    margins: ArrayLike,
    flipped: ArrayLike,
    target_miss: float = 0.0,
    confidence: float = 0.95,
    *,
    tail: bool = True,
) -> Calibration:
    """Choose the smallest threshold that meets the target.

    Parameters
    ----------
    margins
        Shape (steps,): the fast path's margin of each step, in logits.
    flipped
        Shape (steps,): whether a (shadow) verify of the step gave another token.
    target_miss
        Largest acceptable miss rate, in missed flips per step, to be shown at `confidence`. 0: no flip missed in the
        sample. Where the sample is too small to show the target, the threshold is that of target 0 and ``met`` False.
    confidence
        In (0, 1).
    tail
        Whether to fit the tail (the slow part: up to a second).

    Raises
    ------
    CalibrationError
        The sample or a parameter is unusable. A sample that never flips is not an error.
    """
    m, f = check_sample(margins, flipped)
    if not 0 <= target_miss < 1:
        raise CalibrationError(f"target miss rate {target_miss:g} is not in [0, 1)")
    if not 0 < confidence < 1:
        raise CalibrationError(f"confidence {confidence:g} is not in (0, 1)")
    n, at_flips = m.size, np.sort(m[f])
    allowed, met = 0, True
    if target_miss > 0:
        # k depends on n and the target only, never on the data: the bound stays exact (see above). It grows with k.
        met = bool(binomial_upper(0, n, confidence) <= target_miss)
        ks = np.arange(int(n * target_miss) + 1)
        allowed = int((binomial_upper(ks, n, confidence) <= target_miss).sum()) - 1 if met else 0
    # With `allowed` misses the threshold is the next flip below them. 0 at least: exact ties always trigger.
    tau = max(float(at_flips[-1 - allowed]), 0.0) if allowed < at_flips.size else 0.0
    return Calibration(
        threshold=tau,
        target_miss=target_miss,
        confidence=confidence,
        met=met,
        triggered=Rate(int((m <= tau).sum()), n),
        flips=Rate(at_flips.size, n),
        missed=Rate(int((at_flips > tau).sum()), n),
        # The bound of the k that was allowed, not of the fewer that ties leave: that number depends on the data.
        miss_upper=float(binomial_upper(allowed, n, confidence)),
        largest_flip=float(at_flips[-1]) if at_flips.size and at_flips[-1] >= 0 else math.nan,
        tail=fit_tail(at_flips, n, target_miss, confidence) if tail else (),
        allowed=allowed,
    )


def trade_off(
    margins: ArrayLike, flipped: ArrayLike, taus: ArrayLike | None = None, confidence: float = 0.95
) -> pd.DataFrame:
    """Tabulate price and risk over thresholds.

    Parameters
    ----------
    taus
        Thresholds in logits; by default 0 and the distinct margins of the flips, where alone the misses change.

    Returns
    -------
    pandas.DataFrame
        A row per threshold, ascending: threshold, steps, triggered, trigger_rate, flips, missed, miss_rate and
        miss_upper (both per step; the bound is exact for a threshold fixed before the sample was seen).
    """
    import pandas as pd

    m, f = check_sample(margins, flipped)
    at_flips = np.sort(m[f])
    if taus is None:
        taus = np.concatenate([[0.0], at_flips[at_flips > 0]])
    tau = np.unique(np.asarray(taus, dtype=np.float64))
    if tau.size < FEW:  # counting once for each is faster than sorting a million margins
        triggered = np.array([np.count_nonzero(m <= t) for t in tau], dtype=np.int64)
    else:
        triggered = np.searchsorted(np.sort(m), tau, side="right")
    missed = at_flips.size - np.searchsorted(at_flips, tau, side="right")
    return pd.DataFrame(
        {
            "threshold": tau,
            "steps": m.size,
            "triggered": triggered,
            "trigger_rate": triggered / m.size,
            "flips": at_flips.size,
            "missed": missed,
            "miss_rate": missed / m.size,
            "miss_upper": binomial_upper(missed, m.size, confidence),
        }
    )


def transfer_matrix(
    samples: Mapping[str, tuple[ArrayLike, ArrayLike]],
    thresholds: Mapping[str, float] | None = None,
    *,
    target_miss: float = 0.0,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Apply each dataset's threshold to every dataset.

    Parameters
    ----------
    samples
        (margins, flipped) by dataset.
    thresholds
        Threshold by dataset it was calibrated on; by default :func:`threshold_for` of each sample.

    Returns
    -------
    pandas.DataFrame
        A row per pair: calibrated_on, applied_to, then the columns of :func:`trade_off`. Off the diagonal the
        threshold does not come from the sample, so the bound is plain Clopper-Pearson; on it, Wilks gives the same.
    """
    import pandas as pd

    if thresholds is None:
        thresholds = {n: threshold_for(*s, target_miss, confidence, tail=False).threshold for n, s in samples.items()}
    rows = []
    for source, tau in thresholds.items():
        for name, (margins, flipped) in samples.items():
            row = trade_off(margins, flipped, [tau], confidence)
            row.insert(0, "applied_to", name)
            row.insert(0, "calibrated_on", source)
            rows.append(row)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
