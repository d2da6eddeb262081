"""Annotations: a reader's words about a request or one of its steps, written where it is looked at, listed on the Overview."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from margingate_dashboard import links, ui
from margingate_dashboard.facts import notes
from margingate_dashboard.ui import Page


def save(page: Page, number: int, step: int | None, text: str) -> bool:
    """Write an annotation, or remove it where the text is empty; False, and a line on the page, where that cannot be done."""
    try:
        notes.write_note(page.info.path, notes.read_note(page.info.path).marked(number, step, text.strip()))
    except OSError as error:
        st.error(
            f"The annotation cannot be saved: {ui.markdown_safe(error.strerror or error)}", icon=":material/error:"
        )
        return False
    return True


def show(page: Page, number: int, step: int | None) -> None:
    """Let the reader annotate what is looked at, and show what stands at the other steps of the request."""
    note = notes.read_note(page.info.path)
    known = note.at(number, step)
    where = "this request" if step is None else f"step {step}"
    with st.expander(
        f"Annotation of {where}" + (f": {ui.markdown_safe(known[:60])}" if known else ""), expanded=bool(known)
    ):
        with (
            st.form(f"mark-{number}-{step}", border=False),
            st.container(horizontal=True, vertical_alignment="bottom"),
        ):
            text = st.text_input("Words", known, max_chars=notes.MOST_NOTE, placeholder=f"what you found at {where}")
            pressed = st.form_submit_button("Save")
        if pressed and save(page, number, step, text):
            st.rerun()
        for mark in note.of(number):
            if mark.step != step:
                at = "The request" if mark.step is None else f"Step {mark.step}"
                st.caption(f"**{at}**: {ui.markdown_safe(mark.text)}")


def listed(page: Page) -> None:
    """Show all annotations of the run with links; nothing where there are none."""
    marks = notes.read_note(page.info.path).marks
    if not marks:
        return
    rows = page.data.requests("request", "request_id").drop_duplicates("request", keep="last")
    ids = dict(zip(rows["request"].tolist(), rows["request_id"].astype(str).tolist()))
    running = page.data.steps("request", "request_id").drop_duplicates("request")
    ids = {**dict(zip(running["request"].tolist(), running["request_id"].astype(str).tolist())), **ids}
    frame = pd.DataFrame(
        {
            "open": [links.href("request", page.run, ids.get(m.request), m.step, number=m.request) for m in marks],
            "number": [m.request for m in marks],
            "request": [ids.get(m.request, "not in this run") for m in marks],
            "step": pd.array([m.step for m in marks], dtype="Int64"),
            "annotation": [m.text for m in marks],
        }
    )
    st.markdown("##### Annotations")
    ui.table(
        frame, "annotations", page.exports,
        column_config={"open": st.column_config.LinkColumn("", display_text="open", width="small")},
    )  # fmt: skip


def by_request(page: Page) -> dict[int, str]:
    """Return what stands at each request and its steps, in one line."""
    found: dict[int, list[str]] = {}
    for mark in notes.read_note(page.info.path).marks:
        found.setdefault(mark.request, []).append(mark.text if mark.step is None else f"step {mark.step}: {mark.text}")
    return {number: "; ".join(words) for number, words in found.items()}
