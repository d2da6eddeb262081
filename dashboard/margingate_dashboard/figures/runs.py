"""The figures of the Runs page: what each run paid for what it verified, and runs over time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import empty, extra, finish, on_row, safe, stacked
from margingate_dashboard.theme import SERIES_COLOURS, TRIGGERED, policy_colour

SHOWN = 16
"""Newest runs in the figure; the table has all."""
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up")
"""Of models, in a figure whose colours are policies."""
LONGEST = 26
"""Signs of a run's name on an axis."""


def short(name: object) -> str:
    """Return a run's name for an axis: its beginning and its end tell it, and the axis keeps its width."""
    text = str(name)
    return safe(text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}…{text[-8:]}")


def price(runs: pd.DataFrame) -> dict[str, go.Figure]:
    """Draw, run by run, the share of decode steps that were verified, and the overhead that this cost: two figures.

    Names stand above their bars, so that a bar has the whole width, on a phone as well.

    Parameters
    ----------
    runs
        The table of the Runs page: run, rates of, decode steps, verified, overhead (%), flips; newest first.
    """
    titles = {"verified": "What each run verified", "overhead": "What each run paid"}
    known = runs[runs["overhead"].notna() & (runs["decode steps"] > 0)].head(SHOWN)
    if known.empty:
        return {name: empty(title, "Appears with the first finished request.") for name, title in titles.items()}
    labels = [f"{short(run)} · {safe(policy)}" for run, policy in zip(known["run"], known["rates of"])]
    flips = ["flips cannot be seen" if pd.isna(n) else f"{int(n):,} flips" for n in known["flips"]]
    counts = np.stack([known["verified"], known["decode steps"], np.array(flips, dtype=object)], axis=-1)
    found = {}
    for name, values, colour, axis, hover in (
        ("verified", 100 * known["verified"] / known["decode steps"], TRIGGERED.colour, "verified, % of decode steps",
         "%{customdata[0]:,} / %{customdata[1]:,} steps verified, %{customdata[2]}"),
        ("overhead", known["overhead"], SERIES_COLOURS[0], "overhead, % of end-to-end time",
         "overhead %{x:.2f}% of end-to-end time"),
    ):  # fmt: skip
        most = float(values.max())
        fig = go.Figure(
            go.Bar(
                x=values, y=list(range(len(known))), orientation="h", offset=0.05, width=0.42, marker_color=colour,
                text=[f"{v:.2f}%" for v in values], textposition="outside", cliponaxis=False, customdata=counts,
                hovertext=labels, hovertemplate="%{hovertext}<br>" + hover + extra(""),
            )
        )  # fmt: skip
        place = {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 12},
        }
        above = [{"text": label, "y": at, **place} for at, label in enumerate(labels)]
        x = {"title": axis, "range": [0, 1.22 * most if most > 0 else 1]}
        y = {"range": [len(known) - 0.3, -0.7], "visible": False}
        more = {"margin": {"l": 12}, "annotations": above}
        found[name] = finish(fig, titles[name], height=110 + 46 * len(known), legend=False, x=x, y=y, more=more)
    return found


def trend(runs: pd.DataFrame) -> go.Figure:
    """Draw trigger rate, flips per 1,000 verified steps and overhead of runs in the order of their making."""
    title = "Runs over time"
    known = runs[runs["created"].notna() & runs["decode steps"].fillna(0).gt(0)].sort_values("created", kind="stable")
    if len(known) < 2:
        return empty(title, "Appears with the second counted run.")
    rows = (
        ("trigger rate", known["trigger rate"], "triggered, %"),
        (
            "flips",
            1000 * known["flips"].astype(float) / known["verified"].where(known["verified"] > 0),
            "flips per 1,000",
        ),
        ("overhead", known["overhead"], "overhead, %"),
    )
    traces = []
    axes = {}
    models = list(dict.fromkeys(known["model"].astype(str)))
    groups = known["model"].astype(str) + " · " + known["rates of"].astype(str)
    for row, (_, values, axis) in enumerate(rows, 1):
        for name in dict.fromkeys(groups):
            mine = (groups == name).to_numpy()
            policy = str(known["rates of"][mine].iloc[0])
            symbol = SYMBOLS[models.index(str(known["model"][mine].iloc[0])) % len(SYMBOLS)]
            traces.append(
                go.Scatter(
                    x=known["created"][mine], y=values[mine], mode="lines+markers", name=safe(name), legendgroup=name,
                    showlegend=row == 1, line={"color": policy_colour(policy), "width": 1.5},
                    marker={"symbol": symbol, "size": 7}, cliponaxis=False,
                    customdata=[safe(r) for r in known["run"][mine]],
                    hovertemplate="%{customdata}: %{y:.3g}" + extra(safe(name)), **on_row(row),
                )
            )  # fmt: skip
        axes["yaxis" if row == 1 else f"yaxis{row}"] = {"title": {"text": axis}, "rangemode": "tozero"}
    return finish(go.Figure(traces, stacked(3, 0.06)), title, height=480, more=axes)
