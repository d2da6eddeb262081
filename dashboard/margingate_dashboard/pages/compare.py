"""Compare: two runs of the same prompts, token against token."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import streamlit as st

from margingate_dashboard import align, data, links, states, tokens, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.figures import compare as figures
from margingate_dashboard.rates import of, share
from margingate_dashboard.summary import has_tag, tag
from margingate_dashboard.theme import MISSED, REPAIRED
from margingate_dashboard.ui import Page
from sglang_margingate.trace import RunInfo

BEFORE, AFTER = 60, 90
"""Tokens shown around the first divergence."""


@st.cache_data(max_entries=8, show_spinner=False)
def _compared(a: str, b: str, now_a: object, now_b: object) -> tuple[pd.DataFrame, str]:
    del now_a, now_b
    left, right = data.run_data(Path(a)), data.run_data(Path(b))
    columns = align.REQUEST_COLUMNS
    rows = [run.requests(*columns) for run in (left, right)]
    ids = [set(r["request_id"].tolist()) for r in rows]
    if 2 * len(ids[0] & ids[1]) < min(map(len, ids)):
        # Prompt texts are read only where ids do not tell.
        rows = [run.requests(*columns, "prompt_text") for run in (left, right)]
    pairs = align.pair(*rows)
    steps = [run.steps(*align.STEP_COLUMNS) for run in (left, right)]
    table = align.divergences(pairs.table, *steps)
    ends = [dict(zip(r["request"].tolist(), r["finish_reason"].astype(str).tolist())) for r in rows]
    table["ends_a"], table["ends_b"] = table["a"].map(ends[0]), table["b"].map(ends[1])
    table["dataset"] = table["dataset"].map(tag)
    return table, pairs.how


def _other(page: Page) -> RunInfo | None:
    infos = {i.name: i for i in data.runs(links.trace_dir()) if i.name != page.run}
    if not infos:
        ui.empty_state(
            "One run is not enough",
            "<p>Record the same prompts again (another policy, batch size or machine) into this trace folder.</p>",
        )
        return None
    asked = st.query_params.get("other")
    linked = links.known_run(asked, infos)
    if asked is not None and asked != page.run and linked is None:
        st.warning(
            f"There is no run named “{ui.markdown_safe(asked[:80])}” in this trace folder.", icon=":material/link_off:"
        )
    name = linked or links.known_run(st.session_state.get("other"), infos) or next(iter(infos))
    st.session_state["other"] = st.session_state["other_box"] = name
    if asked != name:
        st.query_params["other"] = name

    def remember() -> None:
        st.session_state["other"] = st.query_params["other"] = st.session_state["other_box"]

    st.selectbox(
        f"Compare {ui.markdown_safe(page.run)} with", list(infos), key="other_box", on_change=remember, width=420
    )
    return infos[name]


def _strips(a: RunInfo, b: RunInfo, row: pd.Series) -> None:
    first = None if pd.isna(row["first"]) else int(row["first"])
    cells = []
    for info, number in ((a, row["a"]), (b, row["b"])):
        steps = data.request_steps(info.path, int(number))
        steps = steps.assign(state=states.classify(steps))
        begin = 0 if first is None else max(0, first - BEFORE)
        window = steps[(steps["step"] >= begin) & (steps["step"] < begin + BEFORE + AFTER)]

        def style(step: dict[str, object]) -> str:
            at = int(step["step"])  # type: ignore[call-overload]
            return "same" if first is None or at < first else ("diverged" if at == first else "after")

        ended = "" if first is None or (steps["step"] >= first).any() else f" (ended after {len(steps):,} tokens)"
        title = f"<h4>{tokens.visible_html(info.name, '')}{ended}</h4>"
        cells.append(
            f"<div>{title}{tokens.strip(window, data.vocabulary(data.run_data(info.path)), first, style)}</div>"
        )
    st.html(f'<div class="mg-two">{"".join(cells)}</div>')
    with st.container(horizontal=True):
        for info, number, rid in ((a, row["a"], row["id_a"]), (b, row["b"], row["id_b"])):
            st.page_link(
                ui.PAGES["request"],
                label=f"Open in Request ({ui.markdown_safe(info.name)})",
                icon=":material/segment:",
                query_params=links.params(info.name, str(rid), first, number=number),
            )


@ui.fragment
def _list(page: Page, other: RunInfo, table: pd.DataFrame) -> None:
    st.markdown("##### Requests, earliest divergence first")
    only = st.toggle(
        "Only requests that diverge", value=bool((~table["identical"]).any()), key=f"only-{page.run}-{other.name}"
    )
    shown = table[~table["identical"]] if only else table
    shown = shown.sort_values("first", na_position="last", kind="stable").reset_index(drop=True)
    more = {"selection_default": {"selection": {"rows": [0]}}} if len(shown) else {}
    picked = ui.table(
        shown,
        "divergences",
        page.exports,
        on_select="rerun",
        selection_mode="single-row",
        key=f"pairs-{page.run}-{other.name}-{only}",
        **more,
        column_config={
            "first": st.column_config.NumberColumn(
                "first divergence", help="Step of the first different token; empty where identical"
            ),
            "margin_a": st.column_config.NumberColumn(f"margin in {page.run}", format="%.4g"),
            "margin_b": st.column_config.NumberColumn(f"margin in {other.name}", format="%.4g"),
            "rows_a": st.column_config.NumberColumn("batch rows a"),
            "rows_b": st.column_config.NumberColumn("batch rows b"),
        },
    )
    rows = [i for i in picked.selection.rows if i < len(shown)]
    if rows:
        _strips(page.info, other, shown.iloc[rows[0]])
    page.exports.show(st.container(horizontal_alignment="right"), "compare")


def _page() -> None:
    page = ui.open_page("Compare", "Two runs, same prompts: which responses are the same, and where the others part.")
    if page is None:
        return
    other = _other(page)
    if other is None:
        return
    table, how = _compared(
        str(page.info.path), str(other.path), data.signature(page.info.path), data.signature(other.path)
    )
    if page.datasets is not None:
        table = table[has_tag(table["dataset"], page.datasets)]
    st.caption(f":material/link: {how}")
    if table.empty:
        ui.empty_state(
            "Nothing to compare", "<p>No request of one run could be matched with a request of the other.</p>"
        )
        return
    same = int(table["identical"].sum())
    apart = table.loc[~table["identical"]]
    compared = int(table[["tokens_a", "tokens_b"]].min(axis=1).sum())
    before = int(table["first"].fillna(table[["tokens_a", "tokens_b"]].min(axis=1)).astype("Int64").sum())
    ends = int((table["ends_a"] == table["ends_b"]).sum())
    ui.cards(
        [
            Card(
                "Identical sequences",
                share(same, len(table)),
                f"{of(same, len(table))} matched requests",
                REPAIRED.colour,
            ),
            Card("Diverged", f"{len(apart):,}", f"{of(len(apart), len(table))} matched requests", MISSED.colour),
            Card("Tokens before divergence", share(before, compared), f"{of(before, compared)} tokens that both have"),
            Card(
                "Median first divergence",
                f"step {int(apart['first'].median()):,}" if len(apart) else "–",
                f"of {len(apart):,} requests that diverge",
            ),
            Card("Same finish reason", share(ends, len(table)), f"{of(ends, len(table))} matched requests"),
        ]
    )
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
