"""Runs: every run in the trace folder with its headline numbers; open one, compare two, note what it was."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import streamlit as st

from margingate_dashboard import choose, data, identity_card, links, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.facts import identity, notes, runlist
from margingate_dashboard.figures import runs as figures
from margingate_dashboard.rates import of, share
from sglang_margingate.trace import RunInfo, TraceError

READ_SECONDS, NEXT_SECONDS = 0.25, 1.5
"""Time that the first look gives to runs that were not counted yet, so that the table stands soon; and each further one."""
LOOKED_AT = 3
"""Newest runs that the identity view looks at."""
MOST_COMPARED = 6
"""Runs in one identity view."""
QUIET_SECONDS = 12.0
"""How often a folder in which nothing lives is looked at for a new run."""
HIDDEN = "hidden"
"""A run with this tag is not listed, unless it is asked for."""
WARNED = 30
"""Runs whose warnings are written out."""

COLUMNS = [
    "run", "status", "policies", "trigger rate", "flips", "missed (95% bound)", "overhead", "requests", "decode steps",
    "model", "created", "rates of", "triggers", "verified", "structural", "datasets", "note", "tags", "steps",
]  # fmt: skip


def status(info: RunInfo) -> str:
    """Return a run's state in a word or two."""
    if info.is_live:
        return "● live"
    return "made up" if info.manifest.get("synthetic") and not info.broken else info.state


def _row(info: RunInfo, counts: Mapping[str, object] | str | None) -> dict[str, object]:
    manifest = info.manifest
    note = notes.read_note(info.path)
    row: dict[str, object] = {
        "run": info.name,
        "status": status(info),
        "created": info.created,
        "model": str(manifest.get("model") or "–"),
        "policies": str(manifest.get("policy") or "–"),
        "datasets": "–",
        "requests": info.request_rows,
        "steps": info.step_rows,
        "note": note.text,
        "tags": ", ".join(note.tags),
    }
    if counts is None:
        return {**row, "datasets": "being counted"}
    if isinstance(counts, str):
        return {**row, "status": "unreadable", "datasets": counts}
    return {**row, **counts}


def table(infos: list[RunInfo], seconds: float = READ_SECONDS) -> pd.DataFrame:
    """Return one row a run, newest first, and how far counting has come."""
    counts = data.counted(infos, seconds)
    columns = [*COLUMNS, "all flips", "all verified"]
    return pd.DataFrame([_row(info, counts.get(info.path)) for info in infos]).reindex(columns=columns)


def matching(frame: pd.DataFrame, words: str) -> pd.Series:
    """Tell which runs have all of these words, in lower case, and none of those behind a minus."""
    wanted = words.split()
    hidden = frame["tags"].map(lambda tags: HIDDEN in str(tags).lower().split(", "))
    keep = pd.Series(True, index=frame.index) if HIDDEN in wanted else ~hidden
    if wanted:
        text = (
            frame[["run", "model", "datasets", "note", "tags", "status"]].fillna("").agg(" ".join, axis=1).str.lower()
        )
        for word in wanted:
            without = word.startswith("-") and len(word) > 1
            has = text.str.contains(word[1:] if without else word, regex=False)
            keep &= ~has if without else has
    return keep


def filtered(frame: pd.DataFrame) -> pd.DataFrame:
    """Show the filters of the list and return the runs that they leave."""
    left, middle, right = st.columns([0.5, 0.25, 0.25], vertical_alignment="bottom")
    words = left.text_input(
        "Filter",
        key="q",
        bind="query-params",
        placeholder="part of a name, model, dataset, note or tag; -word leaves out",
        help=f"Runs tagged “{HIDDEN}” are not listed unless the filter says {HIDDEN}.",
    ).lower()
    models = middle.multiselect(
        "Models", sorted(frame["model"].unique()), key="model", bind="query-params", placeholder="All"
    )
    places = sorted({p for names in frame["policies"] for p in str(names).split(", ")})
    policies = right.multiselect("Policies", places, key="ran", bind="query-params", placeholder="All")
    keep = matching(frame, words)
    if models:
        keep &= frame["model"].isin(models)
    if policies:
        keep &= frame["policies"].map(lambda names: bool(set(str(names).split(", ")) & set(policies)))
    return frame[keep].reset_index(drop=True)


