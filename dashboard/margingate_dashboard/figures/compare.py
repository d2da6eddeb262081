"""Figures of the Compare page."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import WHOLE, empty, extra, finish
from margingate_dashboard.theme import dataset_look


def still_identical(table: pd.DataFrame, subtitle: str = "") -> go.Figure:
    """Draw how many matched requests have not diverged yet after each step, by dataset.

    Parameters
    ----------
    table
        From :func:`margingate_dashboard.align.divergences`, with ``dataset`` as shown.
    """
    title = "Requests still identical, by step"
    if table.empty:
        return empty(title, "No matched requests.")
    traces: list[go.Scatter | go.Bar] = []
    longest = int(table[["tokens_a", "tokens_b"]].max(axis=None))
    for name, rows in table.groupby("dataset", sort=True, observed=True):
        colour, dash = dataset_look(str(name))
        first = np.sort(rows["first"].dropna().to_numpy(dtype=np.int64))
        x = np.concatenate([[0], first, [longest]])
        y = np.concatenate([[len(rows)], len(rows) - 1 - np.arange(first.size), [len(rows) - first.size]])
        traces.append(
            go.Scatter(
                x=x,
                y=y / len(rows) * 100,
                name=f"{name} ({len(rows) - first.size:,} / {len(rows):,})",
                mode="lines",
                customdata=np.stack([y, np.full(y.size, len(rows))], axis=-1),
                line={
                    "shape": "hv",
                    "width": 2,
                    "color": colour,
                    "dash": dash,
                },
                hovertemplate="step %{x}: %{customdata[0]} / %{customdata[1]} identical" + extra(name),
            )
        )
    along = {"title": "step (output token)", "rangemode": "tozero"}
    up = {"title": "identical so far, %", "range": [0, 103]}
    return finish(go.Figure(traces), title, subtitle=subtitle, width=WHOLE, x=along, y=up)
