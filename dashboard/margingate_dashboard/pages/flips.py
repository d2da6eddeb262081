"""Flips: where they happen, and each one with a link to its request."""

from __future__ import annotations

import html
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from margingate_dashboard import data, links, states, tokens, ui, why_panel
from margingate_dashboard.bins import margin_grid
from margingate_dashboard.cards import Card
from margingate_dashboard.context import flip_text
from margingate_dashboard.facts.policies import RUNNING, VERIFYING, present
from margingate_dashboard.figures import flips as figures
from margingate_dashboard.rates import at_most, of, share, upper_95
from margingate_dashboard.tables import FLIP_CODES, FLIP_COLUMNS, MOST_FLIPS, flip_list
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED
from margingate_dashboard.ui import Page

STEPS = (*FLIP_COLUMNS, "prefill", "verified", "examined", "structural")


class Found(NamedTuple):
    """What the page shows, counted over the run's decode steps."""

    steps: int
    """Decode steps under a policy that verifies: where a flip can be seen."""
    others: int
    """Decode steps under other policies."""
    verified: int
    examined: int
    """Untriggered steps that were verified."""
    above: int
    """Flips among them."""
    structural: int
    policies: list[str]
    states: dict[str, int]
    requests: int
    touched: int
    """Requests with a flip."""
    table: pd.DataFrame
    figures: dict[str, go.Figure]


def count_flips(page: Page) -> Found:
    """Count and draw everything on this page."""
    steps = page.steps(*STEPS)
    every = ~states.as_bool(steps["prefill"])
    decode = every & steps["policy"].isin([*VERIFYING, RUNNING, "unknown"]).to_numpy()
    state = steps["state"].to_numpy()[decode]
    seen = steps["verified"].to_numpy()[decode]
    owner = pd.factorize(steps["request"], use_na_sentinel=False)[0][decode]
    flip = np.isin(state, FLIP_CODES)
    requests = int(owner.max(initial=0)) + 1
    known = data.vocabulary(page.data)
    return Found(
        steps=state.size,
        others=int(every.sum()) - state.size,
        verified=int(seen.sum()),
        examined=int(steps["examined"].to_numpy()[decode].sum()),
        above=int(steps["above"].to_numpy()[decode].sum()),
        structural=int(states.as_bool(steps["structural"])[decode].sum()),
        policies=present(steps["policy"]),
        states={s.name: int((state == states.CODE[s.name]).sum()) for s in (REPAIRED, FLIPPED, MISSED)},
        requests=int(np.count_nonzero(np.bincount(owner, minlength=requests))),
        touched=int(np.count_nonzero(np.bincount(owner[flip], minlength=requests))),
        table=flip_list(steps[decode & np.isin(steps["state"].to_numpy(), FLIP_CODES)], known),
        figures=_figures(steps, decode, state, known, page.subtitle) if flip.any() else {},
    )


def _figures(
    steps: pd.DataFrame, decode: np.ndarray, state: np.ndarray, known: dict[int, str], subtitle: str
) -> dict[str, go.Figure]:
    position, labels = figures.ranges(steps["step"].to_numpy()[decode])
    rows, row_labels = figures.ranges(steps["batch_rows"].fillna(0).to_numpy(dtype=np.int32)[decode], 16)
    kinds = tokens.classes(steps["token"], known)[decode]
    margin = np.nan_to_num(steps["margin"].to_numpy()[decode], nan=0.0)
    grid = margin_grid(margin) or 0.0625
    edges = np.array([0.5, 1.5, 2.5, 4.5, 8.5, 16.5, 32.5], dtype=np.float32) * np.float32(grid)
    near = np.searchsorted(edges, margin, side="right")
    margin_labels = ["0", *(f"{grid * k:.6g}" for k in (1, 2, 4, 8, 16, 32)), "more"]
    found = {}
    for name, title, bucket, names in (
        ("by-step", "By step (output token)", position, labels),
        ("by-class", "By class of the committed token", kinds, tokens.CLASSES),
        ("by-margin", "By margin at most, logits", near, margin_labels),
        ("by-batch", "By batch rows", rows, row_labels),
    ):
        found[name] = figures.bars(figures.by_bucket(bucket, state, names), title, subtitle)
    return found


