"""Figures of the Margins page: the distribution of margins, and what a threshold would do."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from margingate_dashboard.bins import LOGARITHMIC, Bins, counts
from margingate_dashboard.figures.common import WHOLE, empty, finish, step_fill, translucent
from margingate_dashboard.theme import FLIPPED, STABLE, THRESHOLD_COLOUR, TRIGGERED, dataset_look

MAX_FACETS = 8
"""More datasets than this are drawn as the first ones and the rest left to the filter."""


MOST_TICKS = 5


def ticks(bins: Bins) -> tuple[list[float], list[str]]:
    """Return ticks of a logarithmic margin axis: the ties' bin, then powers of two (bf16's own steps), few enough for a phone."""
    low, high = bins.drawn[2] if bins.drawn.size > 2 else 0.1, bins.drawn[-1]
    powers = [2.0**p for p in range(-12, 12) if low * 0.7 <= 2.0**p <= high]
    powers = powers[:: -max(1, -(-len(powers) // MOST_TICKS))][::-1]
    return [float(bins.centres[0]), *powers], ["0", *(f"{p:g}" for p in powers)]


def histogram(
    margins: dict[str, np.ndarray],
    flips: dict[str, np.ndarray],
    bins: Bins,
    scale: str,
    threshold: float,
    log_counts: bool = True,
    subtitle: str = "",
) -> go.Figure:
    """Draw one histogram per dataset, stable and flipped steps apart, with the threshold.

    Parameters
    ----------
    margins, flips
        By dataset: margins of all decode steps that did not flip, and of those that did.
    bins
        From :func:`margingate_dashboard.bins.margin_bins`.
    scale
        ``"log"`` or ``"linear"``.
    threshold
        Where to draw tau, in logits.
    log_counts
        Logarithmic counts, so that a few flips stay visible beside many thousand stable steps.
    """
    title = "Margins by dataset"
    names = list(margins)[:MAX_FACETS]
    if not names or not any(margins[n].size + flips[n].size for n in names):
        return empty(title, "No decode steps with a margin have been recorded.")
    fig = make_subplots(rows=len(names), cols=1, shared_xaxes=True, vertical_spacing=min(0.06, 0.2 / len(names)))
    log = scale == LOGARITHMIC
    floor = 0.5  # a logarithmic axis has no zero: it begins here, and so do empty bins
    left = float(bins.drawn[0]) if log else min(0.0, float(bins.drawn[0]))
    right = float(bins.drawn[-1]) if log else float(bins.drawn[-2] + (bins.drawn[1] - bins.drawn[0]))
    drawn = bins.drawn if log else np.append(bins.drawn[:-1], right)
    place = max(threshold, float(np.sqrt(bins.drawn[0] * bins.drawn[1]))) if log else threshold
    for row, name in enumerate(names, start=1):
        for look, values, label in ((STABLE, margins[name], "not flipped"), (FLIPPED, flips[name], "flipped")):
            if look is FLIPPED and not values.size:
                continue
            heights = counts(bins, values).astype(float)
            shown = np.where(heights > 0, heights, floor) if log_counts else heights
            trace = step_fill(
                drawn,
                shown,
                colour=look.colour,
                fillcolor=translucent(look.colour, 0.35 if look is STABLE else 0.6),
                name=label,
                legendgroup=label,
                showlegend=not any(t.legendgroup == label for t in fig.data),
            )
            trace.customdata = np.stack(
                [np.append(heights, heights[-1]), bins.edges, np.append(bins.edges[1:], bins.edges[-1])], axis=-1
            )
            trace.hovertemplate = (
                "margin %{customdata[1]:.6g} to %{customdata[2]:.6g}: %{customdata[0]:,} steps<extra>"
                + label
                + "</extra>"
            )
            fig.add_trace(trace, row=row, col=1)
        total = margins[name].size + flips[name].size
        fig.add_annotation(
            text=f"<b>{name}</b>  {total:,} steps, {flips[name].size:,} flipped",
            xref="x domain",
            yref="y domain",
            x=0.006,
            y=0.97,
            xanchor="left",
            yanchor="top",
            showarrow=False,
            row=row,
            col=1,
        )
        fig.add_vrect(
            x0=left,
            x1=place,
            fillcolor=translucent(TRIGGERED.colour, 0.16),
            line_width=0,
            layer="below",
            row=row,
            col=1,
        )
        fig.add_vline(x=place, line={"color": THRESHOLD_COLOUR, "width": 2, "dash": "dash"}, row=row, col=1)
    finish(fig, title, height=150 + 150 * len(names), subtitle=subtitle, width=WHOLE)
    fig.add_annotation(
        text=f" tau = {threshold:.6g}",
        x=np.log10(place) if log else place,
        xref="x",
        y=0.78,
        yref="y domain",
        xanchor="left",
        yanchor="top",
        showarrow=False,
        font={"color": THRESHOLD_COLOUR, "size": 13},
    )
    for row in range(1, len(names) + 1):
        fig.update_yaxes(title_text="steps", type="log" if log_counts else "linear", row=row, col=1)
        if log_counts:
            most = max(float(np.nanmax(t.y)) for t in fig.data if t.yaxis == ("y" if row == 1 else f"y{row}"))
            # Room above the bars for the facet's own title.
            fig.update_yaxes(dtick=1, range=[np.log10(floor), max(1.2, np.log10(most) * 1.22 + 0.15)], row=row, col=1)
    if log:
        places, labels = ticks(bins)
        fig.update_xaxes(type="log", tickvals=places, ticktext=labels, range=[np.log10(left), np.log10(right)])
    else:
        fig.update_xaxes(range=[left, right])
    unit = f"margin, logits (bins on the grid of {bins.grid:g})" if bins.grid else "margin, logits"
    fig.update_xaxes(title_text=unit, row=len(names), col=1)
    return fig


def effect(
    curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], threshold: float, subtitle: str = ""
) -> go.Figure:
    """Draw trigger rate and flips left above the threshold, for every threshold.

    Parameters
    ----------
    curves
        By dataset: thresholds, trigger rates (0 to 1) and counts of known flips above them.
    threshold
        Where to draw tau, in logits.
    """
    title = "What another threshold would do"
    curves = {name: curve for name, curve in curves.items() if curve[0].size}
    if not curves:
        return empty(title, "No decode steps with a margin have been recorded.")
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    for name, (taus, rates, left) in curves.items():
        colour, dash = dataset_look(name)
        line = {"color": colour, "dash": dash, "width": 2}
        fig.add_trace(
            go.Scatter(
                x=taus,
                y=100 * rates,
                name=name,
                legendgroup=name,
                mode="lines",
                line={**line, "shape": "hv"},
                hovertemplate="tau %{x:.6g}: %{y:.2f}% triggered<extra>" + name + "</extra>",
            ),
            row=1,
            col=1,
        )
        fig.add_trace(
            go.Scatter(
                x=taus,
                y=left,
                name=name,
                legendgroup=name,
                showlegend=False,
                mode="lines",
                line={**line, "shape": "hv"},
                hovertemplate="tau %{x:.6g}: %{y} known flips above it<extra>" + name + "</extra>",
            ),
            row=2,
            col=1,
        )
    finish(fig, title, height=420, subtitle=subtitle, width=WHOLE)
    fig.add_vline(x=threshold, line={"color": THRESHOLD_COLOUR, "width": 2, "dash": "dash"})
    fig.update_yaxes(title_text="triggered, %", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(title_text="known flips missed", rangemode="tozero", row=2, col=1)
    fig.update_xaxes(title_text="threshold (tau), logits", rangemode="tozero", row=2, col=1)
    return fig
