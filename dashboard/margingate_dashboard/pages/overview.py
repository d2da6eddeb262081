"""Overview: a run's headline numbers, its course over time, and what its responses may claim."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from margingate_dashboard import annotate, data, identity_card, links, ui
from margingate_dashboard.cards import headline_cards
from margingate_dashboard.facts import course
from margingate_dashboard.facts.policies import leading
from margingate_dashboard.figures import classes, timeline
from margingate_dashboard.figures import overview as figures
from margingate_dashboard.rates import of
from margingate_dashboard.summary import STEP_COLUMNS, Headline, guarantee_notes, headline
from margingate_dashboard.tables import FLIP_CODES, by_dataset, by_policy, map_table
from sglang_margingate.words import decode_sizes

STEPS = tuple(dict.fromkeys((*STEP_COLUMNS, *course.STEP_COLUMNS, "dataset", "batch_rows")))
REQUESTS = (
    "dataset",
    "policy",
    "guarantee",
    "guarantee_note",
    "overhead_ms",
    "e2e_ms",
    "output_tokens",
    "ttft_ms",
    "tpot_ms",
    "time",
)

PREFILL = {"batched": "batched", "grid": "one request at a time"}


class Counts(NamedTuple):
    """What the page shows."""

    policy: str
    """Policy that the cards are of."""
    total: Headline
    by_policy: pd.DataFrame
    by_dataset: pd.DataFrame
    figures: dict[str, go.Figure]


def _counts(page: ui.Page, requests: pd.DataFrame) -> Counts:
    steps = page.steps(*STEPS)
    policy = leading(requests["policy"]) if len(requests) else leading(steps["policy"])
    shown = {
        "over-time": figures.events(figures.over_time(steps), page.subtitle),
        "so-far": figures.so_far(course.so_far(steps, requests, policy), policy, page.subtitle),
        "guarantees": figures.guarantees(requests, page.subtitle),
    }
    mine = headline(steps[(steps["policy"] == policy).to_numpy()])
    return Counts(policy, mine, by_policy(steps, requests), by_dataset(steps, requests), shown)


def counts_config() -> dict[str, object]:
    """Return how columns of counts are written."""
    number = st.column_config.NumberColumn
    return {
        "low margins": number(
            format="localized", help="Decode steps with a margin at or below tau; under log none is verified"
        ),
        "decode steps": number(format="localized"),
        "trigger rate": number(format="%.2f%%", help="low margins / decode steps"),
        "flips per 1,000 steps": number(format="%.2f", help="Of decode steps under a policy that verifies"),
        "above tau": number(help="Flips that the margin alone would not have had verified"),
        "audited": st.column_config.TextColumn(help="Untriggered gate steps that the audit verified, of all of them"),
        "missed at most (95%)": number(format="%.4f%%", help="Of untriggered gate steps, from those audited"),
        "overhead": number(format="%.2f%%", help="Verify and hold time over end-to-end time"),
        "median TTFT": number(format="%.1f ms"),
        "median TPOT": number(format="%.2f ms"),
    }


def _notes(page: ui.Page, requests: pd.DataFrame) -> None:
    """Say what lowers the guarantee, and what the server's invariance self-test found."""
    manifest = page.info.manifest
    test = manifest.get("self_test")
    if isinstance(test, dict):
        if test.get("passed"):
            counts = f"{test.get('trials', '?')} trials at {test.get('rows', '?')} rows"
            st.caption(f":material/verified: Invariance self-test passed ({ui.markdown_safe(counts)})")
        else:
            where = ui.markdown_safe(test.get("broken_layer") or test.get("detail") or "no layer named")
            st.warning(f"The invariance self-test failed at: {where}", icon=":material/warning:")
    noted = manifest.get("notes")
    for note in noted if isinstance(noted, list) else []:
        st.caption(f":material/warning: Every guarantee of this server is lowered: {ui.markdown_safe(note)}")
    for line in guarantee_notes(requests):
        st.caption(f":material/info: {ui.markdown_safe(line)}")


