"""Runs: every run in the trace folder with its headline numbers; open one, or compare two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pandas as pd
import streamlit as st

from margingate_dashboard import data, links, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.figures import runs as figures
from margingate_dashboard.rates import at_most, share
from margingate_dashboard.summary import REQUEST_COLUMNS, Headline, from_requests, overhead, tags
from sglang_margingate.trace import RunInfo, TraceError


def _missed(total: Headline) -> str:
    if not total.examined:
        return "not audited"
    if total.miss_known:
        return f"{total.missed:,} (all {total.examined:,} verified)"
    return f"{total.missed:,} of {total.examined:,} audited, ≤ {at_most(total.miss_upper)}"


def _ended(manifest: Mapping[str, object]) -> str:
    return "made up" if manifest.get("synthetic") else "closed"


def _row(info: RunInfo) -> dict[str, object]:
    manifest = info.manifest
    row: dict[str, object] = {
        "run": info.name,
        "status": "broken" if info.broken else "● live" if info.is_live else _ended(manifest),
        "created": info.created,
        "model": str(manifest.get("model") or "–"),
        "policy": str(manifest.get("policy") or "–"),
        "datasets": "–",
        "requests": info.request_rows,
        "steps": info.step_rows,
    }
    try:
        run = data.run_data(info.path)
        counted = run.memo("runs", lambda: _counts(run.requests(*REQUEST_COLUMNS, "threshold")))
    except TraceError as error:
        return {**row, "status": "unreadable", "datasets": str(error).split(": ", 1)[-1][:90]}
    if info.warnings and row["status"] == "closed":
        row["status"] = "incomplete"
    return {**row, **counted}


def _counts(requests: pd.DataFrame) -> dict[str, object]:
    total = from_requests(requests)
    added, whole = overhead(requests)
    gated = bool(requests["threshold"].notna().any())  # without a threshold there is nothing to trigger
    return {
        "datasets": ", ".join(tags(requests["dataset"])) if len(requests) else "–",
        "decode steps": total.steps,
        "triggers": total.triggered,
        "trigger rate": 100 * total.triggered / total.steps if total.steps and gated else None,
        "verified": total.verified,
        "flips": total.flips,
        "missed (95% bound)": _missed(total),
        "overhead": 100 * added / whole if whole else None,
    }


def _table(infos: list[RunInfo]) -> pd.DataFrame:
    columns = [
        "run",
        "status",
        "model",
        "policy",
        "datasets",
        "requests",
        "decode steps",
        "triggers",
        "trigger rate",
        "verified",
        "flips",
        "overhead",
        "missed (95% bound)",
        "steps",
        "created",
    ]
    return pd.DataFrame([_row(info) for info in infos]).reindex(columns=columns)


def _actions(names: list[str]) -> None:
    with st.container(horizontal=True, vertical_alignment="center"):
        if len(names) == 1:
            for page, label, icon in (
                ("overview", "Overview", ":material/dashboard:"),
                ("flips", "Flips", ":material/sync_alt:"),
                ("margins", "Margins", ":material/bar_chart:"),
            ):
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


@partial(ui.fragment, run_every=ui.FOLLOW_SECONDS)
def _listing(place: object) -> None:
    infos = data.runs(links.trace_dir())
    if not infos:
        ui.no_runs()
        return
    frame = _table(infos)
    exports = ui.Exports("runs")
    steps, requests = int(frame["steps"].sum()), int(frame["requests"].sum())
    live = int(frame["status"].eq("● live").sum())
    flips, verified = int(frame["flips"].fillna(0).sum()), int(frame["verified"].fillna(0).sum())
    ui.cards(
        [
            Card("Runs", f"{len(frame):,}", f"{live} live"),
            Card("Requests finished", f"{requests:,}", "in all runs"),
            Card("Steps recorded", f"{steps:,}", "prefill and decode"),
            Card("Flips confirmed", f"{flips:,}", f"{share(flips, verified)} of {verified:,} verified steps"),
        ]
    )
    picked = ui.table(
        frame,
        "runs",
        exports,
        on_select="rerun",
        selection_mode="multi-row",
        column_config={
            "decode steps": st.column_config.NumberColumn(
                format="localized", help="Of finished requests; first tokens come from the prefill"
            ),
            "triggers": st.column_config.NumberColumn(format="localized", help="Decode steps with margin <= threshold"),
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
            "datasets": st.column_config.TextColumn(width="small"),
        },
    )
    _actions([str(frame["run"].iloc[i]) for i in picked.selection.rows if i < len(frame)])
    if frame["overhead"].notna().any():
        ui.chart(figures.price(frame), "price", exports)
    exports.show(st.container(horizontal_alignment="right"), "runs")
    for info in infos:
        for warning in info.warnings:
            st.caption(f":material/warning: **{ui.markdown_safe(info.name)}**: {ui.markdown_safe(warning)}")


def _page() -> None:
    ui.styles()
    place = ui.header("Runs", f"Every run in {links.trace_dir().name or links.trace_dir()}/, newest first.")
    _listing(place)


if __name__ == "__main__":
    ui.guarded(_page)
