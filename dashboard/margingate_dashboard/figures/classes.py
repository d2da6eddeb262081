"""The invariance map as a heat map: which rows M of each kind of layer share their bits."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from margingate_dashboard.figures.common import WHOLE, empty, finish, safe
from margingate_dashboard.theme import SERIES_COLOURS

MOST_ROWS = 4096
MOST_NAME = 24
"""Signs of a layer's name on the axis: on a phone the map needs the width; the table below says it all."""


def heat_map(found: object, subtitle: str = "") -> go.Figure:
    """Draw each kind of layer's classes over the rows M of a forward; rows of one colour gave the same bits.

    What is damaged or from another schema is left out rather than raised: a manifest is a file.
    """
    title = "Invariance map"
    layers = found.get("layers") if isinstance(found, dict) else None
    names: list[str] = []
    runs: list[list[tuple[int, int, object]]] = []
    for layer in layers if isinstance(layers, list) else []:
        try:
            classes = [(int(a), int(b), label) for a, b, label in layer["classes"]]
            shape = [int(n) for n in layer["shape"]]
            name = str(layer["name"])[:MOST_NAME]
            if safe(name) in names:  # two kinds of one name; their shapes tell them apart
                name += f" {shape[1]} → {shape[0]}"
        except (KeyError, TypeError, ValueError, IndexError):
            continue
        if classes and all(0 < a <= b <= MOST_ROWS for a, b, _ in classes):
            names.append(safe(name))
            runs.append(classes)
    if not names:
        return empty(title, "The manifest holds no map.")
    most = max(b for classes in runs for _, b, _ in classes)
    z = np.full((len(names), most), np.nan)
    for row, classes in enumerate(runs):
        order: dict[object, int] = {}
        for a, b, label in classes:
            z[row, a - 1 : b] = -1 if label is None else order.setdefault(label, len(order)) % len(SERIES_COLOURS)
    colours = ["#8C96A3", *SERIES_COLOURS]
    scale = []
    for index, colour in enumerate(colours):
        scale += [[index / len(colours), colour], [(index + 1) / len(colours), colour]]
    fig = go.Figure(
        go.Heatmap(
            z=z, x=list(range(1, most + 1)), y=names, colorscale=scale, zmin=-1.5, zmax=len(SERIES_COLOURS) - 0.5,
            showscale=False, xgap=0, ygap=3, hoverongaps=False, hovertemplate="%{y}<br>M = %{x}, class %{z}<extra></extra>",
        )
    )  # fmt: skip
    x, y = {"title": "rows M of the forward"}, {"autorange": "reversed", "showgrid": False, "automargin": True}
    return finish(fig, title, height=150 + 34 * len(names), subtitle=subtitle, legend=False, width=WHOLE, x=x, y=y)