def _ticker(page: ui.Page) -> None:
    """Show the newest flips of a live run; the page shows itself again as the run grows."""

    def make() -> pd.DataFrame:
        return course.newest_flips(page.steps(*course.TICKER_COLUMNS), data.vocabulary(page.data))

    frame = page.memo("newest-flips", make)
    st.markdown("##### Newest flips")
    if frame.empty:
        st.caption("None has been confirmed yet.")
        return
    opens = [
        links.href("request", page.run, r, int(s), number=n)
        for r, s, n in zip(frame["request"], frame["step"], frame["number"])
    ]
    ui.table(
        pd.concat([pd.Series(opens, name="open", dtype=object), frame], axis=1),
        "newest-flips",
        page.exports,
        column_config={
            "open": st.column_config.LinkColumn("", display_text="open", width="small"),
            "time": st.column_config.DatetimeColumn(format="HH:mm:ss.SSS", help="UTC"),
        },
    )


@ui.fragment
def _timeline(page: ui.Page) -> None:
    """Show who ran with whom, only where it is asked for: a figure of hundreds of bars takes the browser a while."""
    if not st.toggle("Batch timeline: who ran with whom", key="timeline", bind="query-params"):
        return

    def make() -> pd.DataFrame:
        steps = page.steps("request", "request_id", "policy", "time", "state")
        return timeline.spans(steps.assign(flip=np.isin(steps["state"].to_numpy(), FLIP_CODES)))

    table = page.memo("timeline", make)
    start = 0
    if len(table) > timeline.SHOWN:
        start = st.slider(
            "From request, in order of beginning",
            0,
            len(table) - 1,
            0,
            step=timeline.SHOWN // 2,
            key="from",
            bind="query-params",
        )
    ui.chart(timeline.timeline(table, start, page.subtitle), "timeline", page.exports)


def _map(page: ui.Page) -> None:
    """Show the invariance map of a server on the canonical fast path."""
    found = page.info.manifest.get("invariance")
    if not isinstance(found, dict) or not isinstance(found.get("map"), dict):
        return
    st.markdown("##### Invariance map")
    held = "inside its class" if found.get("decode_ok") else "outside: gated by margin"
    tried = found.get("prefill", "batched" if found.get("batched_prefill") else "grid")  # before 2.0: one of two
    prefill = PREFILL.get(str(tried), "not repeatable, so no response has a guarantee")
    st.caption(
        f"Decode {held}, {ui.markdown_safe(decode_sizes(found))}. Prefill {prefill}. In the map, forwards of M "
        "rows with one colour give a row the same bits; grey: a row's place among the others matters."
    )
    ui.chart(classes.heat_map(found["map"], page.subtitle), "invariance-map", page.exports)
    ui.table(map_table(found["map"]), "invariance", page.exports)


def _page() -> None:
    page = ui.open_page(
        "Overview", "What happened in this run: how often steps were verified, what flipped, and at what cost."
    )
    if page is None:
        return
    requests = page.requests(*REQUESTS)
    found = page.memo("overview", lambda: _counts(page, requests))
    mine = requests[requests["policy"].astype(str) == found.policy]
    identity_card.show([page.info], page.exports, page.run)
    if len(found.by_policy) > 1:
        st.markdown(f"##### Policy {ui.markdown_safe(found.policy)}: {of(len(mine), len(requests))} finished requests")
    ui.cards(headline_cards(found.total, mine, found.policy))
    if len(found.by_policy) > 1:
        st.markdown("##### By policy")
        ui.table(found.by_policy, "policies", page.exports, column_config=counts_config())
    if page.info.is_live:
        _ticker(page)
    annotate.listed(page)
    for name, figure in found.figures.items():
        ui.chart(figure, name, page.exports)
    _notes(page, requests)
    st.markdown("##### By dataset")
    ui.table(found.by_dataset, "datasets", page.exports, column_config=counts_config())
    _timeline(page)
    _map(page)
    with st.expander("Manifest: versions, flags, threshold profile, self-test"):
        st.code(json.dumps(page.info.manifest, indent=2, default=str), language="json")
    page.exports.show("overview")


if __name__ == "__main__":
    ui.guarded(_page)
