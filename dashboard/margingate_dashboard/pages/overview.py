"""Overview: a run's headline numbers, its course over time, and what its responses may claim."""

from __future__ import annotations

import json

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from margingate_dashboard import ui
from margingate_dashboard.cards import headline_cards
from margingate_dashboard.figures import overview as figures
from margingate_dashboard.summary import Headline, guarantee_notes, has_tag, headline
from margingate_dashboard.tables import by_dataset, map_table

STEPS = ("examined", "time", "dataset", "prefill", "state", "triggered", "verified", "batch_rows")
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
)

PREFILL = {"batched": "batched", "grid": "one request at a time"}


def _counts(page: ui.Page, requests: pd.DataFrame) -> tuple[Headline, pd.DataFrame, dict[str, go.Figure]]:
    steps = page.data.steps(*STEPS)
    if page.datasets is not None:
        steps = steps[has_tag(steps["dataset"], page.datasets)]
    shown = {
        "over-time": figures.events(figures.over_time(steps), page.subtitle),
        "guarantees": figures.guarantees(requests, page.subtitle),
    }
    return headline(steps), by_dataset(steps, requests), shown


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


def _map(page: ui.Page) -> None:
    """Show the invariance map of a server on the canonical fast path."""
    found = page.info.manifest.get("invariance")
    if not isinstance(found, dict) or not isinstance(found.get("map"), dict):
        return
    st.markdown("##### Invariance map")
    held = "inside its class" if found.get("decode_ok") else "outside: gated by margin"
    tried = found.get("prefill", "batched" if found.get("batched_prefill") else "grid")  # before 2.0: one of two
    prefill = PREFILL.get(str(tried), "not repeatable, so no response has a guarantee")
    st.caption(f"Decode {held}, at {ui.markdown_safe(found.get('decode_rows', '?'))} rows. Prefill {prefill}.")
    ui.table(map_table(found["map"]), "invariance", page.exports)


def _page() -> None:
    page = ui.open_page(
        "Overview", "What happened in this run: how often steps were verified, what flipped, and at what cost."
    )
    if page is None:
        return
    requests = page.data.requests(*REQUESTS)
    if page.datasets is not None:
        requests = requests[has_tag(requests["dataset"], page.datasets)]
    total, per_dataset, shown = page.memo("overview", lambda: _counts(page, requests))
    ui.cards(headline_cards(total, requests))
    for name, figure in shown.items():
        ui.chart(figure, name, page.exports)
    _notes(page, requests)
    st.markdown("##### By dataset")
    ui.table(
        per_dataset,
        "datasets",
        page.exports,
        column_config={
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%"),
            "flips per 1,000 steps": st.column_config.NumberColumn(format="%.2f"),
            "median TTFT": st.column_config.NumberColumn(format="%.1f ms"),
            "median TPOT": st.column_config.NumberColumn(format="%.2f ms"),
        },
    )
    _map(page)
    with st.expander("Manifest: versions, flags, threshold profile, self-test"):
        st.code(json.dumps(page.info.manifest, indent=2, default=str), language="json")
    page.exports.show(page.export_place, "overview")


if __name__ == "__main__":
    ui.guarded(_page)