def _actions(names: list[str]) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if len(names) == 1:
            for page, label, icon in (
                ("overview", "Overview", ":material/dashboard:"),
                ("requests", "Requests", ":material/list:"),
                ("flips", "Flips", ":material/sync_alt:"),
                ("margins", "Margins", ":material/bar_chart:"),
            ):
                if page in ui.PAGES:
                    st.page_link(ui.PAGES[page], label=label, icon=icon, query_params=links.params(names[0]))
        elif len(names) == 2:
            st.page_link(
                ui.PAGES["compare"],
                label=f"Compare {ui.markdown_safe(names[0])} with {ui.markdown_safe(names[1])}",
                icon=":material/compare_arrows:",
                query_params=links.params(names[0], other=names[1]),
            )
        else:
            st.caption("Select one run to open it, or two to compare them." if not names else "Select one run or two.")


def _identity(infos: list[RunInfo], names: list[str], exports: ui.Exports) -> None:
    """Show the identity view first: of the runs that are selected, or of the newest one that answered a prompt twice."""
    if names:
        identity_card.show([i for i in infos if i.name in names][:MOST_COMPARED], exports, "-".join(names))
        return
    for info in infos[:LOOKED_AT]:
        try:
            pairs = identity.compared(identity_card.answers_of(info))
        except TraceError:
            continue
        if len(pairs):
            st.caption(f"Of {ui.markdown_safe(info.name)}; select others in the table below.")
            identity_card.show([info], exports, info.name)
            return


def _note(info: RunInfo) -> None:
    """Let the reader write a note and tags; they lie beside the run's files."""
    known = notes.read_note(info.path)
    with st.form(f"note-{info.name}", border=True), st.container(horizontal=True, vertical_alignment="bottom"):
        text = st.text_input("Note", known.text, max_chars=notes.MOST_NOTE, placeholder="what this run was for")
        words = st.text_input("Tags", ", ".join(known.tags), max_chars=400, placeholder="separated by commas")
        if not st.form_submit_button("Save"):
            return
    tags = tuple(dict.fromkeys(t.strip() for t in words.split(",") if t.strip()))
    try:
        notes.write_note(info.path, notes.Note(text.strip(), tags, known.marks))
    except OSError as error:
        st.error(f"The note cannot be saved: {ui.markdown_safe(error.strerror or error)}", icon=":material/error:")
        return
    st.rerun()


def _follow(seen: object, infos: list[RunInfo], uncounted: bool) -> None:
    """Look at the folder now and then, which costs next to nothing, and show the page again where it has changed."""
    live = any(info.is_live for info in infos) or not infos

    # Each look makes the browser go through the page as well, which is most of what an idle page costs.
    @st.fragment(run_every=0.5 if uncounted else ui.FOLLOW_SECONDS if live else QUIET_SECONDS)
    def watch() -> None:
        if uncounted or state_of_folder(infos) != seen:
            st.rerun(scope="app")

    watch()


def state_of_folder(infos: list[RunInfo]) -> object:
    """Return what the page depends on: the runs' folders, and what the live ones have written (a heartbeat is nothing).

    Parameters
    ----------
    infos
        The runs as the page shows them. Only those that live are looked into: with a thousand runs, a look at the folder is
        what an open page costs.
    """
    live = {i.name: (data.signature(i.path), data.still_live(i.path)) for i in infos if i.is_live}
    return {**runlist.stamps(links.trace_dir()), **live}


def as_shown(stamps: dict[str, runlist.Stamp], infos: list[RunInfo]) -> object:
    """Return the same as the page shows it: with the folder's stamps from before the runs were read, and what they said."""
    return {**stamps, **{i.name: (data.signature(i.path), True) for i in infos if i.is_live}}


