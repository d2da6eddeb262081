"""What a threshold costs in time, from the verify times that the run measured; and the knee of price against risk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from margingate_dashboard.states import as_bool

STEP_COLUMNS = ("prefill", "step_ms", "verify_ms", "window_rows", "batch_rows", "verified")


@dataclass(frozen=True)
class Price:
    """What one decode step costs on this machine, as measured in this run."""

    fast_ms: float
    """Median time of a decode step without the verifies that it waited for."""
    rows: int
    """Median batch rows: that many tokens come out of a step."""
    base_ms: float
    """Of a verify, with a window of no columns."""
    column_ms: float
    """More for each column of the window; 0 where only one length was seen."""
    windows: tuple[int, int]
    """Shortest and longest window that was measured."""
    verifies: int
    """Verified steps behind it."""

    def verify_ms(self, window: float) -> float:
        """Return the time of a verify whose window is so long; beyond the longest measured one it is not extrapolated."""
        return self.base_ms + self.column_ms * min(max(window, self.windows[0]), self.windows[1])

    def predict(self, trigger_rate: float) -> Predicted:
        """Return what a step costs where this share of steps triggers.

        A step waits if any of its rows triggers, and a window is as long as the steps since the last verify.
        """
        share = min(max(trigger_rate, 0.0), 1.0)
        waits = 1.0 - (1.0 - share) ** self.rows
        added = waits * self.verify_ms(1.0 / share) if share else 0.0
        step = self.fast_ms + added
        return Predicted(step, added / step if step else math.nan, 1000.0 * self.rows / step if step else math.nan)


@dataclass(frozen=True)
class Predicted:
    """A prediction, at the run's median batch."""

    step_ms: float
    """Of a decode step, which is the time per token of a request."""
    overhead: float
    """Share of it that verifying adds."""
    tokens_per_second: float
    """Of the whole batch."""


def measure(steps: pd.DataFrame) -> Price | None:
    """Return what steps and verifies cost in a run (needs :data:`STEP_COLUMNS`); None where no verify was timed."""
    decode = ~as_bool(steps["prefill"])
    took = steps["step_ms"].to_numpy(dtype=np.float64)
    waited = np.nan_to_num(steps["verify_ms"].to_numpy(dtype=np.float64))
    window = steps["window_rows"].fillna(0).to_numpy(dtype=np.int64)
    timed = decode & np.isfinite(took)
    paid = timed & steps["verified"].to_numpy() & (waited > 0) & (window > 0)
    if not paid.any():
        return None
    medians = pd.Series(waited[paid]).groupby(window[paid]).agg(["median", "size"])
    lengths = medians.index.to_numpy(dtype=np.float64)
    if len(medians) > 1:
        slope, base = np.polyfit(lengths, medians["median"].to_numpy(), 1, w=np.sqrt(medians["size"].to_numpy()))
        slope, base = (float(slope), float(base)) if slope > 0 else (0.0, float(np.median(waited[paid])))
    else:
        slope, base = 0.0, float(medians["median"].iloc[0])
    rows = steps["batch_rows"].fillna(0).to_numpy(dtype=np.int64)[timed]
    return Price(
        fast_ms=float(np.median((took - waited)[timed])),
        rows=max(1, int(np.median(rows))),
        base_ms=base,
        column_ms=slope,
        windows=(int(lengths.min()), int(lengths.max())),
        verifies=int(paid.sum()),
    )


def knee(price: Sequence[float], risk: Sequence[float]) -> int:
    """Return the index of the point furthest below the line from the dearest point to the riskiest one.

    Parameters
    ----------
    price
        Falling from the strictest choice to the laxest.
    risk
        Rising; compared by its logarithm.
    """
    x, y = np.asarray(price, dtype=np.float64), np.log10(np.maximum(np.asarray(risk, dtype=np.float64), 1e-12))
    if x.size < 3 or x.max() == x.min() or y.max() == y.min():
        return 0
    x, y = (x - x.min()) / (x.max() - x.min()), (y - y.min()) / (y.max() - y.min())
    return int(np.argmin(x + y))
