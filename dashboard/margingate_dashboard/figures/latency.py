"""Figures of the Latency page: time per token, cost of verifying, overhead of each request."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import LOG_AXIS, empty, extra, finish, translucent, upright
from margingate_dashboard.theme import TRIGGERED, policy_colour


def quantiles(groups: np.ndarray, values: np.ndarray) -> pd.DataFrame:
    """Return count, median and 95th percentile of ``values`` for each whole number in ``groups``."""
    keep = np.isfinite(values)
    groups, values = groups[keep], values[keep]
    names, sizes = np.unique(groups, return_counts=True) if groups.size < 10_000 else _tally(groups)
    # A stable sort of small whole numbers is a radix sort; each group is then one slice.
    small = groups.astype(np.int16) if names.size and names[-1] < 2**15 else groups
    ordered = values[np.argsort(small, kind="stable")]
    stops = np.cumsum(sizes)
    parts = [ordered[stop - size : stop] for stop, size in zip(stops, sizes)]
    found = [np.quantile(part, (0.5, 0.95)) for part in parts]
    return pd.DataFrame({"rows": names, "steps": sizes, "median": [f[0] for f in found], "p95": [f[1] for f in found]})


def _tally(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct values and counts of many small whole numbers, without sorting them."""
    counts = np.bincount(groups)
    names = np.flatnonzero(counts)
    return names, counts[names]


def by_rows(tables: dict[str, pd.DataFrame], title: str, what: str, subtitle: str = "") -> go.Figure:
    """Draw median and 95th percentile against batch rows, one colour per policy (from :func:`quantiles`)."""
    tables = {name: table for name, table in tables.items() if len(table)}
    if not tables:
        return empty(title, f"No {what} has been recorded.")
    traces: list[go.Scatter | go.Bar] = []
    for name, table in tables.items():
        colour = policy_colour(name)
        traces.append(
            go.Scatter(
                x=table["rows"],
                y=table["p95"],
                name=f"{name}, p95",
                mode="lines",
                line={"color": colour, "width": 1.5, "dash": "dot"},
                customdata=table["steps"],
                hovertemplate="%{x} rows: %{y:.2f} ms (%{customdata:,} steps)<extra>" + name + " p95</extra>",
            )
        )
        traces.append(
            go.Scatter(
                x=table["rows"],
                y=table["median"],
                name=f"{name}, median",
                mode="lines+markers",
                line={"color": colour, "width": 2, "dash": "solid"},
                marker={"size": 6},
                customdata=table["steps"],
                hovertemplate="%{x} rows: %{y:.2f} ms (%{customdata:,} steps)<extra>" + name + " median</extra>",
            )
        )
    return finish(
        go.Figure(traces), title, subtitle=subtitle, x={"title": "batch rows"}, y={"title": "ms", "rangemode": "tozero"}
    )


def distribution(values: dict[str, np.ndarray], title: str, axis: str, subtitle: str = "", bins: int = 40) -> go.Figure:
    """Draw histograms of a number per request, with each group's median."""
    values = {name: v[np.isfinite(v)] for name, v in values.items()}
    values = {name: v for name, v in values.items() if v.size}
    if not values:
        return empty(title, "No request has finished yet.")
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(np.quantile(every, 0.98))
    # Where all are equal, bins of some width: an axis in millionths would look as if it told something.
    edges = np.linspace(low, high if high > low else low + max(1.0, 0.1 * abs(low)), bins + 1)
    edges[-1] = max(edges[-1], float(every.max()))
    shown = np.append(edges[:-1], edges[-2] + (edges[1] - edges[0]))
    traces: list[go.Scatter | go.Bar] = []
    medians = []
    for name, v in values.items():
        colour = policy_colour(name)
        heights, _ = np.histogram(v, edges)
        traces.append(
            go.Bar(
                x=(shown[:-1] + shown[1:]) / 2,
                y=heights,
                width=np.diff(shown),
                name=f"{name} ({v.size:,} requests, median {np.median(v):.4g})",
                marker={"color": translucent(colour, 0.75), "line": {"width": 0}},
                customdata=np.stack([edges[:-1], edges[1:]], axis=-1),
                hovertemplate="%{customdata[0]:.4g} to %{customdata[1]:.4g}: %{y:,} requests" + extra(name),
            )
        )
        if len(values) <= 3:
            medians.append(upright(float(np.median(v)), color=colour, width=1.5, dash="dash"))
    more = {"barmode": "stack", "shapes": medians}
    return finish(go.Figure(traces), title, subtitle=subtitle, x={"title": axis}, y={"title": "requests"}, more=more)


def verify_cost(table: pd.DataFrame, subtitle: str = "") -> go.Figure:
    """Draw what a verify pass costs against the columns recomputed for a step (from :func:`quantiles`)."""
    title = "Cost of a verify by window"
    if table.empty:
        return empty(title, "No step was verified.")
    traces: list[go.Scatter | go.Bar] = []
    for column, dash in (("p95", "dot"), ("median", "solid")):
        traces.append(
            go.Scatter(
                x=table["rows"],
                y=table[column],
                name={"p95": "95th percentile", "median": "median"}[column],
                mode="lines+markers" if column == "median" else "lines",
                line={"color": TRIGGERED.colour, "width": 2 if column == "median" else 1.5, "dash": dash},
                customdata=table["steps"],
                hovertemplate="%{x} columns: %{y:.2f} ms (%{customdata:,} verified steps)<extra>" + column + "</extra>",
            )
        )
    x, y = {"title": "columns recomputed for the step (window)"}, {"title": "ms the step waited", "rangemode": "tozero"}
    return finish(go.Figure(traces), title, subtitle=subtitle, x=x, y=y)


def ecdf(values: dict[str, np.ndarray], title: str, axis: str, subtitle: str = "") -> go.Figure:
    """Draw the share of requests at or below each value, one line per policy, on a logarithmic axis."""
    values = {name: np.sort(v[np.isfinite(v)]) for name, v in values.items()}
    values = {name: v for name, v in values.items() if v.size}
    if not values:
        return empty(title, "No request has finished yet.")
    traces: list[go.Scatter | go.Bar] = []
    log = all(v[0] > 0 for v in values.values())
    for name, v in values.items():
        shares = np.arange(1, v.size + 1) / v.size
        keep = np.unique(np.linspace(0, v.size - 1, min(v.size, 2000)).astype(int))
        traces.append(
            go.Scatter(
                x=v[keep],
                y=100 * shares[keep],
                name=f"{name} ({v.size:,} requests, median {np.median(v):.4g})",
                mode="lines",
                line={"color": policy_colour(name), "width": 2, "shape": "hv"},
                hovertemplate="%{y:.1f}% at or below %{x:.4g}" + extra(name),
            )
        )
    x = {"title": axis, **(LOG_AXIS if log else {})}
    return finish(go.Figure(traces), title, subtitle=subtitle, x=x, y={"title": "requests, %", "range": [0, 103]})
