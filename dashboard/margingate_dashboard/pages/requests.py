"""Requests: every request of a run as a table, with filters, sorted, and linked."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import annotate, links, states, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.facts.policies import may_verify
from margingate_dashboard.rates import of
from margingate_dashboard.summary import tag
from margingate_dashboard.ui import Page

REQUESTS = (
    "request", "request_id", "dataset", "policy", "guarantee", "finish_reason", "flips", "missed", "triggers", "verified",
    "prompt_tokens", "cached_tokens", "output_tokens", "ttft_ms", "tpot_ms", "e2e_ms", "overhead_ms", "overhead_share",
    "max_batch_rows", "retractions", "repeat", "prompt_digest", "output_digest", "time", "guarantee_note",
    "temperature", "seed",
)  # fmt: skip
SHOWN_TEXT = 120
"""Signs of a prompt in the table."""


def lowest_margins(page: Page) -> dict[int, float]:
    """Return the lowest margin of a decode step, by request."""
    steps = page.data.steps("request", "margin", "prefill")
    decode = steps[~states.as_bool(steps["prefill"])]
    found = decode.groupby("request", sort=False)["margin"].min()
    return {int(n): float(m) for n, m in found.items()}


def answers(page: Page) -> dict[int, str]:
    """Return each request's answer as text; empty where the run records none."""
    steps = page.data.steps("request", "step", "token_text")
    steps = steps[steps["token_text"].notna()].sort_values(["request", "step"], kind="stable")
    steps = steps.drop_duplicates(["request", "step"], keep="last")
    return {int(n): "".join(t) for n, t in steps.groupby("request", sort=False)["token_text"]}


def prompts_of(page: Page) -> dict[int, str]:
    """Return each request's prompt, of those that the run records; of two rows of one request, the later text."""
    rows = page.data.requests("request", "prompt_text")
    return {n: text for n, text in zip(rows["request"].tolist(), rows["prompt_text"].tolist()) if isinstance(text, str)}


def found_in(page: Page, requests: pd.DataFrame, words: str) -> np.ndarray:
    """Tell which requests have a text in their id, prompt or answer."""
    wanted = words.lower()
    keep = (
        requests["request_id"].astype(str).str.lower().str.contains(wanted, regex=False).to_numpy(dtype=bool, copy=True)
    )
    prompts = prompts_of(page)
    known = page.data.memo("answers", lambda: answers(page))
    for at, number in enumerate(requests["request"].tolist()):
        if not keep[at]:
            keep[at] = wanted in prompts.get(number, "").lower() or wanted in known.get(number, "").lower()
    return keep


