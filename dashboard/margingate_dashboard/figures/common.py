"""What all figures share: layout, legend place, empty state. Figures are pure functions of frames."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
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


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of ``new`` put over them; both stay as they are."""
    found = dict(old)
    for key, value in new.items():
        known = found.get(key)
        found[key] = merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return found


def relaid(fig: go.Figure, *settings: Mapping[str, Any]) -> go.Figure:
    """Return a copy of the figure with further settings of its layout.

    A whole layout given at a figure's making is checked in a tenth of the time that Plotly takes to update one.
    """
    layout = {name: value for name, value in fig.layout.to_plotly_json().items() if name != "template"}
    for more in settings:
        layout = merged(layout, more)
    return go.Figure(fig.data, layout)


def on_row(row: int) -> dict[str, str]:
    """Return the axes of a trace that stands in this row of :func:`stacked`, the first on top."""
    number = "" if row == 1 else str(row)
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def stacked(rows: int, spacing: float, heights: Sequence[float] | None = None) -> dict[str, Any]:
    """Return the axes of plots above each other that move together sideways; only the lowest has labels below.

    By hand, because Plotly's ``make_subplots`` and ``row=`` take several times as long.

    Parameters
    ----------
    rows
        Number of plots.
    spacing
        Space between two, as a share of the whole height.
    heights
        Relative heights, the first on top; equal ones by default.
    """
    shares = np.asarray(heights if heights is not None else np.ones(rows), dtype=float)
    shares = shares / shares.sum() * (1 - spacing * (rows - 1))
    layout, top = {}, 1.0
    for row, share in enumerate(shares, 1):
        names = on_row(row)
        number = names["xaxis"][1:]
        x = {"anchor": names["yaxis"], "domain": [0.0, 1.0]}
        below = on_row(rows)["xaxis"]
        layout[f"xaxis{number}"] = x if row == rows else {**x, "matches": below, "showticklabels": False}
        layout[f"yaxis{number}"] = {"anchor": names["xaxis"], "domain": [max(top - share, 0.0), top]}
        top -= share + spacing
    return layout


def upright(x: float, row: int = 1, **line: Any) -> dict[str, Any]:
    """Return a vertical line through the whole plot of a row, as a shape of a layout."""
    axes = on_row(row)
    along = {"x0": x, "x1": x, "xref": axes["xaxis"], "y0": 0, "y1": 1, "yref": f"{axes['yaxis']} domain"}
    return {"type": "line", **along, "line": line}


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
    more: Mapping[str, Any] | None = None,
) -> go.Figure:
    """Return the figure in the common layout: title at the left, legend along the bottom. Backgrounds are left to the page's theme.

    Parameters
    ----------
    fig
        The figure, which stays as it is.
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
    more
        Further settings of the layout, which have the last word.
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
    settings: dict[str, Any] = {}
    for name in axes:
        given = dict((x if name[0] == "x" else y) or {})
        title_text = {"text": given.pop("title")} if "title" in given else {}
        settings[name] = {**plain, "title": {"standoff": 8 if name[0] == "x" else 16, **title_text}, **given}
    below = 20 * (legend_rows(fig, width) - 1) if legend else 0
    top, bottom = 60 if subtitle else 44, 82 + below if legend else 54
    common = {
        "title": head,
        "height": height + below,
        "meta": {"title": title},
        "margin": {"l": 62, "r": 20, "t": top, "b": bottom},
        "showlegend": legend,
        "legend": {
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
        "hoverlabel": {"namelength": -1, "align": "left"},
        "bargap": 0.12,
        "font": {"size": 12},
    }
    return relaid(fig, settings, common, more or {})


def empty(title: str, message: str, *, height: int = 220) -> go.Figure:
    """Return a figure that says why it is empty."""
    place = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    note = {"annotations": [{"text": message, "showarrow": False, **place, "opacity": 0.75}]}
    hidden = {"visible": False}
    return finish(go.Figure(), title, height=height, legend=False, x=hidden, y=hidden, more=note)


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
