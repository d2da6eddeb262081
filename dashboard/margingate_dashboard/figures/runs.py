"""The figure of the Runs page: what each run paid for what it verified."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from margingate_dashboard.figures.common import empty, extra, finish, safe
from margingate_dashboard.theme import SERIES_COLOURS, TRIGGERED, policy_colour

SHOWN = 16
"""Newest runs in the figure; the table has all."""
LONGEST = 26
"""Signs of a run's name on an axis."""


def short(name: object) -> str:
    """Return a run's name for an axis: its beginning and its end tell it, and the axis keeps its width."""
    text = str(name)
    return safe(text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}…{text[-8:]}")


def price(runs: pd.DataFrame) -> go.Figure:
    """Draw, run by run, the share of decode steps that were verified and the overhead that this cost.

    Parameters
    ----------
    runs
        The table of the Runs page: run, rates of, decode steps, verified, overhead (%), flips; newest first.
    """
    title = "What each run verified, and what it paid"
    known = runs[runs["overhead"].notna() & (runs["decode steps"] > 0)].head(SHOWN)
    if known.empty:
        return empty(title, "Appears with the first finished request.")
    names = [f"{short(run)} · {safe(policy)}" for run, policy in zip(known["run"], known["rates of"])]
    share = 100 * known["verified"] / known["decode steps"]
    fig = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    counts = np.stack([known["verified"], known["decode steps"], known["flips"]], axis=-1)
    for column, values, colour, what in (
        (1, share, TRIGGERED.colour, "%{customdata[0]:,} / %{customdata[1]:,} steps verified, %{customdata[2]} flips"),
        (2, known["overhead"], SERIES_COLOURS[0], "overhead %{x:.2f}% of end-to-end time"),
    ):
        fig.add_trace(
            go.Bar(
                x=values,
                y=names,
                orientation="h",
                marker_color=colour,
                text=[f"{v:.2f}%" for v in values],
                textposition="outside",
                cliponaxis=False,
                customdata=counts,
                hovertemplate="%{y}<br>" + what + extra(""),
            ),
            row=1,
            col=column,
        )
        most = float(values.max())
        fig.update_xaxes(range=[0, 1.18 * most if most > 0 else 1], row=1, col=column)
    finish(fig, title, height=120 + 34 * len(known), legend=False)
    fig.update_layout(bargap=0.35)
    fig.update_xaxes(title_text="verified, %", row=1, col=1)
    fig.update_xaxes(title_text="overhead, %", row=1, col=2)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False, automargin=True)
    return fig


def trend(runs: pd.DataFrame) -> go.Figure:
    """Draw trigger rate, flips per 1,000 verified steps and overhead of runs in the order of their making."""
    title = "Runs over time"
    known = runs[runs["created"].notna() & runs["decode steps"].fillna(0).gt(0)].sort_values("created", kind="stable")
    if len(known) < 2:
        return empty(title, "Appears with the second counted run.")
    rows = (
        ("trigger rate", known["trigger rate"], "triggered, %"),
        ("flips", 1000 * known["flips"] / known["verified"].where(known["verified"] > 0), "flips per 1,000 verified"),
        ("overhead", known["overhead"], "overhead, %"),
    )
    fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    groups = known["model"].astype(str) + " · " + known["rates of"].astype(str)
    for row, (_, values, axis) in enumerate(rows, 1):
        for name in dict.fromkeys(groups):
            mine = (groups == name).to_numpy()
            policy = str(known["rates of"][mine].iloc[0])
            fig.add_trace(
                go.Scatter(
                    x=known["created"][mine], y=values[mine], mode="lines+markers", name=safe(name), legendgroup=name,
                    showlegend=row == 1, line={"color": policy_colour(policy), "width": 1.5},
                    customdata=[safe(r) for r in known["run"][mine]],
                    hovertemplate="%{customdata}: %{y:.3g}" + extra(safe(name)),
                ),
                row=row, col=1,
            )  # fmt: skip
        fig.update_yaxes(title_text=axis, rangemode="tozero", row=row, col=1)
    return finish(fig, title, height=480)
