"""What another threshold would have done to a recorded run."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from margingate_dashboard.rates import upper_95


@dataclass(frozen=True)
class Sample:
    """The decode steps of a run, sorted once so that each threshold costs a binary search."""

    margins: np.ndarray
    """Margins of all decode steps, rising."""
    gated: np.ndarray
    """The same as a threshold sees them, rising: infinite for a structural step, which no threshold triggers."""
    gated_flips: np.ndarray
    """Those of the known flips."""
    at_flips: np.ndarray
    """Margins of the known flips, rising."""
    others: np.ndarray
    """Margins of the decode steps that are not known to have flipped, rising."""
    untriggered: np.ndarray
    """Margins, as a threshold sees them, of the steps that did not trigger in the run, rising."""
    examined: np.ndarray
    """Those of the steps among them that were verified (audit or `always`), rising."""
    flips_examined: np.ndarray
    """Those of the flips among the examined, rising."""


@dataclass(frozen=True)
class Outcome:
    """What a threshold would have done."""

    steps: int
    triggered: int
    flips: int
    missed: int
    """Known flips above the threshold."""
    miss_upper: float
    """Upper bound at 95% of missed flips per step of any kind; 1.0 where nothing above the threshold was verified."""
    complete: bool
    """Whether every step above the threshold was verified, so that ``missed`` is the exact count."""


def make_sample(
    margin: np.ndarray,
    flipped: np.ndarray,
    triggered: np.ndarray,
    verified: np.ndarray,
    decode: np.ndarray,
    structural: np.ndarray,
) -> Sample:
    """Sort a run's decode steps; a margin that is not a number triggers at any threshold, so it counts as 0."""
    margin = np.nan_to_num(margin[decode], nan=0.0)
    order = np.argsort(margin)  # once; every other array is a part of this one, in the same order
    margin, flipped, structural = margin[order], flipped[decode][order], structural[decode][order]
    beyond, verified = ~triggered[decode][order], verified[decode][order]

    def gated(keep: np.ndarray) -> np.ndarray:
        low = margin[keep & ~structural]
        return np.concatenate([low, np.full(int((keep & structural).sum()), np.inf, dtype=low.dtype)])

    every = np.ones(margin.size, dtype=bool)
    return Sample(
        margins=margin,
        gated=gated(every) if structural.any() else margin,
        gated_flips=gated(flipped),
        at_flips=margin[flipped],
        others=margin[~flipped],
        untriggered=gated(beyond),
        examined=gated(beyond & verified),
        flips_examined=gated(beyond & verified & flipped),
    )


def join(parts: list[Sample]) -> Sample:
    """Return several samples' steps as one."""
    if len(parts) == 1:
        return parts[0]
    # A stable sort merges what is sorted in parts.
    every = (np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Sample))
    return Sample(*(np.sort(values, kind="stable") for values in every))


def _above(values: np.ndarray, threshold: float) -> int:
    return int(values.size - np.searchsorted(values, threshold, side="right"))


def outcome(sample: Sample, threshold: float) -> Outcome:
    """Return what a threshold would have done.

    Steps that triggered in the run were all verified: their flips above ``threshold`` are counted. The others were
    verified by chance (audit) or all (`always`): Clopper-Pearson's bound of their flip rate, times their number, is
    added.
    """
    steps = sample.gated.size
    missed = _above(sample.gated_flips, threshold)
    examined, found = _above(sample.examined, threshold), _above(sample.flips_examined, threshold)
    hidden = _above(sample.untriggered, threshold)
    complete = examined == hidden
    if complete:
        bound = upper_95(missed, steps) if steps else 1.0
    else:
        counted = missed - found
        bound = min(1.0, (counted + upper_95(found, examined) * hidden) / steps) if examined else 1.0
    return Outcome(steps, steps - _above(sample.gated, threshold), sample.at_flips.size, missed, bound, complete)


def curve(sample: Sample, top: float, points: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return thresholds up to ``top``, trigger rates (0 to 1) and counts of known flips above, for drawing."""
    if sample.margins.size == 0:
        return np.zeros(0), np.zeros(0), np.zeros(0)
    taus = np.unique(np.concatenate([np.linspace(0, top, points), sample.at_flips[sample.at_flips <= top]]))
    rates = np.searchsorted(sample.gated, taus, side="right") / sample.gated.size
    left = sample.gated_flips.size - np.searchsorted(sample.gated_flips, taus, side="right")
    return taus, rates, left


def highest(sample: Sample, threshold: float) -> float:
    """Return the largest threshold worth drawing: beyond every known flip and the threshold in force."""
    flip = float(sample.at_flips[-1]) if sample.at_flips.size else 0.0
    low = float(np.quantile(sample.margins, 0.05)) if sample.margins.size else 0.25
    return max(1.5 * flip, 4 * threshold, low, 0.01)
