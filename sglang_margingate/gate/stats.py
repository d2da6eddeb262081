"""Rates with their counts and exact binomial bounds, and the tail of the margins at flips.

Every rate that this project prints goes through :class:`Rate`, so that none is shown without its counts. The bounds are
Clopper and Pearson's (Biometrika 26, 1934): exact, hence never too narrow, and defined at zero events, where the upper
one is the *rule of three*: 0 of N means at most 3/N at 95% (more precisely ``1 - 0.05 ** (1 / N)``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from scipy.special import betaincinv  # scipy.stats takes a second to import, and the server imports this module

Array = np.ndarray[Any, np.dtype[Any]]

MIN_TAIL = 10
"""Fewer distinct steps in the tail than this are not fitted."""

ACCEPT_P = 0.05
"""A fit whose goodness-of-fit p-value is below this is shown, but nothing is based on it."""

_BOOTSTRAPS = 200


def binomial_upper(events: Any, trials: Any, confidence: float = 0.95) -> Array:
    """Return the exact one-sided upper bound of a binomial rate.

    Parameters
    ----------
    events, trials
        Counts, scalars or integer arrays that broadcast, ``0 <= events <= trials``.
    confidence
        Probability, in (0, 1), that the bound is at or above the true rate.

    Returns
    -------
    numpy.ndarray
        float64, in [0, 1]; 1 where there were no trials.
    """
    k, n = np.broadcast_arrays(np.asarray(events, float), np.asarray(trials, float))
    # max(): the arguments must be valid where the answer is replaced, too.
    return np.where(k >= n, 1.0, betaincinv(k + 1, np.maximum(n - k, 1), confidence))


def binomial_lower(events: Any, trials: Any, confidence: float = 0.95) -> Array:
    """Return the exact one-sided lower bound of a binomial rate (see :func:`binomial_upper`); 0 without events."""
    k, n = np.broadcast_arrays(np.asarray(events, float), np.asarray(trials, float))
    return np.where(k <= 0, 0.0, betaincinv(np.maximum(k, 1), n - k + 1, 1 - confidence))


def trials_needed(max_rate: float, confidence: float = 0.95) -> int:
    """Return how many trials without an event show that the rate is at most `max_rate` (about 3 / max_rate at 95%).

    Raises
    ------
    ValueError
        `max_rate` is not above 0: no number of trials shows that.
    """
    if not max_rate > 0:
        raise ValueError(f"no sample shows a rate of at most {max_rate}; give a rate above 0")
    return 1 if max_rate >= 1 else math.ceil(math.log(1 - confidence) / math.log1p(-max_rate))


@dataclass(frozen=True)
class Rate:
    """A rate that keeps its counts.

    Raises
    ------
    ValueError
        The counts are not whole numbers with ``0 <= numerator <= denominator``.
    """

    numerator: int
    denominator: int

    def __post_init__(self) -> None:
        try:
            k, n = index(self.numerator), index(self.denominator)
        except TypeError:
            raise ValueError(f"counts must be whole numbers, not {self.numerator!r}/{self.denominator!r}") from None
        if not 0 <= k <= n:
            raise ValueError(f"a rate needs 0 <= numerator <= denominator, not {k}/{n}")
        object.__setattr__(self, "numerator", k)  # NumPy integers become plain ones, which JSON knows
        object.__setattr__(self, "denominator", n)

    @property
    def value(self) -> float:
        """The observed rate; NaN where nothing was observed."""
        return self.numerator / self.denominator if self.denominator else math.nan

    def upper(self, confidence: float = 0.95) -> float:
        """Return the exact one-sided upper bound; 1 where nothing was observed."""
        return float(binomial_upper(self.numerator, self.denominator, confidence))

    def lower(self, confidence: float = 0.95) -> float:
        """Return the exact one-sided lower bound; 0 where nothing was observed."""
        return float(binomial_lower(self.numerator, self.denominator, confidence))

    def describe(self, confidence: float = 0.95) -> str:
        """Return ``12/4,000 (0.30%, at most 0.49% at 95%)``; the bound is rounded up, so that it stays one."""
        counts = f"{self.numerator:,}/{self.denominator:,}"
        if not self.denominator:
            return f"{counts} (nothing observed)"
        bound = percent(self.upper(confidence), up=True)
        return f"{counts} ({percent(self.value)}, at most {bound} at {100 * confidence:g}%)"

    def __str__(self) -> str:
        return self.describe()


def percent(share: float, *, up: bool = False) -> str:
    """Return a share as a percentage: two decimals, more where it takes more to show two digits; `up` rounds up."""
    value = 100 * share
    if value == 0:
        return "0%"
    decimals = max(2, 1 - math.floor(math.log10(abs(value))))
    if up:
        # The small term keeps 0.3 from becoming 0.31 by the noise of its last bit.
        value = math.ceil(value * 10**decimals - 1e-9) / 10**decimals
    return f"{value:.{decimals}f}%"


@dataclass(frozen=True)
class TailFit:
    """A distribution fitted to the margins at flips, above `start`."""

    family: str
    """exponential or generalized Pareto."""
    shape: float
    """xi: 0 for the exponential; above 0 a heavier tail, below 0 a bounded one."""
    scale: float
    """In logits."""
    start: float
    """Margins above this were fitted, in logits."""
    tail_flips: int
    """Flips above `start`."""
    ks: float
    """Kolmogorov-Smirnov distance of data and fit."""
    p_value: float
    """From a parametric bootstrap with refitting, on the data's own grid: the textbook p-value is far too kind where
    parameters were estimated and wrong where values are quantised."""
    threshold: float
    """In logits: keeps the miss rate at the target; without one, the value above which a second sample of this size
    has no flip, at the stated confidence (parameter uncertainty not included)."""

    @property
    def accepted(self) -> bool:
        """Whether the fit is good enough to base a choice on."""
        return self.p_value >= ACCEPT_P


def fit_tail(at_flips: Array, steps: int, target_miss: float = 0.0, confidence: float = 0.95) -> tuple[TailFit, ...]:
    """Fit an exponential and a generalized Pareto to the upper half of the margins at flips (all of them below 40).

    Parameters
    ----------
    at_flips
        Margins of the flips, in logits; ties (0) and what is not finite are not part of the tail.
    steps
        Steps of the sample that the flips come from.
    """
    positive = np.sort(at_flips[np.isfinite(at_flips) & (at_flips > 0)])
    # A value of the data, so that quantised excesses stay on their grid.
    start = float(np.quantile(positive, 0.5, method="lower")) if positive.size >= 40 else 0.0
    excess = positive[positive > start] - start
    if excess.size < MIN_TAIL or np.unique(excess).size < 3:
        return ()
    # Share of fitted excesses that may lie above the threshold: -log(confidence) expected flips in a second sample.
    flips_allowed = target_miss * steps if target_miss > 0 else -math.log(confidence)
    share = flips_allowed / excess.size
    quantum = _quantum(excess)
    rng = np.random.default_rng(0)  # the same sample always gives the same report
    fits = []
    for family, estimate in (("exponential", _exponential), ("generalized Pareto", _pareto)):
        shape, scale = estimate(_spread(excess, quantum))
        ks = _distance(excess, shape, scale, quantum)
        worse = 0
        for _ in range(_BOOTSTRAPS):
            fake = _quantile(rng.random(excess.size), shape, scale)
            fake = np.sort(np.ceil(fake / quantum) * quantum if quantum else fake)
            worse += _distance(fake, *estimate(_spread(fake, quantum)), quantum) >= ks
        tau = start + float(_quantile(share, shape, scale)) if share < 1 else start
        p = (1 + worse) / (1 + _BOOTSTRAPS)
        fits.append(TailFit(family, shape, scale, start, int(excess.size), ks, p, tau))
    return tuple(fits)


def _quantum(values: Array) -> float:
    """Return the grid of quantised values (bf16 logits differ by powers of two), or 0 where few values repeat."""
    distinct = np.unique(values)
    if distinct.size > 0.8 * values.size:
        return 0.0
    return float(np.median(np.diff(distinct, prepend=0.0)))


def _exponential(x: Array) -> tuple[float, float]:
    return 0.0, float(max(x.mean(), 1e-12))


def _pareto(x: Array) -> tuple[float, float]:
    """Fit by probability-weighted moments (Hosking and Wallis, Technometrics 29, 1987); `x` is sorted.

    Closed form, steadier than maximum likelihood on small samples, and fast enough to bootstrap.
    """
    p = (np.arange(1, x.size + 1) - 0.35) / x.size
    a0, a1 = float(x.mean()), float(((1 - p) * x).mean())
    gap = max(a0 - 2 * a1, 1e-12)
    return 2 - a0 / gap, max(2 * a0 * a1 / gap, 1e-12)


def _spread(x: Array, quantum: float) -> Array:
    """Spread sorted values that were rounded up to a grid evenly over their cells, so that estimates are unbiased."""
    if not quantum:
        return x
    _, first, counts = np.unique(x, return_index=True, return_counts=True)
    rank = np.arange(x.size) - np.repeat(first, counts)
    return x - quantum * (1 - (rank + 0.5) / np.repeat(counts, counts))


def _survival(x: Array, shape: float, scale: float) -> Array:
    """Return the share of the generalized Pareto above `x` (the exponential at shape 0)."""
    if abs(shape) < 1e-9:
        return np.exp(-x / scale)
    return np.maximum(1 + shape * x / scale, 0.0) ** (-1 / shape)


def _quantile(survival: Any, shape: float, scale: float) -> Any:
    """Return the excess above which a share `survival` lies."""
    if abs(shape) < 1e-9:
        return -scale * np.log(survival)
    return scale * np.expm1(-shape * np.log(survival)) / shape


def _distance(x: Array, shape: float, scale: float, quantum: float) -> float:
    """Return the Kolmogorov-Smirnov distance of sorted `x`; on a grid it is taken at grid points only.

    A value rounded up to a grid point says no more than that it lay below it, so only there do both CDFs compare.
    """
    if quantum:
        points, counts = np.unique(x, return_counts=True)
        cdf = 1 - _survival(points, shape, scale)
        return float(np.abs(np.cumsum(counts) / x.size - cdf).max())
    cdf = 1 - _survival(x, shape, scale)
    i = np.arange(1, x.size + 1)
    return float(max((i / x.size - cdf).max(), (cdf - (i - 1) / x.size).max()))
