"""Compare: two runs of the same prompts, token against token, with what they were started with and what they cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import address, align, choose, data, identity_card, links, sidebyside, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.facts import identity, notes, policies, versus
from margingate_dashboard.figures import compare as figures
from margingate_dashboard.rates import of, share
from margingate_dashboard.summary import tag
from margingate_dashboard.theme import MISSED, REPAIRED
from margingate_dashboard.ui import Page
from sglang_margingate.trace import RunInfo

BASELINE = "baseline"
"""A run with this tag is what others are compared with, where nothing else is chosen."""


@st.cache_data(max_entries=8, show_spinner=False)
def _compared(a: str, b: str, now_a: object, now_b: object) -> tuple[pd.DataFrame, str, tuple[int, int]]:
    del now_a, now_b
    left, right = data.run_data(Path(a)), data.run_data(Path(b))
    columns = align.REQUEST_COLUMNS
    rows = [run.requests(*columns) for run in (left, right)]
    ids = [set(r["request_id"].tolist()) for r in rows]
    if 2 * len(ids[0] & ids[1]) < min(map(len, ids)) and not all(r["prompt_digest"].notna().all() for r in rows):
        # Prompt texts are read only where nothing else tells.
        rows = [run.requests(*columns, "prompt_text") for run in (left, right)]
    pairs = align.pair(*rows)
    steps = [run.steps(*align.STEP_COLUMNS) for run in (left, right)]
    table = align.divergences(pairs.table, *steps)
    ends = [dict(zip(r["request"].tolist(), r["finish_reason"].astype(str).tolist())) for r in rows]
    table["ends_a"], table["ends_b"] = table["a"].map(ends[0]), table["b"].map(ends[1])
    table["dataset"] = table["dataset"].map(tag)
    return table, pairs.how, pairs.unobserved


def _baseline(infos: dict[str, RunInfo]) -> str:
    return next((n for n, i in infos.items() if BASELINE in notes.read_note(i.path).tags), next(iter(infos)))


def _other(page: Page) -> RunInfo | None:
    every = data.runs(links.trace_dir())
    infos = {i.name: i for i in every if i.name != page.run}
    if not infos:
        ui.empty_state(
            "One run is not enough",
            "<p>Record the same prompts again (another policy, batch size or machine) into this trace folder.</p>",
        )
        return None
    asked = address.get("other")
    if asked is not None and asked != page.run and links.known_run(asked, infos) is None:
        choose.missing(asked, every, "other")
        return None
    left, right = st.columns([0.7, 0.3], vertical_alignment="bottom")
    name = (
        links.known_run(asked, infos)
        or links.known_run(st.session_state.get("pinned_other"), infos)
        or _baseline(infos)
    )
    st.session_state["pinned_other"] = st.session_state["other_box"] = name

    def remember() -> None:
        if st.session_state["other_box"] is not None:
            other = st.session_state["pinned_other"] = st.session_state["other_box"]
            address.write(pair=None, reference=None, cell=None, answer=None, other=other)

    left.selectbox(
        f"Compare {ui.markdown_safe(page.run)} (a) with (b)",
        list(infos),
        key="other_box",
        on_change=remember,
        help=f"A run tagged “{BASELINE}” on the Runs page comes first.",
    )
    choose.here("Swap a and b", right, ":material/swap_horiz:", run=name, other=page.run)
    return infos[name]


def _settings(page: Page, other: RunInfo) -> None:
    """Warn where the runs are not of one model, and show every setting that differs."""
    frame = versus.settings(page.info.manifest, other.manifest)
    grave = [str(f) for f in frame["field"] if f in versus.GRAVE]
    if grave:
        st.warning(
            f"These runs differ in {ui.markdown_safe(', '.join(grave))}: other answers are no sign of a flip.",
            icon=":material/warning:",
        )
    with st.expander(f"What differs in how they were started: {len(frame):,} settings", expanded=False):
        if frame.empty:
            st.caption("Nothing that the manifests name.")
        else:
            ui.table(frame, "settings", page.exports)


def _paired(page: Page, other: RunInfo) -> None:
    kept = [identity.compared(identity_card.answers_of(info)) for info in (page.info, other)]
    found = versus.paired(*kept)
    if not found.prompts:
        return
    st.markdown("##### Prompts that both runs answered more than once")
    st.caption(
        f"All answers the same in both: {of(found.both, found.prompts)}; only in a: {found.only_a:,}; only in b: {found.only_b:,}; "
        f"in neither: {found.neither:,}. McNemar's exact test of a against b: p = {found.p_value:.3g}."
    )


@ui.fragment
def _list(page: Page, other: RunInfo, table: pd.DataFrame) -> None:
    st.markdown("##### Requests, earliest divergence first")
    both = table["identical"].nunique() > 1
    only = both and st.toggle("Only requests that diverge", value=True, key="only", bind="query-params")
    shown = table[~table["identical"]] if only else table
    shown = shown.sort_values("first", na_position="last", kind="stable").reset_index(drop=True)
    first = ["dataset", "policy_a", "policy_b", "identical", "first", "margin_a", "margin_b", "rows_a", "rows_b"]
    listed = shown.assign(
        identical=np.where(shown["identical"], "yes", "no")
    )  # a column of booleans shows as boxes to tick
    rows = ui.chosen_rows(
        listed[[*first, *(c for c in listed.columns if c not in first)]],
        "divergences",
        page.exports,
        "pair",
        [f"{a}-{b}" for a, b in zip(shown["a"], shown["b"])],
        key=f"pairs-{page.run}-{other.name}-{only}",
        start=(0,),
        column_config={
            "a": "number a",
            "b": "number b",
            "policy_a": "policy a",
            "policy_b": "policy b",
            "id_a": "request a",
            "id_b": "request b",
            "tokens_a": "tokens a",
            "tokens_b": "tokens b",
            "ends_a": "finish a",
            "ends_b": "finish b",
            "first": st.column_config.NumberColumn(
                "first divergence", help="Step of the first different token; empty where identical"
            ),
            "margin_a": st.column_config.NumberColumn("margin a", format="%.6g", help=page.run),
            "margin_b": st.column_config.NumberColumn("margin b", format="%.6g", help=other.name),
            "rows_a": st.column_config.NumberColumn("batch rows a"),
            "rows_b": st.column_config.NumberColumn("batch rows b"),
        },
    )
    if rows:
        row = shown.iloc[rows[0]]
        left = sidebyside.Side(page.info, int(row["a"]), str(row["id_a"]), f"a: {page.run}, {row['policy_a']}")
        right = sidebyside.Side(other, int(row["b"]), str(row["id_b"]), f"b: {other.name}, {row['policy_b']}")
        sidebyside.show(ui.PAGES, left, right)
    page.exports.show("compare")


def headline(table: pd.DataFrame) -> list[Card]:
    """Return the headline numbers of matched requests."""
    same = int(table["identical"].sum())
    apart = table.loc[~table["identical"]]
    compared = int(table[["tokens_a", "tokens_b"]].min(axis=1).sum())
    before = int(table["first"].fillna(table[["tokens_a", "tokens_b"]].min(axis=1)).astype("Int64").sum())
    ends = int((table["ends_a"] == table["ends_b"]).sum())
    return [
        Card(
            "Identical sequences", share(same, len(table)), f"{of(same, len(table))} matched requests", REPAIRED.colour
        ),
        Card("Diverged", f"{len(apart):,}", f"{of(len(apart), len(table))} matched requests", MISSED.colour),
        Card("Tokens before divergence", share(before, compared), f"{of(before, compared)} tokens that both have"),
        Card(
            "Median first divergence",
            f"step {float(apart['first'].median()):,.6g}" if len(apart) else "–",
            f"of {len(apart):,} requests that diverge",
        ),
        Card("Same finish reason", share(ends, len(table)), f"{of(ends, len(table))} matched requests"),
    ]


def _page() -> None:
    page = ui.open_page(
        "Compare", "Two runs, same prompts: which responses are the same, and where the others part.", link=False
    )
    if page is None:
        return
    other = _other(page)
    if other is None:
        return
    choose.copy_link(run=page.run, other=other.name)
    table, how, unobserved = _compared(
        str(page.info.path), str(other.path), data.signature(page.info.path), data.signature(other.path)
    )
    kept = page.requests("request")["request"]
    table = table[table["a"].isin(kept)] if page.filters.columns else table
    _settings(page, other)
    left_out = ""
    if any(unobserved):
        left_out = f" Left out, as no step of them was observed (policy off, or sampled): {unobserved[0]:,} of a, {unobserved[1]:,} of b."
    st.caption(f":material/link: {how}{left_out}")
    identity_card.show([page.info, other], page.exports, f"{page.run}-{other.name}")
    if table.empty:
        ui.empty_state(
            "Nothing to compare", "<p>No request of one run could be matched with a request of the other.</p>"
        )
        page.exports.show("compare")
        return
    st.markdown("##### Matched requests, by the policies of both")
    ui.table(
        versus.by_policies(table),
        "by-policies",
        page.exports,
        column_config={
            "identical, %": st.column_config.NumberColumn(format="%.2f%%"),
        },
    )
    ui.cards(headline(table))
    _paired(page, other)
    columns = (*policies.COLUMNS, "request", "ttft_ms", "tpot_ms", "e2e_ms")
    times = versus.deltas(table, page.data.requests(*columns), data.run_data(other.path).requests(*columns))
    if len(times):
        st.markdown("##### Time of matched requests: b against a, in ms")
        formats = {n: st.column_config.NumberColumn(format="%.2f") for n in times.columns if n not in ("of", "pairs")}
        ui.table(times, "times", page.exports, column_config=formats)
    ui.chart(
        figures.still_identical(
            table.assign(dataset=table["dataset"].map(ui.safe)), page.subtitle + ui.safe(f" against {other.name}")
        ),
        "still-identical",
        page.exports,
    )
    _list(page, other, table)


if __name__ == "__main__":
    ui.guarded(_page)
