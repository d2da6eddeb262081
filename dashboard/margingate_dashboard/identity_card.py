"""The identity view: prompts by policy, batch and cache, how many were answered the same, and the answers that were not."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from margingate_dashboard import address, data, links, sidebyside, ui
from margingate_dashboard.facts import identity
from margingate_dashboard.rates import of
from margingate_dashboard.report.parts import matrix_table
from sglang_margingate.trace import RunInfo, TraceError

SHOWN = 200
"""Pairs listed at most."""


def answers_of(info: RunInfo) -> pd.DataFrame:
    """Return a run's comparable answers; of runs before schema 2.1 from their texts and tokens."""
    run = data.run_data(info.path)

    def make() -> pd.DataFrame:
        rows = run.requests(*identity.COLUMNS)
        if rows["prompt_digest"].notna().any():
            return identity.answers(rows, info.name)
        texts = run.requests("request", "prompt_text").dropna().drop_duplicates("request", keep="last")
        if texts.empty:
            return identity.answers(rows.iloc[:0], info.name)
        outputs = identity.digests(run.steps("request", "step", "token").dropna())
        return identity.answers(rows, info.name, texts.set_index("request")["prompt_text"], outputs)

    return run.memo("answers-compared", make)


@ui.fragment
def show(infos: list[RunInfo], exports: ui.Exports, key: str) -> None:
    """Show how many prompts of these runs were answered the same whatever the batch; nothing where no prompt came twice."""
    parts = []
    for info in infos:
        try:
            parts.append(answers_of(info))
        except TraceError:
            continue  # the page says what is wrong with it
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    if rows.empty:
        return
    several = len(infos) > 1
    groups = list(dict.fromkeys(zip(rows["run"], rows["policy"])))
    own = identity.compared(rows)
    if own.empty and not several:
        return
    st.markdown("##### Identical answers, whatever the batch")
    names = {
        identity.OWN: None,
        **{f"{policy} of {run}" if several else policy: (run, policy) for run, policy in groups},
    }
    chosen = identity.OWN
    if len(groups) > 1:
        start = identity.OWN if not own.empty else list(names)[1]
        asked, box = address.get("reference"), f"reference-{key}"
        chosen = st.session_state[box] = asked if asked is not None and asked in names else start

        def remember() -> None:
            address.write(reference=st.session_state[box], answer=None)

        st.selectbox("Each answer is compared with", list(names), key=box, width=420, on_change=remember)
    pairs = own if names[chosen] is None else identity.compared(rows, names[chosen])
    found = identity.matrix(pairs)
    if not found:
        st.caption("No prompt of it came twice.")
        return
    st.html(f'<p class="mg-result">{ui.safe(identity.sentence(found, list(dict.fromkeys(rows["run"]))))}</p>')
    frame = matrix_table(found, len(infos))
    cell = ui.chosen_cell(frame, "identity", exports, "cell", key=f"identity-{key}-{chosen}")
    st.caption(
        "Prompts of which every answer in that cell has the reference's tokens and finish reason, of all prompts seen there. "
        "Batch: the largest that a decode step of the answer ran in. Click a cell to see its answers side by side."
    )
    if cell is not None:
        _cell(infos, pairs, list(found), cell, key)


def _cell(
    infos: list[RunInfo],
    pairs: pd.DataFrame,
    groups: list[tuple[str, str]],
    cell: tuple[int, str],
    key: str,
) -> None:
    row, column = cell
    if row >= len(groups):
        return
    run, policy = groups[row]
    mine = pairs[(pairs["run"] == run) & (pairs["policy"] == policy)]
    by_title = {identity.title(c): c for c in identity.columns(mine)}
    if column in by_title:
        batch, cache = by_title[column]
        mine = mine[(mine["batch"] == batch) & (mine["cache"] == cache)]
    mine = mine.sort_values("same", kind="stable").head(SHOWN).reset_index(drop=True)
    if mine.empty:
        return
    differ = int((~mine["same"]).sum())
    labels = [
        f"{'same' if same else 'DIFFERENT'}  ·  {dataset}  ·  prompt {str(prompt)[:24]}  ·  {batch}  ·  request {number}"
        for same, dataset, prompt, batch, number in zip(
            mine["same"], mine["dataset"].astype(str), mine["prompt"], mine["batch"], mine["request"]
        )
    ]
    box, wanted = f"pair-{key}-{row}-{column}", links.parse_step(address.get("answer"))
    at = next((i for i, number in enumerate(mine["request"]) if number == wanted), 0)
    st.session_state[box] = at

    def remember() -> None:
        address.write(answer=str(int(mine["request"].iloc[st.session_state[box]])))

    st.selectbox(
        f"Answers in this cell: {of(differ, len(mine))} differ",
        range(len(mine)),
        format_func=lambda i: labels[i],
        key=box,
        on_change=remember,
    )
    chosen = mine.iloc[at]
    by_name = {info.name: info for info in infos}
    if chosen["ref_run"] not in by_name:
        return
    left = sidebyside.Side(
        by_name[chosen["ref_run"]], int(chosen["ref_request"]), str(chosen["ref_id"]),
        f"reference: {chosen['ref_policy']}, request {int(chosen['ref_request'])}",
    )  # fmt: skip
    right = sidebyside.Side(
        by_name[run], int(chosen["request"]), str(chosen["request_id"]),
        f"{policy}, {identity.title((chosen['batch'], chosen['cache']))}, request {int(chosen['request'])}",
    )  # fmt: skip
    aligned = sidebyside.show(ui.PAGES, left, right)
    if aligned.first is not None and aligned.a and aligned.b:
        st.caption(f"They part at step {aligned.first:,}; {aligned.again:,} tokens after it are equal again.")