def table(page: Page, requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row a request, as shown."""
    lowest = page.data.memo("lowest", lambda: lowest_margins(page))
    prompts = prompts_of(page)
    numbers, said = requests["request"].tolist(), annotate.by_request(page)
    seen = requests["policy"].astype(str).map(may_verify)  # under log and off no flip can be seen
    return pd.DataFrame(
        {
            "open": links.hrefs("request", page.run, requests["request_id"], numbers),
            "number": numbers,
            "request": requests["request_id"].astype(str).to_numpy(),
            "dataset": [tag(d) for d in requests["dataset"]],
            "policy": requests["policy"].astype(str).to_numpy(),
            "guarantee": requests["guarantee"].astype(str).to_numpy(),
            "finish": requests["finish_reason"].astype(str).to_numpy(),
            "flips": requests["flips"].where(seen).to_numpy(dtype=np.float64, na_value=np.nan),
            "low margins": requests["triggers"].to_numpy(),
            "verified": requests["verified"].to_numpy(),
            "lowest margin": [lowest.get(n) for n in numbers],
            "prompt tokens": requests["prompt_tokens"].to_numpy(),
            "cached": requests["cached_tokens"].to_numpy(),
            "output tokens": requests["output_tokens"].to_numpy(),
            "TTFT": requests["ttft_ms"].to_numpy(),
            "TPOT": requests["tpot_ms"].to_numpy(),
            "end to end": requests["e2e_ms"].to_numpy(),
            "overhead": 100 * requests["overhead_share"].astype(float).to_numpy(),
            "largest batch": requests["max_batch_rows"].to_numpy(),
            "repeat": requests["repeat"].to_numpy(),
            "temperature": requests["temperature"].to_numpy(),
            # As text: a seed may have more digits than a browser's numbers keep.
            "seed": [None if pd.isna(seed) else str(int(seed)) for seed in requests["seed"]],
            "prompt": [prompts[n][:SHOWN_TEXT] if n in prompts else None for n in numbers],
            "note": requests["guarantee_note"].to_numpy(),
            "annotation": [said.get(n) for n in numbers],
            "prompt digest": requests["prompt_digest"].to_numpy(),
            "arrived": requests["time"].to_numpy(),
        }
    )


def _filtered(page: Page, requests: pd.DataFrame) -> pd.DataFrame:
    left, middle, right = st.columns([0.5, 0.25, 0.25], vertical_alignment="bottom")
    words = left.text_input(
        "Find", key="text", bind="query-params", placeholder="in id, prompt or answer", max_chars=200
    ).strip()
    ends = sorted(requests["finish_reason"].dropna().astype(str).unique())
    finish = middle.multiselect("Finish", ends, key="finish", bind="query-params", placeholder="All")
    flips = right.toggle("Only with flips", key="flipped", bind="query-params")
    keep = np.ones(len(requests), dtype=bool)
    if finish:
        keep &= requests["finish_reason"].isin(finish).to_numpy()
    if flips:
        keep &= requests["flips"].fillna(0).to_numpy() > 0
    requests = requests[keep]
    return requests[found_in(page, requests, words)] if words else requests


def _page() -> None:
    page = ui.open_page(
        "Requests", "Every finished request: what it ran under, what flipped, what it cost, and its answer."
    )
    if page is None:
        return
    every = page.requests(*REQUESTS)
    if every.empty:
        ui.empty_state(
            "No requests", "<p>No request of this run (or of what is chosen in the sidebar) has finished yet.</p>"
        )
        return
    shown = _filtered(page, every)
    flips = int(shown["flips"].fillna(0).sum())
    touched = int((shown["flips"].fillna(0) > 0).sum())
    ui.cards(
        [
            Card("Requests", f"{len(shown):,}", f"{of(len(shown), len(every))} that the sidebar leaves"),
            Card("Output tokens", f"{int(shown['output_tokens'].fillna(0).sum()):,}", "of these requests"),
            Card("With a flip", f"{touched:,}", f"{flips:,} flips in them"),
        ]
    )
    frame = table(page, shown)
    number = st.column_config.NumberColumn
    rows = ui.chosen_rows(
        frame,
        "requests",
        page.exports,
        "picked",
        [str(n) for n in frame["number"]],
        key="table-requests",
        height=min(38 + 35 * max(1, len(frame)), 640),
        column_config={
            "open": st.column_config.LinkColumn("", display_text="open", width="small", help="Opens the request"),
            "request": st.column_config.TextColumn(width=130),
            "number": number(width="small", help="Number of the request in the run"),
            "flips": number(format="localized", help="Empty where no step could be verified (log, off, sampled)"),
            "TTFT": number(format="%.1f ms"),
            "TPOT": number(format="%.2f ms"),
            "end to end": number(format="%.1f ms"),
            "overhead": number(format="%.1f%%", help="Verify and hold time over end-to-end time"),
            "temperature": number(format="%.2f", help="0 is greedy"),
            "seed": st.column_config.TextColumn(
                help="The seed that its tokens were drawn with; empty where none was used"
            ),
            "repeat": number(help="Which pass over the prompts it belongs to (margingate_repeat)"),
            "arrived": st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm:ss.SSS"),
        },
    )
    if rows:
        row = frame.iloc[rows[0]]
        st.page_link(
            ui.PAGES["request"],
            label=f"Open {ui.markdown_safe(row['request'])} in Request",
            icon=":material/segment:",
            query_params=links.params(page.run, str(row["request"]), number=int(row["number"])),
        )
    else:
        st.caption("Select a row to open its request here; “open” opens it in a tab of its own.")
    page.exports.show("requests")


if __name__ == "__main__":
    ui.guarded(_page)
