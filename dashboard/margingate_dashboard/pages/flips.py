"""Flips: where they happen, and each one with a link to its request."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import data, links, states, tokens, ui
from margingate_dashboard.bins import margin_grid
from margingate_dashboard.cards import Card
from margingate_dashboard.context import flip_text
from margingate_dashboard.figures import flips as figures
from margingate_dashboard.rates import at_most, of, share, upper_95
from margingate_dashboard.summary import has_tag
from margingate_dashboard.tables import FLIP_CODES, FLIP_COLUMNS, MOST_FLIPS, flip_list
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED
from margingate_dashboard.ui import Page

STEPS = (*FLIP_COLUMNS, "prefill", "verified", "triggered")


def _figures(page: Page, steps: pd.DataFrame) -> None:
    state = steps["state"].to_numpy()
    position, labels = figures.ranges(steps["step"].to_numpy(dtype=np.int64))
    rows, row_labels = figures.ranges(steps["batch_rows"].fillna(0).to_numpy(dtype=np.int64), 16)
    kinds = tokens.classes(steps["token"], steps["token_text"])
    margin = np.nan_to_num(steps["margin"].to_numpy(dtype=np.float64), nan=0.0)
    grid = margin_grid(margin) or 0.0625
    edges = np.array([0.0, 0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5]) * grid
    near = np.searchsorted(edges[1:], margin, side="right")
    margin_labels = ["tie", *(f"≤ {grid * k:g}" for k in (1, 2, 4, 8, 16, 32)), f"> {32 * grid:g}"]
    left, right = st.columns(2)
    with left:
        ui.chart(
            figures.bars(figures.by_bucket(position, state, labels), "By step", "step (output token)", page.subtitle),
            "by-step",
            page.exports,
        )
        ui.chart(
            figures.bars(figures.by_bucket(near, state, margin_labels), "By margin", "margin, logits", page.subtitle),
            "by-margin",
            page.exports,
        )
    with right:
        ui.chart(
            figures.bars(
                figures.by_bucket(kinds, state, tokens.CLASSES),
                "By token class",
                "class of the committed token",
                page.subtitle,
            ),
            "by-class",
            page.exports,
        )
        ui.chart(
            figures.bars(figures.by_bucket(rows, state, row_labels), "By batch size", "batch rows", page.subtitle),
            "by-batch",
            page.exports,
        )
    st.caption(
        "Figures count confirmed flips over all decode steps. Under the policy gate, flips of steps that were never "
        "verified are not in them."
    )


def _detail(page: Page, row: pd.Series) -> None:
    request, step = str(row["request"]), int(row["step"])
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**Step {step}** of request **{ui.markdown_safe(request)}**")
            st.page_link(
                ui.PAGES["request"],
                label="Open in Request",
                icon=":material/segment:",
                query_params=links.params(page.run, request, step),
            )
        steps = data.request_steps(page.info.path, request)
        steps = steps.assign(state=states.classify(steps))
        where = int((steps["step"] < step).sum())
        st.html(tokens.strip(steps.iloc[max(0, where - 40) : where + 25], tokens.texts_by_id(steps), step))
        st.code(flip_text(page.run, page.info.manifest, request, steps, step), language=None, wrap_lines=True)


@st.fragment
def _list(page: Page, table: pd.DataFrame) -> None:
    st.markdown("##### Every flip, highest margin first")
    st.caption(
        "Select a row to see it in its text and to copy it for an issue."
        + (f" First {MOST_FLIPS:,} shown." if len(table) == MOST_FLIPS else "")
    )
    picked = ui.table(
        table,
        "flips",
        page.exports,
        on_select="rerun",
        selection_mode="single-row",
        selection_default={"selection": {"rows": [0]}},
        column_config={
            "margin": st.column_config.NumberColumn(format="%.4g"),
            "threshold": st.column_config.NumberColumn(format="%.4g"),
        },
    )
    rows = [i for i in picked.selection.rows if i < len(table)]
    if rows:
        _detail(page, table.iloc[rows[0]])
    page.exports.show(st.container(horizontal_alignment="right"), "flips")


def _page() -> None:
    page = ui.open_page(
        "Flips", "The steps at which the verify chose another token: which ones they are, and what they have in common."
    )
    if page is None:
        return
    steps = page.data.steps(*STEPS)
    decode = ~states.as_bool(steps["prefill"])
    if page.datasets is not None:
        decode &= has_tag(steps["dataset"], page.datasets)
    steps = steps[decode]
    table = flip_list(steps)
    state = steps["state"].to_numpy()
    count = {s.name: int((state == states.CODE[s.name]).sum()) for s in (REPAIRED, FLIPPED, MISSED)}
    flips, seen = sum(count.values()), int(steps["verified"].sum())
    examined = int((steps["verified"] & ~steps["triggered"]).sum())
    requests = steps["request_id"].cat.codes.to_numpy()
    touched, every = np.unique(requests[np.isin(state, FLIP_CODES)]).size, np.unique(requests).size
    ui.cards(
        [
            Card(
                "Flips",
                f"{flips:,}",
                f"{share(flips, len(steps))} of {len(steps):,} decode steps; {seen:,} were verified",
                FLIPPED.colour,
            ),
            Card("Repaired", f"{count['repaired']:,}", f"{of(count['repaired'], flips)} flips", REPAIRED.colour),
            Card(
                "Missed", f"{count['missed']:,}", f"of {examined:,} untriggered steps that were verified", MISSED.colour
            ),
            Card("Requests with a flip", share(touched, every), f"{of(touched, every)} requests"),
        ]
    )
    if not flips:
        said = (
            f"<p>{of(0, seen)} verified steps flipped: at most {at_most(upper_95(0, seen))} of such steps do (95%).</p>"
            if seen
            else "<p>No step of this run was verified (policy off or log), so flips cannot be known. Run the same "
            "prompts with "
            "<code>--margingate-policy always</code>, or compare two runs on the Compare page.</p>"
        )
        ui.empty_state("No confirmed flips", said)
        return
    st.html(tokens.legend(("flipped", "repaired", "missed")))
    _figures(page, steps)
    _list(page, table)


if __name__ == "__main__":
    ui.guarded(_page)
