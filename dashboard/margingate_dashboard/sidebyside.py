"""Two answers beside each other, token by token, with the place where they part."""

from __future__ import annotations

import html
from typing import NamedTuple

import pandas as pd
import streamlit as st

from margingate_dashboard import data, links, states, tokens
from margingate_dashboard.choose import markdown_safe
from margingate_dashboard.facts.differ import Aligned, realign
from sglang_margingate.trace import RunInfo

BEFORE, AFTER = 60, 90
"""Tokens shown around the first difference."""


class Side(NamedTuple):
    """One answer: the run, the request, and what stands above it."""

    info: RunInfo
    number: int
    request_id: str
    title: str


def _window(steps: pd.DataFrame, marks: list[str], first: int | None) -> tuple[pd.DataFrame, dict[int, str]]:
    begin = 0 if first is None else max(0, first - BEFORE)
    by_step = dict(zip(steps["step"].tolist(), marks))
    shown = steps[(steps["step"] >= begin) & (steps["step"] < begin + BEFORE + AFTER)]
    return shown, by_step


def show(pages: dict[str, str], left: Side, right: Side) -> Aligned:
    """Show two answers and return how they compare."""
    every = [data.request_steps(side.info.path, side.number) for side in (left, right)]
    found = realign(every[0]["token"].tolist(), every[1]["token"].tolist())
    cells = []
    for side, steps, marks in zip((left, right), every, (found.a, found.b)):
        if steps.empty:
            body = "<p>No step of this request was observed (its policy, or it was sampled): its tokens are not in the trace.</p>"
            cells.append(f"<div><h4>{html.escape(side.title)}</h4>{body}</div>")
            continue
        steps = steps.assign(state=states.classify(steps))
        window, by_step = _window(steps, marks, found.first)
        ended = "" if found.first is None or len(steps) > found.first else f" (ended after {len(steps):,} tokens)"
        strip = tokens.strip(
            window,
            data.vocabulary(data.run_data(side.info.path)),
            found.first,
            lambda step, by_step=by_step: by_step.get(int(step["step"]), "only"),  # type: ignore[misc]
        )
        cells.append(f"<div><h4>{html.escape(side.title)}{ended}</h4>{strip}</div>")
    legend = (
        '<div class="mg-legend"><span><b class="mg-key diverged">first difference</b></span>'
        '<span><b class="mg-key only">on one side only</b></span><span><b class="mg-key again">equal again</b></span></div>'
    )
    st.html(legend + f'<div class="mg-two">{"".join(cells)}</div>')
    with st.container(horizontal=True):
        for side in (left, right):
            st.page_link(
                pages["request"],
                label=f"Open in Request ({markdown_safe(side.title)})",
                icon=":material/segment:",
                query_params=links.params(side.info.name, side.request_id, found.first, number=side.number),
            )
    return found
