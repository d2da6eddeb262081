"""Margins: how they are distributed, and what another threshold would do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import states, ui, whatif
from margingate_dashboard.bins import LINEAR, LOGARITHMIC, margin_bins, margin_grid
from margingate_dashboard.cards import Card
from margingate_dashboard.facts.policies import leading
from margingate_dashboard.figures import margins as figures
from margingate_dashboard.rates import at_most, of, share
from margingate_dashboard.summary import has_tag, tags
from margingate_dashboard.theme import FLIPPED, MISSED, THRESHOLD_COLOUR, TRIGGERED
from margingate_dashboard.ui import Page

STEPS = ("policy", "dataset", "margin", "threshold", "prefill", "flipped", "verified", "examined", "structural")


class Prepared(NamedTuple):
    """What the page looks at, sorted once."""

    parts: dict[str, whatif.Sample]
    """By dataset."""
    start: float
    """The threshold in force at most steps."""
    policy: str
    """Policy that bounds are of: the leading one."""


def samples(steps: pd.DataFrame, names: list[str], policy: str) -> dict[str, whatif.Sample]:
    """Return the sorted decode steps of each dataset; bounds are of one policy's."""
    found = {}
    for name in names:
        mine = steps[has_tag(steps["dataset"], {name})]
        found[name] = whatif.make_sample(
            mine["margin"].to_numpy(),
            states.as_bool(mine["flipped"]),
            mine["verified"].to_numpy(),
            mine["examined"].to_numpy(),
            ~states.as_bool(mine["prefill"]),
            states.as_bool(mine["structural"]),
            (mine["policy"] == policy).to_numpy(),
        )
    return found


def _prepared(page: Page) -> Prepared:
    """Sort the run's steps, and find the threshold in force at most of them: once, not at every move of the slider."""
    steps = page.steps(*STEPS)
    values, times = np.unique(steps["threshold"].to_numpy(), return_counts=True)
    known = np.isfinite(values)
    start = float(values[known][np.argmax(times[known])]) if known.any() else 0.5
    policy = leading(steps["policy"])
    return Prepared(samples(steps, tags(steps["dataset"]), policy), start, policy)


def outcome_cards(result: whatif.Outcome, threshold: float, policy: str) -> list[Card]:
    """Return what a threshold would have done, each with its counts; the bound is of one policy's steps."""
    if result.complete:
        bound = f"policy {policy}: every step above it was verified; at most {at_most(result.miss_upper)} of further steps (95%)"
    elif result.miss_upper < 1.0:
        bound = f"known ones; with those never looked at, at most {at_most(result.miss_upper)} of policy {policy}'s steps (95%)"
    else:
        bound = f"known ones only: no step of policy {policy} tells of those never looked at"
    return [
        Card("Threshold (tau)", f"{threshold:.6g}", "logits; margin <= tau triggers", THRESHOLD_COLOUR),
        Card(
            "Would trigger",
            share(result.triggered, result.steps),
            f"{of(result.triggered, result.steps)} decode steps",
            TRIGGERED.colour,
        ),
        Card(
            "Flips caught",
            f"{result.flips - result.missed:,}",
            f"{of(result.flips - result.missed, result.flips)} known flips",
            FLIPPED.colour,
        ),
        Card("Flips missed", f"{result.missed:,}", bound, MISSED.colour),
    ]


def slider_step(start: float, top: float, grid: float) -> float:
    """Return the slider's step: the threshold in force is one of its stops, and 800 at most lead to ``top``.

    On the grid of the data where that allows it, so that every stop does something.
    """
    step = grid / 2 if grid else 0.0
    while step and top / step > 500:
        step *= 2
    if step and abs(start / step - round(start / step)) < 1e-9:
        return step
    return start / max(1, int(start / (top / 400))) if start > 0 else top / 400