def _page() -> None:
    ui.styles()
    st.set_page_config(page_title="Runs · MarginGate")
    ui.header("Runs", f"Every run in {links.trace_dir().name or links.trace_dir()}/, newest first.")
    stamps = runlist.stamps(links.trace_dir())
    infos = data.runs(links.trace_dir())
    seen = as_shown(stamps, infos)
    if not infos:
        ui.no_runs()
        _follow(seen, infos, uncounted=False)
        return
    choose.copy_link()
    exports = ui.Exports("runs")
    place = st.container()
    whole = table(infos, NEXT_SECONDS if st.session_state.get("looked") else READ_SECONDS)
    st.session_state["looked"] = True
    uncounted = int(whole["datasets"].eq("being counted").sum())
    frame = filtered(whole)
    flips, verified = int(frame["all flips"].fillna(0).sum()), int(frame["all verified"].fillna(0).sum())
    live = int(frame["status"].eq("● live").sum())
    ui.cards(
        [
            Card(
                "Runs",
                f"{len(frame):,}",
                f"{live} live" + (f", {of(len(frame), len(whole))} shown" if len(frame) < len(whole) else ""),
            ),
            Card("Requests finished", f"{int(frame['requests'].sum()):,}", "in these runs"),
            Card("Steps recorded", f"{int(frame['steps'].sum()):,}", "prefill and decode"),
            Card(
                "Flips confirmed",
                f"{flips:,}",
                f"{share(flips, verified)} of {verified:,} verified steps, under any policy",
            ),
        ]
    )
    if uncounted:
        st.caption(f":material/hourglass: {of(len(whole) - uncounted, len(whole))} runs counted; the others follow.")
    shown = frame[COLUMNS]
    shown = shown.assign(open=[links.href("overview", name) for name in shown["run"]])[["open", *COLUMNS]]
    picked = ui.chosen_rows(
        shown,
        "runs",
        exports,
        "selected",
        frame["run"].astype(str).tolist(),
        key="table-runs",
        many=True,
        height=min(38 + 35 * max(1, len(shown)), 560),
        column_config={
            "open": st.column_config.LinkColumn(
                "", display_text="open", width="small", help="Opens the run's Overview"
            ),
            "decode steps": st.column_config.NumberColumn(
                format="localized",
                help="Of the policy in “rates of”, in finished requests; first tokens come from the prefill",
            ),
            "rates of": st.column_config.TextColumn(help="The policy that this row's rates, flips and bounds are of"),
            "triggers": st.column_config.NumberColumn(
                format="localized", help="Decode steps with margin <= threshold, of the policy in “rates of”"
            ),
            "flips": st.column_config.NumberColumn(
                format="localized",
                help="Confirmed, of the policy in “rates of”; empty where none can be seen (log, off)",
            ),
            "verified": st.column_config.NumberColumn(
                format="localized", help="Steps verified for any reason: where flips can be seen"
            ),
            "steps": st.column_config.NumberColumn("step rows", format="localized"),
            "created": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%", help="triggers / decode steps"),
            "overhead": st.column_config.NumberColumn(
                format="%.2f%%", help="Verify and hold time over end-to-end time"
            ),
            "requests": st.column_config.NumberColumn(format="localized"),
            "structural": st.column_config.NumberColumn("structural requests", format="localized"),
            "datasets": st.column_config.TextColumn(width="small"),
            "run": st.column_config.TextColumn(width=190),
            "policies": st.column_config.TextColumn(width=110),
        },
    )
    names = [str(frame["run"].iloc[i]) for i in picked]
    _actions(names)
    with place:
        _identity(infos, names, exports)
    if len(names) == 1:
        _note(next(i for i in infos if i.name == names[0]))
    # While runs are counted the page is shown again and again: figures that are drawn each time would delay the table.
    if not uncounted and frame["overhead"].notna().any():
        ui.pairs(figures.price(frame), exports)
    if not uncounted and len(frame) > 2:
        ui.chart(figures.trend(frame), "trend", exports)
    exports.show("runs")
    warned = [info for info in infos if info.warnings]
    for info in warned[:WARNED]:
        for warning in info.warnings:
            st.caption(
                f":material/warning: **{ui.markdown_safe(info.name)}**: {ui.markdown_safe(ui.brief(warning, info.path))}"
            )
    if len(warned) > WARNED:
        st.caption(f"and warnings of {len(warned) - WARNED:,} more runs: `margingate runs` lists them all")
    _follow(seen, infos, uncounted > 0)


if __name__ == "__main__":
    ui.guarded(_page)
