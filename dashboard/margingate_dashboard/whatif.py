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
    own: np.ndarray
    """Margins, as a threshold sees them, of the steps of the one policy that the bound is of, rising."""
    own_flips: np.ndarray
    """Those of its known flips."""
    hidden: np.ndarray
    """Those of its steps that nobody verified: whether they would have flipped is not known."""
    examined: np.ndarray
    """Those of its untriggered steps that the audit or `always` verified: the sample that tells of the hidden ones."""
    flips_examined: np.ndarray
    """Those of the flips among the examined."""


@dataclass(frozen=True)
class Outcome:
    """What a threshold would have done."""

    steps: int
    triggered: int
    flips: int
    missed: int
    """Known flips above the threshold."""
    miss_upper: float
    """Upper bound at 95% of missed flips per step of the one policy; 1.0 where no step of it tells of those never looked at."""
    complete: bool
    """Whether every step of that policy above the threshold was verified, so that its missed flips are all known."""


def make_sample(
    margin: np.ndarray,
    flipped: np.ndarray,
    verified: np.ndarray,
    examined: np.ndarray,
    decode: np.ndarray,
    structural: np.ndarray,
    own: np.ndarray,
) -> Sample:
    """Sort a run's decode steps; a margin that is not a number triggers at any threshold, so it counts as 0.

    Parameters
    ----------
    margin, flipped, verified, decode, structural
        Of each step of the run.
    examined
        Which steps a missed flip could be seen at (:func:`margingate_dashboard.states.examined`).
    own
        Which steps belong to the policy that the bound is of: the audit of one policy's traffic says nothing of another's,
        whose batches are others.
    """
    margin = np.nan_to_num(margin[decode], nan=0.0)
    order = np.argsort(margin)  # once; every other array is a part of this one, in the same order
    margin, flipped, structural = margin[order], flipped[decode][order], structural[decode][order]
    verified, examined, own = verified[decode][order], (examined & own)[decode][order], own[decode][order]

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
        own=gated(own),
        own_flips=gated(own & flipped),
        hidden=gated(own & ~verified),
        examined=gated(examined),
        flips_examined=gated(examined & flipped),
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

    Known flips are counted over all steps. The bound is of one policy's: flips of its steps that were verified for their
    margin are counted; of those that were not, chance verified some (audit), and Clopper-Pearson's bound of their flip rate,
    times the number of both, is added.
    """
    steps, own = sample.gated.size, sample.own.size
    missed, mine = _above(sample.gated_flips, threshold), _above(sample.own_flips, threshold)
    examined, found = _above(sample.examined, threshold), _above(sample.flips_examined, threshold)
    hidden = _above(sample.hidden, threshold)
    if not hidden:
        bound = upper_95(mine, own) if own else 1.0
    else:
        bound = min(1.0, (mine - found + upper_95(found, examined) * (examined + hidden)) / own) if examined else 1.0
    return Outcome(steps, steps - _above(sample.gated, threshold), sample.at_flips.size, missed, bound, not hidden)


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
