"""Figures of the Request page: margins step by step, and where the time went."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from margingate_dashboard.figures.common import empty, extra, finish, translucent
from margingate_dashboard.rates import number
from margingate_dashboard.theme import PART_COLOURS, SERIES_COLOURS, STATES, THRESHOLD_COLOUR


def margins(steps: pd.DataFrame, selected: int | None = None, log: bool = False, subtitle: str = "") -> go.Figure:
    """Draw a request's margins with the threshold, and the batch rows of each step below.

    Parameters
    ----------
    steps
        One request's steps with step, margin, threshold, state, batch_rows, shown (text of each token).
    selected
        Step to mark.
    log
        Logarithmic margins; exact ties are drawn at the bottom.
    """
    title = "Margin of each step"
    if steps.empty:
        return empty(title, "This request has no recorded steps.")
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.76, 0.24])
    margin = steps["margin"].to_numpy(dtype=float)
    positive = margin[margin > 0]
    floor = float(positive.min()) / 2 if positive.size else 1e-3
    drawn = np.where(margin > 0, margin, floor) if log else margin
    fig.add_trace(
        go.Scatter(
            x=steps["step"],
            y=drawn,
            mode="lines",
            line={"color": "rgba(128,134,145,0.45)", "width": 1},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=1,
        col=1,
    )
    state = steps["state"].to_numpy()
    for code, look in enumerate(STATES):
        mine = state == code
        if not mine.any():
            continue
        fig.add_trace(
            go.Scatter(
                x=steps["step"][mine],
                y=drawn[mine],
                mode="markers",
                name=f"{look.name} {int(mine.sum()):,} / {len(steps):,}",
                marker={
                    "color": look.colour,
                    "symbol": look.symbol,
                    "size": 5 if code == 0 else 9,
                    "line": {"width": 0 if code == 0 else 1, "color": "rgba(20,24,28,0.55)"},
                },
                customdata=np.stack([margin[mine], steps["shown"][mine]], axis=-1),
                hovertemplate="step %{x}: margin %{customdata[0]}<br>token %{customdata[1]}" + extra(look.name),
            ),
            row=1,
            col=1,
        )
    threshold = steps["threshold"].to_numpy(dtype=float)
    if np.isfinite(threshold).any():
        fig.add_trace(
            go.Scatter(
                x=steps["step"],
                y=threshold,
                mode="lines",
                name="threshold (tau)",
                line={"color": THRESHOLD_COLOUR, "width": 2, "dash": "dash", "shape": "hv"},
                hovertemplate="threshold %{y:.4g}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    fig.add_trace(
        go.Scatter(
            x=steps["step"],
            y=steps["batch_rows"],
            mode="lines",
            name="batch rows",
            showlegend=False,
            line={"color": SERIES_COLOURS[0], "width": 1.5, "shape": "hvh"},
            fill="tozeroy",
            fillcolor=translucent(SERIES_COLOURS[0], 0.18),
            hovertemplate="step %{x}: %{y} rows<extra>batch</extra>",
        ),
        row=2,
        col=1,
    )
    finish(fig, title, height=450, subtitle=subtitle, width=540)
    if selected is not None:
        fig.add_vline(x=selected, line={"color": THRESHOLD_COLOUR, "width": 1.5, "dash": "dot"})
    fig.update_yaxes(title_text="margin, logits", type="log" if log else "linear", rangemode="tozero", row=1, col=1)
    if log:
        fig.update_yaxes(dtick=1, row=1, col=1)
    most = float(np.nanmax(steps["batch_rows"].to_numpy(dtype=float, na_value=np.nan), initial=0.0))
    fig.update_yaxes(title_text="rows", rangemode="tozero", nticks=4, row=2, col=1)
    if most < 4:
        fig.update_yaxes(dtick=1, row=2, col=1)
    fig.update_xaxes(title_text="step (output token)", row=2, col=1)
    return fig


def latency_parts(request: pd.Series) -> dict[str, float]:
    """Split a request's end-to-end time in ms into queue, prefill, decode, verify and hold, which sum to it.

    ``queue`` is what time to first token leaves after the prefill; ``decode`` is what the whole leaves after all else,
    because step times of the batch are not this request's alone.
    """

    def value(name: str) -> float:
        return number(request.get(name), 0.0)

    whole = value("e2e_ms")
    prefill = min(value("prefill_ms"), whole)
    queue = min(max(0.0, value("ttft_ms") - prefill), whole - prefill)
    verify = min(value("verify_ms"), whole - prefill - queue)
    hold = min(value("hold_ms"), whole - prefill - queue - verify)
    decode = whole - prefill - queue - verify - hold
    return {"queue": queue, "prefill": prefill, "decode": decode, "verify": verify, "hold": hold}


def waterfall(request: pd.Series, subtitle: str = "") -> go.Figure:
    """Draw where the request's time went, each part beginning where the one before ended."""
    parts = latency_parts(request)
    whole = sum(parts.values())
    title = "Where the time went"
    if whole <= 0:
        return empty(title, "Times appear when the request has finished.")
    names = [*parts, "total"]
    starts = np.concatenate([[0.0], np.cumsum(list(parts.values()))[:-1], [0.0]])
    widths = [*parts.values(), whole]
    labels = [f"{width:,.1f} ms · {width / whole:.1%}" for width in widths]
    # A label goes beside its bar on the side with room.
    inside = [start + width > 0.62 * whole and width > 0.3 * whole for start, width in zip(starts, widths)]
    fig = go.Figure(
        go.Bar(
            y=names,
            x=widths,
            base=starts,
            orientation="h",
            text=labels,
            cliponaxis=False,
            textposition=["inside" if i else "outside" for i in inside],
            insidetextanchor="middle",
            insidetextfont={"color": "#101418"},
            marker_color=[*(PART_COLOURS[name] for name in parts), "#A3ABB6"],
            customdata=starts,
            hovertemplate="%{y}: %{x:.1f} ms from %{customdata:.1f} ms<extra></extra>",
        )
    )
    finish(fig, title, height=450, subtitle=subtitle, legend=False)
    fig.update_yaxes(autorange="reversed")
    fig.update_xaxes(title_text="ms since arrival", range=[0, whole * 1.04])
    # Parts that end near the right edge have their label outside on the left of the plot's end.
    for index, (start, width) in enumerate(zip(starts, widths)):
        if start + width > 0.7 * whole and not inside[index]:
            fig.data[0].text = tuple("" if i == index else t for i, t in enumerate(fig.data[0].text))
            fig.add_annotation(x=start, y=names[index], text=labels[index] + " ", xanchor="right", showarrow=False)
    return fig
