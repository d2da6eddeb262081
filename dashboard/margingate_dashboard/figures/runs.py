"""The figure of the Runs page: what each run paid for what it verified."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import empty, extra, finish, safe
from margingate_dashboard.theme import SERIES_COLOURS

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
LABELLED = 12
"""With more runs than this, names are in the hover only."""


def price(runs: pd.DataFrame) -> go.Figure:
    """Draw overhead against the share of decode steps that were verified, a mark per run, a colour and shape per policy.

    Parameters
    ----------
    runs
        The table of the Runs page: run, policy, decode steps, verified, overhead (%), flips.
    """
    title = "Overhead against verified steps, by run"
    known = runs[runs["overhead"].notna() & (runs["decode steps"] > 0)]
    if known.empty:
        return empty(title, "Appears with the first finished request.")
    fig = go.Figure()
    for index, (policy, rows) in enumerate(known.groupby("policy", sort=True)):
        names = [safe(name) for name in rows["run"]]
        fig.add_trace(
            go.Scatter(
                x=100 * rows["verified"] / rows["decode steps"],
                y=rows["overhead"],
                text=names if len(known) <= LABELLED else None,
                mode="markers+text" if len(known) <= LABELLED else "markers",
                textposition="top center",
                cliponaxis=False,
                name=safe(policy),
                marker={
                    "size": 13,
                    "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
                    "symbol": SYMBOLS[index % len(SYMBOLS)],
                },
                customdata=np.stack([names, rows["verified"], rows["decode steps"], rows["flips"]], axis=-1),
                hovertemplate="%{customdata[0]}: overhead %{y:.2f}%<br>%{customdata[1]:,} / %{customdata[2]:,} steps verified, "
                "%{customdata[3]} flips" + extra(safe(policy)),
            )
        )
    finish(fig, title, height=360)
    fig.update_xaxes(title_text="decode steps verified, %", rangemode="tozero")
    fig.update_yaxes(title_text="overhead, % of end-to-end time", rangemode="tozero")
    return fig
