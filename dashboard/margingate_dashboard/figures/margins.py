"""Figures of the Margins page: the distribution of margins, and what a threshold would do."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from margingate_dashboard.bins import LOGARITHMIC, Bins, counts
from margingate_dashboard.figures.common import WHOLE, empty, finish, on_row, stacked, step_fill, translucent, upright
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
    log = scale == LOGARITHMIC
    floor = 0.5  # a logarithmic axis has no zero: it begins here, and so do empty bins
    left = float(bins.drawn[0]) if log else min(0.0, float(bins.drawn[0]))
    right = float(bins.drawn[-1]) if log else float(bins.drawn[-2] + (bins.drawn[1] - bins.drawn[0]))
    drawn = bins.drawn if log else np.append(bins.drawn[:-1], right)
    place = max(threshold, float(np.sqrt(bins.drawn[0] * bins.drawn[1]))) if log else threshold
    traces: list[go.Scatter] = []
    notes: list[dict[str, Any]] = []
    shapes: list[dict[str, Any]] = []
    more: dict[str, Any] = {"annotations": notes, "shapes": shapes}
    for row, name in enumerate(names, start=1):
        axes = on_row(row)
        x, y = f"{axes['xaxis']} domain", f"{axes['yaxis']} domain"
        most = floor
        for look, values, label in ((STABLE, margins[name], "not flipped"), (FLIPPED, flips[name], "flipped")):
            if look is FLIPPED and not values.size:
                continue
            heights = counts(bins, values).astype(float)
            shown = np.where(heights > 0, heights, floor) if log_counts else heights
            most = max(most, float(shown.max(initial=0.0)))
            trace = step_fill(
                drawn,
                shown,
                colour=look.colour,
                fillcolor=translucent(look.colour, 0.35 if look is STABLE else 0.6),
                name=label,
                legendgroup=label,
                showlegend=not any(t.legendgroup == label for t in traces),
                customdata=np.stack(
                    [np.append(heights, heights[-1]), bins.edges, np.append(bins.edges[1:], bins.edges[-1])], axis=-1
                ),
                hovertemplate="margin %{customdata[1]:.6g} to %{customdata[2]:.6g}: %{customdata[0]:,} steps<extra>"
                + label
                + "</extra>",
                **axes,
            )
            traces.append(trace)
        total = margins[name].size + flips[name].size
        # Above its facet: within, the threshold's line would strike it through on a phone.
        corner = {"xanchor": "left", "yanchor": "bottom", "showarrow": False}
        text = f"<b>{name}</b>  {total:,} steps, {flips[name].size:,} flipped"
        notes.append({"text": text, "xref": x, "yref": y, "x": 0, "y": 1, **corner})
        shade = {"fillcolor": translucent(TRIGGERED.colour, 0.16), "line": {"width": 0}, "layer": "below"}
        span = {"x0": left, "x1": place, "xref": axes["xaxis"], "y0": 0, "y1": 1, "yref": y}
        shapes.append({"type": "rect", **span, **shade})
        shapes.append(upright(place, row, color=THRESHOLD_COLOUR, width=2, dash="dash"))
        more["yaxis" + axes["yaxis"][1:]] = {"title": {"text": "steps"}, "type": "log" if log_counts else "linear"}
        if log_counts:
            # Room above the bars for the threshold's name.
            above = {"dtick": 1, "range": [np.log10(floor), max(1.2, np.log10(most) * 1.22 + 0.15)]}
            more["yaxis" + axes["yaxis"][1:]] |= above
    at = {"x": np.log10(place) if log else place, "xref": "x", "y": 0.97, "yref": "y domain"}
    along_axis = np.log10([left, place, right]) if log else np.array([left, place, right])
    beyond = along_axis[1] - along_axis[0] > 0.6 * (along_axis[2] - along_axis[0])
    style = {"xanchor": "right" if beyond else "left", "yanchor": "top", "showarrow": False}
    notes.append({"text": f" tau = {threshold:.6g} ", "font": {"color": THRESHOLD_COLOUR, "size": 13}, **at, **style})
    along: dict[str, Any] = {"range": [left, right]}
    if log:
        places, labels = ticks(bins)
        along = {"type": "log", "tickvals": places, "ticktext": labels, "range": [np.log10(left), np.log10(right)]}
    unit = f"margin, logits (bins on the grid of {bins.grid:g})" if bins.grid else "margin, logits"
    more["xaxis" + on_row(len(names))["xaxis"][1:]] = {"title": {"text": unit}}
    more["margin"] = {"t": 80 if subtitle else 64}
    fig = go.Figure(traces, stacked(len(names), min(0.08, 0.22 / len(names))))
    return finish(fig, title, height=170 + 150 * len(names), subtitle=subtitle, width=WHOLE, x=along, more=more)


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
    traces = []
    for name, (taus, rates, left) in curves.items():
        colour, dash = dataset_look(name)
        line = {"color": colour, "dash": dash, "width": 2}
        traces.append(
            go.Scatter(
                x=taus,
                y=100 * rates,
                name=name,
                legendgroup=name,
                mode="lines",
                line={**line, "shape": "hv"},
                hovertemplate="tau %{x:.6g}: %{y:.2f}% triggered<extra>" + name + "</extra>",
            )
        )
        traces.append(
            go.Scatter(
                x=taus,
                y=left,
                name=name,
                legendgroup=name,
                showlegend=False,
                mode="lines",
                line={**line, "shape": "hv"},
                hovertemplate="tau %{x:.6g}: %{y} known flips above it<extra>" + name + "</extra>",
                **on_row(2),
            )
        )
    more = {
        "shapes": [upright(threshold, row, color=THRESHOLD_COLOUR, width=2, dash="dash") for row in (1, 2)],
        "yaxis": {"title": {"text": "triggered, %"}},
        "yaxis2": {"title": {"text": "known flips missed"}},
        "xaxis2": {"title": {"text": "threshold (tau), logits"}, "rangemode": "tozero"},
    }
    fig, zero = go.Figure(traces, stacked(2, 0.09)), {"rangemode": "tozero"}
    return finish(fig, title, height=420, subtitle=subtitle, width=WHOLE, y=zero, more=more)
