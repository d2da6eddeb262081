"""A run so far: what verifying has cost and what may have been missed, as they stood at each moment of it; its newest flips."""

from __future__ import annotations

import numpy as np
import pandas as pd

from margingate_dashboard import tokens
from margingate_dashboard.rates import upper_95
from margingate_dashboard.states import as_bool
from margingate_dashboard.tables import FLIP_CODES
from margingate_dashboard.theme import STATES

STEP_COLUMNS = ("prefill", "time", "policy", "examined", "above")
"""Step columns that :func:`so_far` reads."""
REQUEST_COLUMNS = ("policy", "time", "overhead_ms", "e2e_ms")
"""Request columns that :func:`so_far` reads."""
TICKER = 8
"""Newest flips shown."""
TICKER_COLUMNS = (
    "request", "request_id", "dataset", "policy", "step", "time", "margin", "threshold", "fast_token", "verify_token", "token",
    "token_text", "batch_rows", "state", "prefill",
)  # fmt: skip


def micros(times: pd.Series) -> np.ndarray:
    """Return times as microseconds since the epoch."""
    return times.to_numpy(dtype="datetime64[us]").astype(np.int64)


def so_far(steps: pd.DataFrame, requests: pd.DataFrame, policy: str, points: int = 72) -> pd.DataFrame:
    """Return the overhead and the bound of one policy's traffic, each from all that had happened up to a moment.

    Parameters
    ----------
    steps, requests
        With :data:`STEP_COLUMNS` and :data:`REQUEST_COLUMNS`.
    policy
        Whose traffic.
    points
        Moments, evenly apart from the run's first step to its last event.

    Returns
    -------
    DataFrame
        seconds (since the run's first step), requests, overhead (%; null before the first request ended), examined, above and
        bound (%; null before the first audited step, and of policies other than gate).
    """
    decode = ~as_bool(steps["prefill"]) & (steps["policy"] == policy).to_numpy()
    mine = requests[(requests["policy"] == policy).to_numpy()]
    columns = ["seconds", "requests", "overhead", "examined", "above", "bound"]
    if not decode.any():
        return pd.DataFrame(columns=columns)
    began = int(micros(steps["time"]).min())
    at = micros(steps["time"][decode])
    took = mine["e2e_ms"].fillna(0).to_numpy(dtype=np.float64)
    ended = micros(mine["time"]) + (1000 * took).astype(np.int64)
    last = max(int(at.max()), int(ended.max(initial=0)))
    edges = np.linspace(began, last, points + 1)[1:]
    edges[-1] = last  # the last point is of everything
    order = np.argsort(ended, kind="stable")
    done = np.searchsorted(ended[order], edges, side="right")
    added = np.append(0.0, np.cumsum(mine["overhead_ms"].fillna(0).to_numpy(dtype=np.float64)[order]))[done]
    whole = np.append(0.0, np.cumsum(took[order]))[done]
    counted = {}
    for name in ("examined", "above"):
        # What lies above a threshold bounds gate traffic alone.
        times = at[steps[name].to_numpy(dtype=bool)[decode]] if policy == "gate" else at[:0]
        counted[name] = np.searchsorted(np.sort(times), edges, side="right")
    bounds = [100 * upper_95(int(k), int(n)) if n else np.nan for k, n in zip(counted["above"], counted["examined"])]
    overhead = np.divide(100 * added, whole, out=np.full(points, np.nan), where=whole > 0)
    return pd.DataFrame(
        {"seconds": (edges - began) / 1e6, "requests": done, "overhead": overhead, **counted, "bound": bounds}
    )[columns]


def newest_flips(steps: pd.DataFrame, known: dict[int, str], most: int = TICKER) -> pd.DataFrame:
    """Return the newest confirmed flips of decode steps, newest first (``steps`` with :data:`TICKER_COLUMNS`)."""
    found = steps[np.isin(steps["state"].to_numpy(), FLIP_CODES) & ~as_bool(steps["prefill"])]
    found = found.sort_values(["time", "request"], ascending=[False, True], kind="stable").head(most)

    def named(ids: pd.Series) -> list[str]:
        return [tokens.plain(known.get(int(i)), int(i)) if pd.notna(i) else "–" for i in ids]

    return pd.DataFrame(
        {
            "number": found["request"].to_numpy(),
            "request": found["request_id"].astype(str).to_numpy(),
            "time": found["time"].to_numpy(),
            "dataset": found["dataset"].astype(str).to_numpy(),
            "policy": found["policy"].astype(str).to_numpy(),
            "step": found["step"].to_numpy(),
            "state": [STATES[s].name for s in found["state"]],
            "fast token": named(found["fast_token"]),
            "verify token": named(found["verify_token"]),
            "margin": found["margin"].to_numpy(),
            "batch rows": found["batch_rows"].to_numpy(),
        }
    )
