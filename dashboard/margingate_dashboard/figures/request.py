"""Figures of the Request page: margins step by step, and where the time went."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import empty, extra, finish, translucent, upright
from margingate_dashboard.rates import number
from margingate_dashboard.theme import FLIPPED, PART_COLOURS, SERIES_COLOURS, STATES, THRESHOLD_COLOUR

MOST_POINTS, BUCKETS = 4000, 1500
"""Steps drawn one by one; of more, the stable ones are drawn as the lowest margin of each of so many spans."""


def envelope(step: np.ndarray, margin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest margin of each span of steps, at the step where it is: what matters of many is never thinned away."""
    cuts = np.unique(np.linspace(0, step.size, BUCKETS + 1).astype(int))
    filled = np.where(np.isnan(margin), np.inf, margin)
    at = np.array([a + int(np.argmin(filled[a:b])) for a, b in pairwise(cuts) if b > a])
    return step[at], margin[at]


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
    # Two plots above each other, laid out by hand: make_subplots and row= take Plotly several times as long.
    traces: list[go.Scatter] = []
    margin = steps["margin"].to_numpy(dtype=float)
    positive = margin[margin > 0]
    floor = float(positive.min()) / 2 if positive.size else 1e-3
    drawn = np.where(margin > 0, margin, floor) if log else margin
    many = len(steps) > MOST_POINTS
    along, lowest = envelope(steps["step"].to_numpy(), drawn) if many else (steps["step"], drawn)
    traces.append(
        go.Scatter(
            x=along,
            y=lowest,
            mode="lines",
            name=f"lowest of each {-(-len(steps) // BUCKETS):,} steps" if many else None,
            line={"color": "rgba(128,134,145,0.9)" if many else "rgba(128,134,145,0.45)", "width": 1},
            hoverinfo="skip",
            showlegend=many,
        )
    )
    state = steps["state"].to_numpy()
    for code, look in enumerate(STATES):
        mine = state == code
        if not mine.any() or (many and code == 0):
            continue
        traces.append(
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
            )
        )
    threshold = steps["threshold"].to_numpy(dtype=float)
    if np.isfinite(threshold).any():
        traces.append(
            go.Scatter(
                x=steps["step"],
                y=threshold,
                mode="lines",
                name="threshold (tau)",
                line={"color": THRESHOLD_COLOUR, "width": 2, "dash": "dash", "shape": "hv"},
                hovertemplate="threshold %{y:.6g}<extra></extra>",
            )
        )
    traces.append(
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
            yaxis="y2",
        )
    )
    most = float(np.nanmax(steps["batch_rows"].to_numpy(dtype=float, na_value=np.nan), initial=0.0))
    above = {"domain": [0.3, 1.0], "title": {"text": "margin, logits"}, "rangemode": "tozero"}
    below = {"domain": [0.0, 0.22], "title": {"text": "rows"}, "rangemode": "tozero", "nticks": 4}
    layout = {
        "xaxis": {"anchor": "y2"},
        "yaxis": {**above, **({"type": "log", "dtick": 1} if log else {})},
        "yaxis2": {**below, **({"dtick": 1} if most < 4 else {})},
    }
    if selected is not None:
        line = {"color": THRESHOLD_COLOUR, "width": 1.5, "dash": "dot"}
        place = {"x0": selected, "x1": selected, "y0": 0, "y1": 1, "yref": "paper"}
        layout["shapes"] = [{"type": "line", **place, "line": line}]
    fig = go.Figure(traces, layout)
    return finish(fig, title, height=450, subtitle=subtitle, width=540, x={"title": "step (output token)"})


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
    if not np.isfinite(number(request.get("ttft_ms"))):
        return empty(title, "No step of this request was observed: when its first token came is not known.")
    names = [*parts, "total"]
    starts = np.concatenate([[0.0], np.cumsum(list(parts.values()))[:-1], [0.0]])
    widths = [*parts.values(), whole]
    labels = [f"{width:,.1f} ms · {width / whole:.1%}" for width in widths]
    # A label goes beside its bar on the side with room.
    inside = [start + width > 0.62 * whole and width > 0.3 * whole for start, width in zip(starts, widths)]
    # Where a part ends near the right edge and is too narrow for its label, the label stands before it.
    before = [start + width > 0.7 * whole and not i for start, width, i in zip(starts, widths, inside)]
    fig = go.Figure(
        go.Bar(
            y=names,
            x=widths,
            base=starts,
            orientation="h",
            text=["" if b else label for b, label in zip(before, labels)],
            cliponaxis=False,
            textposition=["inside" if i else "outside" for i in inside],
            insidetextanchor="middle",
            insidetextfont={"color": "#101418"},
            marker={"color": [*(PART_COLOURS[name] for name in parts), "#A3ABB6"]},
            customdata=starts,
            hovertemplate="%{y}: %{x:.1f} ms from %{customdata:.1f} ms<extra></extra>",
        ),
        {
            "annotations": [
                {"x": start, "y": name, "text": label + " ", "xanchor": "right", "showarrow": False}
                for start, name, label, b in zip(starts, names, labels, before)
                if b
            ]
        },
    )
    x = {"title": "ms since arrival", "range": [0, whole * 1.04]}
    return finish(
        fig, title, height=450, subtitle=subtitle, legend=False, x=x, y={"autorange": "reversed", "showgrid": False}
    )


def kv_change(steps: pd.DataFrame, selected: int | None = None, subtitle: str = "") -> go.Figure:
    """Draw how much each verify changed the step's K/V column, in the first and the last layer, and the flips."""
    title = "K/V change at each verify"
    seen = steps[steps["kv_delta_last"].notna() | steps["kv_delta_first"].notna()]
    if seen.empty:
        return empty(title, "No step of this request was verified.")
    traces: list[go.Scatter | go.Bar] = []
    for column, words, colour in (
        ("kv_delta_first", "first layer", SERIES_COLOURS[0]), ("kv_delta_last", "last layer", SERIES_COLOURS[2]),
    ):  # fmt: skip
        traces.append(
            go.Scatter(
                x=seen["step"], y=seen[column].to_numpy(dtype=float), name=words, mode="lines+markers",
                line={"color": colour, "width": 1.5}, marker={"size": 4},
                hovertemplate="step %{x}: %{y:.6g}" + extra(words),
            )
        )  # fmt: skip
    flips = seen[seen["flipped"].astype("boolean").fillna(False).to_numpy(dtype=bool)]
    traces.append(
        go.Scatter(
            x=flips["step"], y=flips["kv_delta_last"].to_numpy(dtype=float), name="flipped", mode="markers",
            marker={"symbol": "x", "size": 10, "color": FLIPPED.colour}, hovertemplate="step %{x} flipped<extra></extra>",
        )
    )  # fmt: skip
    marked = [] if selected is None else [upright(selected, color=THRESHOLD_COLOUR, width=1.5, dash="dot")]
    x, y = {"title": "step (output token)"}, {"title": "largest change", "rangemode": "tozero"}
    fig = go.Figure(traces)
    return finish(fig, title, height=300, subtitle=subtitle, width=540, x=x, y=y, more={"shapes": marked})
