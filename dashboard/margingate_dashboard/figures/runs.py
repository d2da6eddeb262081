"""The figure of the Runs page: what each run paid for what it verified."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from margingate_dashboard.figures.common import empty, extra, finish, safe
from margingate_dashboard.theme import SERIES_COLOURS, TRIGGERED

SHOWN = 16
"""Newest runs in the figure; the table has all."""


def price(runs: pd.DataFrame) -> go.Figure:
    """Draw, run by run, the share of decode steps that were verified and the overhead that this cost.

    Parameters
    ----------
    runs
        The table of the Runs page: run, policy, decode steps, verified, overhead (%), flips; newest first.
    """
    title = "What each run verified, and what it paid"
    known = runs[runs["overhead"].notna() & (runs["decode steps"] > 0)].head(SHOWN)
    if known.empty:
        return empty(title, "Appears with the first finished request.")
    names = [f"{safe(run)} · {safe(policy)}" for run, policy in zip(known["run"], known["policy"])]
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
    fig.update_xaxes(title_text="decode steps verified, %", row=1, col=1)
    fig.update_xaxes(title_text="overhead, % of end-to-end time", row=1, col=2)
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False, automargin=True)
    return fig
