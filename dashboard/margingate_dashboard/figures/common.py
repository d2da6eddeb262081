"""What all figures share: layout, legend place, empty state. Figures are pure functions of frames."""

from __future__ import annotations

import html
import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

HEIGHT = 340
HALF, WHOLE = 440, 900
"""Least widths of the plot of a figure in half a page and in a whole one, in pixels."""

# Middle grey with transparency: readable on white and on near-black, also in an exported file.
GRID = "rgba(128,134,145,0.22)"
AXIS = "rgba(128,134,145,0.55)"


def legend_rows(fig: go.Figure, width: int) -> int:
    """Return about how many lines a figure's legend takes: Plotly does not say before it has drawn."""
    names = [str(t.name) for t in fig.data if t.name and t.showlegend is not False]
    entry = [46 + 6.6 * len(name) for name in names]
    if sum(entry) <= width or not entry:
        return 1
    # Wrapped entries stand in columns as wide as the widest.
    return math.ceil(len(entry) / max(1, int(width // max(entry))))


def finish(
    fig: go.Figure,
    title: str,
    *,
    height: int = HEIGHT,
    subtitle: str = "",
    legend: bool = True,
    width: int = HALF,
    x: dict[str, Any] | None = None,
    y: dict[str, Any] | None = None,
) -> go.Figure:
    """Apply the common layout: title at the left, legend along the bottom. Backgrounds are left to the page's theme.

    Parameters
    ----------
    fig
        The figure, changed in place.
    title, subtitle
        What is shown, and on which data; both travel with an exported image.
    height
        Height in pixels.
    legend
        Whether to show the legend.
    width
        Least width in pixels that the figure will have.
    x, y
        Further settings of the axes (of all of a kind, where there are several).
    """
    small = f'<br><span style="font-size:12px;font-weight:400">{subtitle}</span>' if subtitle else ""
    head = {
        "text": f"{title}{small}",
        "font": {"size": 15},
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "pad": {"l": 6, "t": 20},
    }
    # No automargin: the browser would lay each figure out several times over.
    plain = {"gridcolor": GRID, "linecolor": AXIS, "zeroline": False, "automargin": False}
    axes = [name for name in fig.layout.to_plotly_json() if name.startswith(("xaxis", "yaxis"))] or ["xaxis", "yaxis"]
    settings = {}
    for name in axes:
        given = dict((x if name[0] == "x" else y) or {})
        title_text = {"text": given.pop("title")} if "title" in given else {}
        settings[name] = {**plain, "title": {"standoff": 8 if name[0] == "x" else 16, **title_text}, **given}
    below = 20 * (legend_rows(fig, width) - 1) if legend else 0
    top, bottom = 60 if subtitle else 44, 82 + below if legend else 54
    # One update with nested names: update_xaxes and names_with_underscores take Plotly several times as long.
    fig.update_layout(
        settings,
        title=head,
        height=height + below,
        meta={"title": title},
        margin={"l": 62, "r": 20, "t": top, "b": bottom},
        showlegend=legend,
        legend={
            "orientation": "h",
            # Below the axis title and growing downwards: on a phone it takes more lines than here, and pushes the plot up.
            "yref": "paper",
            "y": -66.0 / max(height + below - top - bottom, 60),
            "yanchor": "top",
            "xref": "paper",
            "x": 0,
            "traceorder": "normal",
            "font": {"size": 12},
        },
        hoverlabel={"namelength": -1, "align": "left"},
        bargap=0.12,
        font={"size": 12},
    )
    return fig


def empty(title: str, message: str, *, height: int = 220) -> go.Figure:
    """Return a figure that says why it is empty."""
    fig = go.Figure()
    finish(fig, title, height=height, legend=False)
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    fig.add_annotation(text=message, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper", opacity=0.75)
    return fig


TICKS = [digit * 10.0**power for power in range(-7, 8) for digit in (1, 2, 5)]
LOG_AXIS: dict[str, Any] = {"type": "log", "tickvals": TICKS, "ticktext": [f"{t:.10g}" for t in TICKS]}
"""A logarithmic axis with whole labels: Plotly shortens the steps between powers of ten to their first digit, and 0.2 reads 2."""


def step_fill(x_edges: np.ndarray, y: np.ndarray, **style: Any) -> go.Scatter:
    """Return a histogram outline that works on linear and logarithmic axes alike: ``n + 1`` edges, ``n`` heights."""
    return go.Scatter(
        x=x_edges,
        y=np.append(y, y[-1] if y.size else 0),
        mode="lines",
        line={"shape": "hv", "width": 1.5, "color": style.pop("colour", None), "dash": style.pop("dash", None)},
        fill=style.pop("fill", "tozeroy"),
        **style,
    )


def safe(text: object) -> str:
    """Return untrusted text for a figure: Plotly reads a little HTML in names, labels and hovers."""
    return html.escape(str(text), quote=False)


def extra(name: object) -> str:
    """Return the name box of a hover label."""
    return f"<extra>{name}</extra>"


def translucent(colour: str, alpha: float) -> str:
    """Return ``#RRGGBB`` as an rgba colour."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"
