"""Figures of the Tuning page: price against risk, and one dataset's threshold on another."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from margingate_dashboard.figures.common import LOG_AXIS, WHOLE, empty, extra, finish
from margingate_dashboard.theme import dataset_look


def trade_off(curves: dict[str, pd.DataFrame], chosen: dict[str, pd.Series], subtitle: str = "") -> go.Figure:
    """Draw trigger rate against the bound of the miss rate, with the chosen points.

    Parameters
    ----------
    curves
        By dataset: :func:`sglang_margingate.gate.calibration.trade_off`.
    chosen
        By dataset: the row of the chosen threshold.
    """
    title = "Price against risk, by threshold"
    if not curves:
        return empty(title, "No calibration sample.")
    traces: list[go.Scatter | go.Bar] = []
    for name, table in curves.items():
        colour, dash = dataset_look(name)
        traces.append(
            go.Scatter(
                x=100 * table["trigger_rate"],
                y=100 * table["miss_upper"],
                name=name,
                mode="lines+markers",
                marker={"size": 4, "color": colour},
                line={"color": colour, "width": 2, "dash": dash, "shape": "hv"},
                customdata=np.stack(
                    [table["threshold"], table["missed"], table["flips"], table["triggered"], table["steps"]], -1
                ),
                hovertemplate="tau %{customdata[0]:.6g}: triggers %{customdata[3]:,} / %{customdata[4]:,}, misses "
                "%{customdata[1]:,} / %{customdata[2]:,} flips<br>at most %{y:.3g}% of steps missed, had it been fixed beforehand"
                + extra(name),
            )
        )
        if name in chosen:
            point = chosen[name]
            traces.append(
                go.Scatter(
                    x=[100 * point["trigger_rate"]],
                    y=[100 * point["miss_upper"]],
                    mode="markers",
                    showlegend=False,
                    cliponaxis=False,
                    marker={"size": 15, "symbol": "star", "color": colour, "line": {"width": 1.5, "color": "#101418"}},
                    hovertemplate=f"chosen: tau {point['threshold']:.6g}, "
                    + "%{x:.2f}% triggered, at most %{y:.3g}% of steps missed<extra>"
                    + name
                    + "</extra>",
                )
            )
    traces.append(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            name="chosen threshold",
            marker={"size": 12, "symbol": "star", "color": "#8C96A3", "line": {"width": 1.5, "color": "#101418"}},
        )
    )
    x, y = (
        {"title": "steps triggered, %", "rangemode": "tozero"},
        {"title": "steps missed at most (95%), %", **LOG_AXIS},
    )
    return finish(go.Figure(traces), title, height=420, subtitle=subtitle, width=WHOLE, x=x, y=y)


def transfer(matrix: pd.DataFrame, subtitle: str = "") -> go.Figure:
    """Draw the flips that a threshold calibrated on one dataset misses on another."""
    title = "Calibrated on one dataset, used on another"
    if matrix.empty:
        return empty(title, "No calibration sample.")
    rows, columns = list(dict.fromkeys(matrix["calibrated_on"])), list(dict.fromkeys(matrix["applied_to"]))
    by_pair = matrix.set_index(["calibrated_on", "applied_to"])
    z, text, hover = [], [], []
    for source in rows:
        cells = [by_pair.loc[(source, name)] for name in columns]
        z.append([float(c["missed"]) / c["flips"] if c["flips"] else 0.0 for c in cells])
        text.append([f"<b>{int(c['missed']):,} / {int(c['flips']):,}</b><br>{c['trigger_rate']:.2%}" for c in cells])
        hover.append(
            [
                f"tau {c['threshold']:.6g}: misses {int(c['missed']):,} / {int(c['flips']):,} flips, triggers "
                f"{int(c['triggered']):,} / {int(c['steps']):,} steps<br>"
                f"at most {c['miss_upper']:.3%} of steps missed (95%)"
                for c in cells
            ]
        )
    taus = {source: float(by_pair.loc[source].iloc[0]["threshold"]) for source in rows}
    fig = go.Figure(
        go.Heatmap(
            z=z,
            x=columns,
            y=[f"{s} (tau {taus[s]:.6g})" for s in rows],
            text=text,
            texttemplate="%{text}",
            customdata=hover,
            colorscale=[[0, "#D3D8DF"], [1, "#F0915A"]],
            textfont={"color": "#101418", "size": 13},
            zmin=0,
            zmax=max(0.05, float(np.max(z))),
            showscale=False,
            xgap=4,
            ygap=4,
            hovertemplate="%{y} → %{x}<br>%{customdata}<extra></extra>",
        )
    )
    plain = {"showgrid": False, "type": "category"}
    x = {"title": "used on", **plain}
    y = {"title": "calibrated on", **plain, "autorange": "reversed", "automargin": True}
    return finish(fig, title, height=190 + 62 * len(rows), subtitle=subtitle, legend=False, x=x, y=y)