def why_none(found: Found) -> str:
    """Say why there is no flip to show: none happened where somebody looked, or nobody looked, and why."""
    if found.verified:
        bound = at_most(upper_95(0, found.verified))
        return f"{of(0, found.verified)} verified steps flipped: at most {bound} of such steps do (95%)."
    if not found.steps and found.others:
        names = html.escape(" and ".join(found.policies))
        return (
            f"No step of this run was verified: its policy is {names}. Run the same prompts with "
            "<code>--margingate-policy always</code>, or compare two runs on the Compare page."
        )
    if found.structural and found.structural == found.steps:
        return (
            f"All {found.steps:,} decode steps ran inside the probed class: their shape answers for them, and none was "
            "drawn for the audit (<code>--margingate-audit-rate</code>)."
        )
    if not found.steps:
        return "No decode step has been observed: requests with one output token have none, and sampled ones are not observed."
    return f"None of {found.steps:,} decode steps had a margin at or below its threshold, and none was drawn for the audit."


def _detail(page: Page, row: pd.Series) -> None:
    request, number, step = str(row["request"]), int(row["number"]), int(row["step"])
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.markdown(f"**Step {step}** of request **{ui.markdown_safe(request)}**")
            st.page_link(
                ui.PAGES["request"],
                label="Open in Request",
                icon=":material/segment:",
                query_params=links.params(page.run, request, step, number=number),
            )
        steps = data.request_steps(page.info.path, number)
        steps = steps.assign(state=states.classify(steps))
        where = int((steps["step"] < step).sum())
        st.html(tokens.strip(steps.iloc[max(0, where - 40) : where + 25], data.vocabulary(page.data), step))
        why_panel.show(page, steps, step, f"{number}-{step}")
        st.code(
            flip_text(page.run, page.info.manifest, request, steps, step, data.vocabulary(page.data)),
            language=None,
            wrap_lines=True,
        )


@ui.fragment
def _list(page: Page, table: pd.DataFrame) -> None:
    st.markdown("##### Every flip, highest margin first")
    st.caption(
        "Select a row to see it in its text and to copy it for an issue."
        + (f" First {MOST_FLIPS:,} shown." if len(table) == MOST_FLIPS else "")
    )
    rows = ui.chosen_rows(
        table,
        "flips",
        page.exports,
        "flip",
        [f"{number}-{step}" for number, step in zip(table["number"], table["step"])],
        key="table-flips",
        start=(0,),
    )
    if rows:
        _detail(page, table.iloc[rows[0]])
    page.exports.show("flips")


def _page() -> None:
    page = ui.open_page(
        "Flips", "The steps at which the verify chose another token: which ones they are, and what they have in common."
    )
    if page is None:
        return
    found = page.memo("flips", lambda: count_flips(page))
    count, flips = found.states, sum(found.states.values())
    ui.cards(
        [
            Card(
                "Flips",
                f"{flips:,}",
                f"{share(flips, found.verified)} of {found.verified:,} verified steps; {found.steps:,} decode steps under "
                "a policy that verifies",
                FLIPPED.colour,
            ),
            Card("Repaired", f"{count['repaired']:,}", f"{of(count['repaired'], flips)} flips", REPAIRED.colour),
            Card(
                "Missed",
                f"{count['missed']:,}",
                f"{of(count['missed'], flips)} flips: seen by the audit alone",
                MISSED.colour,
            ),
            Card("Above tau", f"{found.above:,}", f"of {found.examined:,} untriggered steps that were verified"),
            Card(
                "Requests with a flip",
                share(found.touched, found.requests),
                f"{of(found.touched, found.requests)} requests",
            ),
        ]
    )
    if not flips:
        ui.empty_state("No confirmed flips", f"<p>{why_none(found)}</p>")
        return
    st.html(tokens.legend(("flipped", "repaired", "missed")))
    ui.pairs(found.figures, page.exports)
    st.caption(
        "Figures count confirmed flips over the decode steps of policies that verify (gate, always)"
        + (f"; {found.others:,} decode steps of others are left out. " if found.others else ". ")
        + "Under the policy gate, flips of steps that were never verified are not in them."
    )
    _list(page, found.table)


if __name__ == "__main__":
    ui.guarded(_page)