@ui.fragment
def _explore(page: Page, parts: dict[str, whatif.Sample], start: float, policy: str) -> None:
    whole = page.memo("margins-joined", lambda: whatif.join(list(parts.values())))
    top = whatif.highest(whole, start)
    grid = page.memo("grid", lambda: margin_grid(whole.margins))
    step = slider_step(start, top, grid)
    top = float(np.ceil(top / step) * step)
    if isinstance(st.session_state.get("tau"), float) and st.session_state["tau"] > top:
        st.session_state["tau"] = top  # of another run
    left, middle, right = st.columns([0.6, 0.2, 0.2], vertical_alignment="bottom")
    threshold = left.slider(
        "Threshold (tau), logits",
        0.0,
        top,
        min(start, top),
        step=step,
        format="%.6g",
        key="tau",
        bind="query-params",
        help="Drag, or focus it and use the arrow keys. Nothing is changed on any server.",
    )
    scale = (
        middle.segmented_control(
            "Margins", (LOGARITHMIC, LINEAR), default=LOGARITHMIC, key="scale", bind="query-params"
        )
        or LOGARITHMIC
    )
    logs = (
        right.segmented_control("Counts", (LOGARITHMIC, LINEAR), default=LOGARITHMIC, key="counts", bind="query-params")
        or LOGARITHMIC
    ) == LOGARITHMIC
    ui.cards(outcome_cards(whatif.outcome(whole, threshold), threshold, policy))
    bins = page.memo("margin-bins", lambda: margin_bins(whole.margins, scale), scale)
    names = {name: ui.safe(name) for name in parts}
    ui.chart(
        figures.histogram(
            {names[n]: s.others for n, s in parts.items()},
            {names[n]: s.at_flips for n, s in parts.items()},
            bins,
            scale,
            threshold,
            logs,
            page.subtitle,
        ),
        "margins",
        page.exports,
    )
    if len(parts) > figures.MAX_FACETS:
        st.caption(
            f"{of(figures.MAX_FACETS, len(parts))} datasets shown; choose others with the filter in the sidebar."
        )
    ui.chart(
        figures.effect(
            {names[n]: whatif.curve(s, top) for n, s in list(parts.items())[: figures.MAX_FACETS]},
            threshold,
            page.subtitle,
        ),
        "threshold-effect",
        page.exports,
    )
    rows = []
    for name, sample in parts.items():
        r = whatif.outcome(sample, threshold)
        rows.append(
            {
                "dataset": name,
                "threshold": threshold,
                "decode steps": r.steps,
                "would trigger": r.triggered,
                "trigger rate": 100 * r.triggered / r.steps if r.steps else None,
                "known flips": r.flips,
                "missed": r.missed,
                "missed at most (95%)": 100 * r.miss_upper if r.miss_upper < 1 else None,
                f"known, policy {policy}": "exactly" if r.complete else "where verified",
            }
        )
    st.markdown("##### At this threshold, by dataset")
    ui.table(
        pd.DataFrame(rows),
        "at-threshold",
        page.exports,
        column_config={
            **{
                n: st.column_config.NumberColumn(format="localized")
                for n in ("decode steps", "would trigger", "known flips", "missed")
            },
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%"),
            "missed at most (95%)": st.column_config.NumberColumn(
                format="%.4f%%",
                help=f"Upper bound per step of policy {policy}; empty where no step of it tells of those never looked at",
            ),
        },
    )
    page.exports.show("margins")


def _page() -> None:
    page = ui.open_page(
        "Margins",
        "Flips live at low margins. Move the threshold and see at once what it would verify and what it would miss.",
    )
    if page is None:
        return
    found = page.memo("margins", lambda: _prepared(page))
    parts = {name: sample for name, sample in found.parts.items() if sample.margins.size}
    if not parts:
        ui.empty_state(
            "No margins yet", "<p>No decode step of this run (or of the chosen datasets) has been recorded.</p>"
        )
        return
    _explore(page, parts, found.start, found.policy)


if __name__ == "__main__":
    ui.guarded(_page)
