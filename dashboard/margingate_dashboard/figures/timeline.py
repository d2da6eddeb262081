"""Who ran with whom: each request as a bar over its decoding, in as few lanes as requests ran at once."""

from __future__ import annotations

import heapq

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.facts.policies import present
from margingate_dashboard.figures.common import WHOLE, empty, extra, finish, safe
from margingate_dashboard.theme import FLIPPED, policy_colour

SHOWN = 400
"""Requests drawn at once."""


def spans(steps: pd.DataFrame) -> pd.DataFrame:
    """Return when each request was decoded.

    Parameters
    ----------
    steps
        Step rows with request, request_id, policy, time, flip (bool).

    Returns
    -------
    DataFrame
        request, request_id, policy, begin and end (seconds since the run's first step), steps, flips and lane, in order of
        their beginning. Requests in one lane did not overlap.
    """
    if steps.empty:
        return pd.DataFrame(columns=["request", "request_id", "policy", "begin", "end", "steps", "flips", "lane"])
    micros = steps["time"].to_numpy(dtype="datetime64[us]").astype(np.int64)
    codes, numbers = pd.factorize(steps["request"], use_na_sentinel=False)
    count = len(numbers)
    begin, end = np.full(count, np.iinfo(np.int64).max), np.full(count, np.iinfo(np.int64).min)
    np.minimum.at(begin, codes, micros)
    np.maximum.at(end, codes, micros)
    first = np.zeros(count, dtype=np.int64)
    first[codes[::-1]] = np.arange(codes.size)[::-1]
    table = pd.DataFrame(
        {
            "request": numbers,
            "request_id": steps["request_id"].iloc[first].astype(str).to_numpy(),
            "policy": steps["policy"].iloc[first].astype(str).to_numpy(),
            "begin": (begin - micros.min()) / 1e6,
            "end": (end - micros.min()) / 1e6,
            "steps": np.bincount(codes, minlength=count),
            "flips": np.bincount(codes[steps["flip"].to_numpy(dtype=bool)], minlength=count),
        }
    ).sort_values(["begin", "request"], kind="stable", ignore_index=True)
    table["lane"] = _lanes(table["begin"].tolist(), table["end"].tolist())
    return table


def _lanes(begins: list[float], ends: list[float]) -> list[int]:
    """Give each span, in order of its beginning, the lowest lane that is free."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    lanes, most = [], 0
    for begin, end in zip(begins, ends):
        while busy and busy[0][0] < begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane, most = most, most + 1
        heapq.heappush(busy, (end, lane))
        lanes.append(lane)
    return lanes


def timeline(table: pd.DataFrame, start: int = 0, subtitle: str = "") -> go.Figure:
    """Draw the requests from the ``start``-th on (from :func:`spans`), one colour per policy."""
    title = "Batch timeline: who ran with whom"
    shown = table.iloc[start : start + SHOWN]
    if shown.empty:
        return empty(title, "No step has been recorded yet.")
    traces: list[go.Scatter | go.Bar] = []
    for policy in present(shown["policy"]):
        mine = shown[shown["policy"] == policy]
        traces.append(
            go.Bar(
                y=mine["lane"],
                x=np.maximum(mine["end"] - mine["begin"], 1e-4),
                base=mine["begin"],
                orientation="h",
                name=safe(policy),
                marker={"color": policy_colour(policy), "line": {"width": 0.5, "color": "rgba(20,24,28,0.5)"}},
                customdata=np.stack(
                    [mine["request"], mine["request_id"].map(safe), mine["steps"], mine["flips"], mine["end"]], axis=-1
                ),
                hovertemplate="request %{customdata[0]} (%{customdata[1]})<br>%{base:.3f} to %{customdata[4]:.3f} s, "
                "%{customdata[2]:,} steps, %{customdata[3]:,} flips" + extra(safe(policy)),
            )
        )
    flips = shown[shown["flips"] > 0]
    if len(flips):
        traces.append(
            go.Scatter(
                x=flips["begin"], y=flips["lane"], mode="markers", name="has a flip",
                # Outlined, as it lies on bars of any colour.
                marker={"symbol": "diamond", "color": FLIPPED.colour, "size": 10, "line": {"width": 2, "color": "#101418"}},
                hoverinfo="skip",
            )
        )  # fmt: skip
    lanes = int(shown["lane"].max()) + 1
    x, y = (
        {"title": "seconds since the run's first step"},
        {"title": "requests at once", "autorange": "reversed", "showgrid": False},
    )
    height, more = 190 + min(24 * lanes, 460), {"barmode": "overlay"}
    return finish(go.Figure(traces), title, height=height, subtitle=subtitle, width=WHOLE, x=x, y=y, more=more)
