"""Figures of the Flips page: at which steps flips happen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import empty, finish
from margingate_dashboard.rates import of, upper_95
from margingate_dashboard.states import CODE
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED

FLIP_STATES = (REPAIRED, FLIPPED, MISSED)


def by_bucket(bucket: np.ndarray, state: np.ndarray, labels: Sequence[str]) -> pd.DataFrame:
    """Count steps and flips in each bucket.

    Parameters
    ----------
    bucket
        Bucket of each step, an index into ``labels``.
    state
        State code of each step.
    labels
        Names of the buckets, in order.

    Returns
    -------
    DataFrame
        label, steps, one column per flip state, flips, rate and its 95% upper bound; buckets without steps left out.
    """
    table: dict[str, object] = {"label": list(labels), "steps": np.bincount(bucket, minlength=len(labels))}
    for look in FLIP_STATES:
        table[look.name] = np.bincount(bucket[state == CODE[look.name]], minlength=len(labels))
    frame = pd.DataFrame(table)
    frame["flips"] = frame[[look.name for look in FLIP_STATES]].sum(axis=1)
    frame = frame[frame["steps"] > 0].reset_index(drop=True)
    frame["rate"] = frame["flips"] / frame["steps"]
    frame["upper_95"] = [upper_95(f, n) for f, n in zip(frame["flips"], frame["steps"])]
    return frame


def ranges(values: np.ndarray, count: int = 10) -> tuple[np.ndarray, list[str]]:
    """Cut whole numbers into at most ``count`` ranges of about equal size; return each value's range and its label."""
    if values.size == 0:
        return np.zeros(0, dtype=np.int64), []
    # Counting is faster than sorting: these are steps and batch rows, whole numbers of moderate size.
    values = np.maximum(values, 0)
    tally = np.bincount(values)
    distinct = np.flatnonzero(tally)
    if distinct.size <= count:
        starts = distinct
        labels = [f"{v}" for v in distinct]
    else:
        shares = np.cumsum(tally) / values.size
        starts = np.unique(np.concatenate([distinct[:1], np.searchsorted(shares, np.arange(1, count) / count) + 1]))
        starts = starts[starts <= distinct[-1]]
        ends = np.append(starts[1:], distinct[-1] + 1)
        labels = [f"{a}" if b - 1 == a else f"{a}–{b - 1}" for a, b in zip(starts, ends)]
    which = np.searchsorted(starts, np.arange(tally.size), side="right") - 1
    return which[values], labels


def bars(table: pd.DataFrame, title: str, subtitle: str = "") -> go.Figure:
    """Draw flips per 1,000 steps in each bucket, with numerator and denominator on each bar."""
    if table.empty or not table["flips"].sum():
        return empty(
            title, "No flip has been confirmed." if len(table) else "No decode steps have been recorded.", height=260
        )
    # Lying bars: each has a line of its own for its name and its counts, however narrow the page is.
    names = [str(label) for label in table["label"]]
    traces: list[go.Scatter | go.Bar] = []
    for look in FLIP_STATES:
        if not table[look.name].any():
            continue
        traces.append(
            go.Bar(
                y=names,
                x=1000.0 * table[look.name] / table["steps"],
                name=look.name,
                orientation="h",
                marker_color=look.colour,
                customdata=np.stack([table[look.name], table["steps"], 1000 * table["upper_95"]], axis=-1),
                hovertemplate="%{y}: %{customdata[0]:,} / %{customdata[1]:,} steps"
                "<br>confirmed flips: at most %{customdata[2]:.3g} per 1,000 (95%)<extra>" + look.name + "</extra>",
            )
        )
    traces.append(
        go.Scatter(
            y=names,
            x=1000.0 * table["rate"],
            mode="text",
            showlegend=False,
            hoverinfo="skip",
            cliponaxis=False,
            text=[f" {of(f, n)}" for f, n in zip(table["flips"], table["steps"])],
            textposition="middle right",
            textfont={"size": 11},
        )
    )
    order = {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": names,
        "autorange": "reversed",
        "showgrid": False,
    }
    return finish(
        go.Figure(traces),
        title,
        height=390,  # all of a pair alike
        subtitle=subtitle,
        x={"title": "flips per 1,000 steps", "range": [0, 1000.0 * float(table["rate"].max()) * 1.45]},
        y={"tickfont": {"size": 11}, **order},
        more={"barmode": "stack", "margin": {"l": 22 + int(6.4 * max(map(len, names)))}},
    )
