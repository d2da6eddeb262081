"""Figures of the Overview page: what happened when, how full the batch was, and what responses may claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import (
    LOG_AXIS,
    WHOLE,
    empty,
    extra,
    finish,
    on_row,
    safe,
    stacked,
    translucent,
)  # fmt: skip
from margingate_dashboard.states import CODE, as_bool
from margingate_dashboard.theme import FLIPPED, GUARANTEE_COLOURS, MISSED, REPAIRED, SERIES_COLOURS, TRIGGERED, WOULD


def over_time(steps: pd.DataFrame, bins: int = 72) -> pd.DataFrame:
    """Count decode steps, triggers, flips by state, and batch rows in equal spans of the run's time.

    Parameters
    ----------
    steps
        Step rows with time, prefill, state, triggered, batch_rows.
    bins
        Number of spans.

    Returns
    -------
    DataFrame
        One row a span: seconds (its middle, from the run's first step), steps, triggered, would, repaired, flipped,
        missed, rows_mean, rows_max (NaN where the span has no decode step).
    """
    decode = ~as_bool(steps["prefill"])
    times = steps["time"].to_numpy(dtype="datetime64[us]").astype(np.int64)[decode]
    if times.size == 0:
        return pd.DataFrame(
            columns=["seconds", "steps", "triggered", "would", "repaired", "flipped", "missed", "rows_mean", "rows_max"]
        )
    begin, span = times.min(), max(1, int(times.max() - times.min()))
    slot = np.minimum((times - begin) * bins // span, bins - 1)
    state = steps["state"].to_numpy()[decode]
    rows = steps["batch_rows"].fillna(0).to_numpy(dtype=np.float64)[decode]
    total = np.bincount(slot, minlength=bins)
    largest = np.full(bins, -np.inf)
    np.maximum.at(largest, slot, rows)
    low = steps["triggered"].to_numpy()[decode]
    would = state == CODE[WOULD.name]
    table = {
        "seconds": (np.arange(bins) + 0.5) * span / bins / 1e6,
        "steps": total,
        "triggered": np.bincount(slot[low & ~would], minlength=bins),
        "would": np.bincount(slot[would], minlength=bins),
    }
    for name in (REPAIRED.name, FLIPPED.name, MISSED.name):
        table[name] = np.bincount(slot[state == CODE[name]], minlength=bins)
    table["rows_mean"] = np.divide(
        np.bincount(slot, weights=rows, minlength=bins), total, out=np.full(bins, np.nan), where=total > 0
    )
    table["rows_max"] = np.where(total > 0, largest, np.nan)
    return pd.DataFrame(table)


def events(table: pd.DataFrame, subtitle: str = "") -> go.Figure:
    """Draw trigger rate, flips and batch rows over the run's time (from :func:`over_time`)."""
    title = "Triggers, flips and batch size over time"
    if table.empty:
        return empty(title, "No decode steps have been recorded yet.")
    traces: list[go.Scatter | go.Bar] = []
    for state, column in ((TRIGGERED, "triggered"), (WOULD, "would")):
        if column == "would" and not table[column].any():
            continue
        traces.append(
            go.Scatter(
                x=table["seconds"],
                y=100.0 * table[column] / table["steps"].where(table["steps"] > 0),
                name=f"{state.name} (share of decode steps)",
                mode="lines",
                line={"color": state.colour, "width": 2, "shape": "hvh"},
                fill="tozeroy",
                fillcolor=translucent(state.colour, 0.25),
                customdata=np.stack([table[column], table["steps"]], axis=-1),
                hovertemplate="%{x:.1f} s: %{y:.2f}% (%{customdata[0]:,} / %{customdata[1]:,} steps)"
                + extra(state.name),
            )
        )
    for state in (REPAIRED, FLIPPED, MISSED):
        if not table[state.name].any() and state is FLIPPED:
            continue
        traces.append(
            go.Bar(
                x=table["seconds"],
                y=table[state.name],
                name=state.name,
                marker_color=state.colour,
                customdata=table["steps"],
                hovertemplate="%{x:.1f} s: %{y:,} of %{customdata:,} steps<extra>" + state.name + "</extra>",
                **on_row(2),
            )
        )
    for column, words, short, digits, line in (
        ("rows_max", "batch rows, largest", "largest batch", 0, {"width": 1, "dash": "dot"}),
        ("rows_mean", "batch rows, mean over steps", "mean batch", 1, {"width": 2}),
    ):
        traces.append(
            go.Scatter(
                x=table["seconds"],
                y=table[column],
                name=words,
                mode="lines",
                line={"color": SERIES_COLOURS[0], "shape": "hvh", **line},
                hovertemplate=f"%{{x:.1f}} s: %{{y:.{digits}f}} rows<extra>{short}</extra>",
                **on_row(3),
            )
        )
    tallest = int(table[[REPAIRED.name, FLIPPED.name, MISSED.name]].sum(axis=1).max())
    few = {"range": [0, max(1, tallest) * 1.05], "dtick": 1} if tallest < 5 else {}
    more = {
        "barmode": "stack",
        "hovermode": "x unified",
        "bargap": 0.05,
        "yaxis": {"title": {"text": "triggered, %"}},
        "yaxis2": {"title": {"text": "flips"}, **few},
        "yaxis3": {"title": {"text": "rows"}},
        "xaxis3": {"title": {"text": "seconds since the run's first decode step"}},
    }
    fig = go.Figure(traces, stacked(3, 0.075, (0.38, 0.34, 0.28)))
    return finish(fig, title, height=520, subtitle=subtitle, width=WHOLE, y={"rangemode": "tozero"}, more=more)


def so_far(table: pd.DataFrame, policy: str, subtitle: str = "") -> go.Figure:
    """Draw a policy's overhead and the bound of its missed flips, each of all that had happened up to a moment.

    Parameters
    ----------
    table
        From :func:`margingate_dashboard.facts.course.so_far`.
    policy
        Whose traffic.
    """
    title = f"Policy {safe(policy)}, so far"
    rows = [
        ("overhead", "overhead, %", SERIES_COLOURS[0], "requests", "overhead %{y:.2f}% of %{customdata[0]:,} requests"),
        ("bound", "missed at most, %", MISSED.colour, "examined", "at most %{y:.4g}% of untriggered steps (95%), "
         "%{customdata[1]:,} / %{customdata[0]:,} audited flipped"),
    ]  # fmt: skip
    rows = [row for row in rows if row[0] in table and table[row[0]].notna().any()]
    if not rows:
        return empty(title, "Appears with the first finished request.")
    traces = []
    more: dict[str, Any] = {}
    for at, (name, axis, colour, count, hover) in enumerate(rows, 1):
        traces.append(
            go.Scatter(
                x=table["seconds"], y=table[name], name=axis.removesuffix(", %"), mode="lines",
                line={"color": colour, "width": 2, "shape": "hv"},
                customdata=np.stack([table[count], table["above"]], axis=-1), hovertemplate="%{x:.1f} s: " + hover + extra(""),
                **on_row(at),
            )
        )  # fmt: skip
        more["yaxis" if at == 1 else f"yaxis{at}"] = {"title": {"text": axis}, "rangemode": "tozero"}
    # The first audited steps bound nothing: all of it would be one steep line.
    bound = table["bound"].dropna() if "bound" in table else pd.Series(dtype=float)
    if len(rows) == 2 and len(bound) and bound.max() > 8 * bound.iloc[-1]:
        more["yaxis2"] |= {"rangemode": "normal", **LOG_AXIS}
    more["xaxis" if len(rows) == 1 else f"xaxis{len(rows)}"] = {"title": {"text": "seconds since the run's first step"}}
    fig = go.Figure(traces, stacked(len(rows), 0.1))
    height, x = 150 + 140 * len(rows), {"rangemode": "tozero"}
    return finish(fig, title, height=height, subtitle=subtitle, width=WHOLE, legend=False, x=x, more=more)


def guarantees(requests: pd.DataFrame, subtitle: str = "") -> go.Figure:
    """Draw how many finished requests may claim each guarantee."""
    title = "Guarantee of finished requests"
    total = len(requests)
    if not total:
        return empty(title, "No request has finished yet.", height=190)
    found = requests["guarantee"].astype("string").fillna("none").value_counts()
    traces = []
    names = [*GUARANTEE_COLOURS, *(n for n in found.index if n not in GUARANTEE_COLOURS)]
    for name in names:
        part = int(found.get(name, 0))
        if not part:
            continue
        traces.append(
            go.Bar(
                y=[""],
                x=[part],
                name=f"{safe(name)} {part:,} / {total:,}",
                orientation="h",
                marker_color=GUARANTEE_COLOURS.get(name, "#8C96A3"),
                hovertemplate=f"{safe(name)}: {part:,} / {total:,} requests ({part / total:.1%})<extra></extra>",
            )
        )
    more = {"barmode": "stack", "bargap": 0, "margin": {"l": 12, "b": 46}}
    x, y = {"range": [0, total], "visible": False}, {"visible": False}
    return finish(go.Figure(traces), title, height=150, subtitle=subtitle, width=WHOLE, x=x, y=y, more=more)
