"""Numbers as this dashboard writes them: a rate never without numerator and denominator."""

from __future__ import annotations

import math

from sglang_margingate.gate.stats import binomial_upper, percent


def upper_95(events: int, trials: int) -> float:
    """Return the one-sided 95% Clopper-Pearson upper bound of a rate; 1.0 without trials."""
    return float(binomial_upper(events, trials))


def at_most(bound: float) -> str:
    """Return an upper bound as a percentage, rounded up so that it stays one."""
    return percent(min(bound, 1.0), up=True)


def number(value: object, default: float = math.nan) -> float:
    """Return a cell of a table as a number; ``default`` where it is null."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # None, pandas' NA
        return default
    return default if math.isnan(found) else found


def count(number: float) -> str:
    """Return a whole number with thousands separators."""
    return f"{int(number):,}"


def of(part: float, whole: float) -> str:
    """Return ``421 / 7,383``."""
    return f"{count(part)} / {count(whole)}"


def share(part: float, whole: float) -> str:
    """Return a percentage, or a dash where the whole is zero or a number is missing."""
    return percent(part / whole) if whole and math.isfinite(part / whole) else "–"


def rate(part: float, whole: float) -> str:
    """Return ``5.70% (421 / 7,383)``."""
    return f"{share(part, whole)} ({of(part, whole)})"


def milliseconds(value: float) -> str:
    """Return a time in ms, or in s from ten seconds on; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.1f} s"
    return f"{value:,.0f} ms" if abs(value) >= 100 else f"{value:,.1f} ms"
