"""The panel of one step: why it flipped, between which tokens, and with whom it shared its forward."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from margingate_dashboard import data, links, ui
from margingate_dashboard.facts import why
from margingate_dashboard.figures import request as figures
from margingate_dashboard.summary import tag
from margingate_dashboard.theme import STATES
from margingate_dashboard.ui import Page

COLUMNS = ("request", "forward", "time", "request_id", "dataset", "policy", "step", "margin", "state", "batch_rows")


def verify_rows(page: Page) -> int | None:
    """Return the rows of the verify's shape, where the run's self-test names them."""
    test = page.info.manifest.get("self_test")
    rows = test.get("rows") if isinstance(test, dict) else None
    return rows if isinstance(rows, int) else None


def show(page: Page, steps: pd.DataFrame, step: int, key: str) -> None:
    """Show why a step of a request did what it did (``steps``: all columns of the request's steps)."""
    found = steps[steps["step"] == step]
    if found.empty:
        return
    row = found.iloc[0]
    requests = page.data.requests("request", "cached_tokens", "retractions")
    mine = requests[requests["request"] == row["request"]]
    request = mine.iloc[-1] if len(mine) else None
    st.markdown(f"##### Why: step {step}")
    st.markdown(ui.markdown_safe(why.cause(row, request, verify_rows(page))))
    left, right = st.columns(2)
    with left:
        best = why.best(row, data.vocabulary(page.data))
        if len(best):
            percent = st.column_config.NumberColumn(format="%.3f%%")
            both = best["verify, place"].notna().any()
            st.caption("The best tokens of both paths" if both else "The best tokens of the fast path; no verify ran")
            ui.table(
                best, "best-tokens", page.exports, key=f"best-{key}",
                column_config={"fast path, %": percent, "verify, %": percent},
            )  # fmt: skip
        elif str(row["reason"]) not in ("none", "", "nan"):
            st.caption("The best tokens of both paths were not recorded (traces before schema 2.1).")
    with right:
        _companions(page, row, key)
    if steps["kv_delta_last"].notna().any():
        ui.chart(figures.kv_change(steps, step, page.subtitle), "kv-change", page.exports, key=f"kv-{key}")


def _companions(page: Page, row: pd.Series, key: str) -> None:
    others = why.companions(page.data.steps(*COLUMNS), row)
    whole = 0 if pd.isna(row["batch_rows"]) else int(row["batch_rows"])
    wide = 0 if pd.isna(row["padded_rows"]) else int(row["padded_rows"])
    padded = f", layers at up to {wide:,} row{'' if wide == 1 else 's'}" if wide else ""
    place = (
        "inside the class"
        if row["canonical"] is True or row["canonical"] == 1
        else "outside the class, or not observed"
    )
    st.caption(f"The forward: {whole:,} request{'' if whole == 1 else 's'}{padded}, {place}")
    if whole > 1 + len(others):
        st.caption(f"{whole - 1 - len(others):,} of its companions were not observed (sampled, or policy off).")
    if others.empty:
        return
    frame = pd.DataFrame(
        {
            "open": [
                links.href("request", page.run, str(i), int(s), number=n)
                for i, s, n in zip(others["request_id"], others["step"], others["request"])
            ],
            "request": others["request"].to_numpy(),
            "dataset": [tag(d) for d in others["dataset"]],
            "policy": others["policy"].astype(str).to_numpy(),
            "step": others["step"].to_numpy(),
            "margin": others["margin"].to_numpy(),
            "state": [STATES[s].name for s in others["state"]],
        }
    )
    ui.table(
        frame, "companions", page.exports, key=f"companions-{key}",
        column_config={
            "open": st.column_config.LinkColumn("", display_text="open", width="small"),
        },
    )  # fmt: skip
