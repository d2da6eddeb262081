"""Overview: a run's headline numbers, its course over time, and what its responses may claim."""

from __future__ import annotations

import json

import pandas as pd
import streamlit as st

from margingate_dashboard import ui
from margingate_dashboard.figures import overview as figures
from margingate_dashboard.rates import at_most, milliseconds, of, share
from margingate_dashboard.summary import Headline, has_tag, headline, overhead, tag
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, TRIGGERED

STEPS = ("time", "dataset", "prefill", "state", "triggered", "verified", "batch_rows")
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


def missed_card(total: Headline) -> ui.Card:
    """Return the card of missed flips: a count, and the bound that goes with how many steps were looked at."""
    if total.steps and not total.untriggered:
        return ui.Card("Missed flips", "0", "every decode step triggered", MISSED.colour)
    if not total.examined:
        return ui.Card("Missed flips", "unknown", "no untriggered step was audited: set an audit rate", MISSED.colour)
    if total.miss_known:
        sub = f"{of(total.missed, total.examined)} untriggered steps, all of them verified"
    else:
        sub = (
            f"{of(total.missed, total.examined)} audited steps: "
            f"at most {at_most(total.miss_upper)} of untriggered ones (95%)"
        )
    return ui.Card("Missed flips", f"{total.missed:,}", sub, MISSED.colour)


def headline_cards(total: Headline, requests: pd.DataFrame) -> list[ui.Card]:
    """Return the cards of a run's headline numbers."""
    added, whole = overhead(requests)
    claims = requests["guarantee"].astype(str)
    held = int(claims.isin(("structural", "verified", "gated")).sum())
    return [
        ui.Card(
            "Requests finished",
            f"{len(requests):,}",
            f"{int(requests['output_tokens'].fillna(0).sum()):,} output tokens",
        ),
        ui.Card(
            "Trigger rate",
            share(total.triggered, total.steps),
            f"{of(total.triggered, total.steps)} decode steps",
            TRIGGERED.colour,
        ),
        ui.Card(
            "Flips",
            f"{total.flips:,}",
            f"{share(total.flips, total.verified)} of {total.verified:,} verified steps",
            FLIPPED.colour,
        ),
        ui.Card("Repaired", f"{total.repaired:,}", f"{of(total.repaired, total.flips)} flips", REPAIRED.colour),
        missed_card(total),
        ui.Card("Overhead", share(added, whole), f"{milliseconds(added)} of {milliseconds(whole)} end to end"),
        ui.Card("With a guarantee", share(held, len(requests)), f"{of(held, len(requests))} finished requests"),
    ]


def by_dataset(steps: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row of counts per dataset tag."""
    rows = []
    names = sorted({tag(v) for v in steps["dataset"].unique()} | {tag(v) for v in requests["dataset"].unique()})
    for name in names:
        total = headline(steps[has_tag(steps["dataset"], {name})])
        mine = requests[has_tag(requests["dataset"], {name})]
        rows.append(
            {
                "dataset": name,
                "requests": len(mine),
                "decode steps": total.steps,
                "triggered": total.triggered,
                "trigger rate": 100 * total.triggered / total.steps if total.steps else None,
                "flips": total.flips,
                "flips per 1,000 steps": 1000 * total.flips / total.steps if total.steps else None,
                "repaired": total.repaired,
                "missed": total.missed,
                "untriggered verified": of(total.examined, total.untriggered),
                "median TTFT": mine["ttft_ms"].median(),
                "median TPOT": mine["tpot_ms"].median(),
            }
        )
    return pd.DataFrame(rows)


def _notes(requests: pd.DataFrame) -> None:
    notes = requests["guarantee_note"].dropna().value_counts()
    for note, times in notes.head(5).items():
        st.caption(f":material/info: {of(times, len(requests))} requests claim less: {ui.markdown_safe(note)}")


def _page() -> None:
    page = ui.open_page(
        "Overview", "What happened in this run: how often steps were verified, what flipped, and at what cost."
    )
    if page is None:
        return
    steps, requests = page.data.steps(*STEPS), page.data.requests(*REQUESTS)
    if page.datasets is not None:
        steps = steps[has_tag(steps["dataset"], page.datasets)]
        requests = requests[has_tag(requests["dataset"], page.datasets)]
    ui.cards(headline_cards(headline(steps), requests))
    ui.chart(figures.events(figures.over_time(steps), page.subtitle), "over-time", page.exports)
    ui.chart(figures.guarantees(requests, page.subtitle), "guarantees", page.exports)
    _notes(requests)
    st.markdown("##### By dataset")
    ui.table(
        by_dataset(steps, requests),
        "datasets",
        page.exports,
        column_config={
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%"),
            "flips per 1,000 steps": st.column_config.NumberColumn(format="%.2f"),
            "median TTFT": st.column_config.NumberColumn(format="%.1f ms"),
            "median TPOT": st.column_config.NumberColumn(format="%.2f ms"),
        },
    )
    with st.expander("Manifest: versions, flags, threshold profile, self-test"):
        st.code(json.dumps(page.info.manifest, indent=2, default=str), language="json")
    page.exports.show(page.export_place, "overview")


if __name__ == "__main__":
    ui.guarded(_page)
