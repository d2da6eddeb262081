"""Latency: time per token, the cost of verifying, and what the policy added to each request."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from margingate_dashboard import links, states, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.figures import latency as figures
from margingate_dashboard.rates import milliseconds, of, share
from margingate_dashboard.summary import has_tag, overhead
from margingate_dashboard.theme import PART_COLOURS
from margingate_dashboard.ui import Page

STEPS = ("dataset", "prefill", "batch_rows", "step_ms", "verify_ms", "window_rows", "verified")
REQUESTS = (
    "request",
    "request_id",
    "dataset",
    "policy",
    "output_tokens",
    "triggers",
    "verified",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "verify_ms",
    "hold_ms",
    "overhead_ms",
    "overhead_share",
    "max_batch_rows",
    "prefill_chunks",
    "floored_tokens",
)
WORST = 10


def policies(page: Page) -> tuple[np.ndarray | None, list[str]]:
    """Return the policy index of each step row and the policies' names; no index where the run has one policy only.

    The column that ties steps to requests is loaded only for runs that mix policies.
    """
    every = page.data.requests("request", "policy")
    names = sorted(every["policy"].dropna().astype(str).unique())
    if len(names) < 2:
        return None, names or [str(page.info.manifest.get("policy") or "unknown")]
    codes, requests = pd.factorize(page.data.steps("request")["request"], use_na_sentinel=False)
    known = dict(zip(every["request"].tolist(), every["policy"].astype(str).tolist()))
    found = [known.get(number) if pd.notna(number) else None for number in requests.tolist()]
    return np.array([names.index(p) if p in names else -1 for p in found])[codes], names


class Times(NamedTuple):
    """Quantiles of step times, by policy and batch rows."""

    steps: int
    """Decode steps with a time."""
    median: float
    whole: dict[str, pd.DataFrame]
    verify: dict[str, pd.DataFrame]
    window: pd.DataFrame
    """By columns recomputed for the step."""


def step_times(page: Page) -> Times:
    """Sum up the run's step times."""
    steps = page.data.steps(*STEPS)
    keep = ~states.as_bool(steps["prefill"])
    if page.datasets is not None:
        keep &= has_tag(steps["dataset"], page.datasets)
    which, names = policies(page)
    rows = steps["batch_rows"].fillna(0).to_numpy(dtype=np.int32)
    took, waited = steps["step_ms"].to_numpy(), steps["verify_ms"].to_numpy()
    whole, verify = {}, {}
    for index, name in enumerate(names):
        mine = keep if which is None else keep & (which == index)
        whole[ui.safe(name)] = figures.quantiles(rows[mine], took[mine])
        paid = mine & (waited > 0)
        verify[ui.safe(name)] = figures.quantiles(rows[paid], waited[paid])
    window = steps["window_rows"].fillna(0).to_numpy(dtype=np.int32)
    seen = keep & steps["verified"].to_numpy() & (window > 0)
    known = took[keep & np.isfinite(took)]
    return Times(
        steps=known.size,
        median=float(np.median(known)) if known.size else float("nan"),
        whole=whole,
        verify=verify,
        window=figures.quantiles(window[seen], waited[seen]),
    )


def _by_policy(requests: pd.DataFrame, column: str, scale: float = 1.0) -> dict[str, np.ndarray]:
    groups = requests.groupby(requests["policy"].astype("string").fillna("unknown"), observed=True)[column]
    return {ui.safe(name): scale * values.to_numpy(dtype=np.float64) for name, values in groups}


def _figures(page: Page, times: Times, requests: pd.DataFrame) -> dict[str, go.Figure]:
    by_policy = functools.partial(_by_policy, requests)
    waits = "Verify time of the steps that waited for one"
    axis = "overhead, % of end-to-end time"
    return {
        "step-time": figures.by_rows(times.whole, "Time per token by batch size", "decode step", page.subtitle),
        "verify-time": figures.by_rows(times.verify, waits, "verify", page.subtitle),
        "tpot": figures.distribution(by_policy("tpot_ms"), "Time per output token, by request", "ms", page.subtitle),
        "verify-cost": figures.verify_cost(times.window, page.subtitle),
        "overhead": figures.distribution(
            by_policy("overhead_share", 100.0), "Overhead by request", axis, page.subtitle
        ),
        "ttft": figures.distribution(by_policy("ttft_ms"), "Time to first token, by request", "ms", page.subtitle),
    }


@ui.fragment
def _worst(page: Page, requests: pd.DataFrame) -> None:
    st.markdown(f"##### Most overhead: the worst {min(WORST, len(requests))} of {len(requests):,} requests")
    shown = requests.nlargest(WORST, "overhead_ms").assign(overhead_share=lambda f: 100 * f["overhead_share"])
    picked = ui.table(
        shown[
            [
                "request_id",
                "dataset",
                "policy",
                "overhead_ms",
                "overhead_share",
                "e2e_ms",
                "verify_ms",
                "hold_ms",
                "output_tokens",
                "triggers",
                "verified",
                "max_batch_rows",
            ]
        ],
        "worst",
        page.exports,
        on_select="rerun",
        selection_mode="single-row",
        column_config={
            "request_id": "request",
            "overhead_ms": st.column_config.NumberColumn(
                "added", format="%.1f ms", help="overhead_ms: verify and hold"
            ),
            "e2e_ms": st.column_config.NumberColumn("end to end", format="%.1f ms"),
            "verify_ms": st.column_config.NumberColumn("verify", format="%.1f ms"),
            "hold_ms": st.column_config.NumberColumn("hold", format="%.1f ms"),
            "output_tokens": "tokens",
            "max_batch_rows": "largest batch",
            "overhead_share": st.column_config.NumberColumn("overhead", format="%.1f%%", help="overhead_ms / e2e_ms"),
        },
    )
    rows = [i for i in picked.selection.rows if i < len(shown)]
    if rows:
        request, number = str(shown["request_id"].iloc[rows[0]]), int(shown["request"].iloc[rows[0]])
        st.page_link(
            ui.PAGES["request"],
            label=f"Open {ui.markdown_safe(request)} in Request",
            icon=":material/segment:",
            query_params=links.params(page.run, request, number=number),
        )
    else:
        st.caption("Select a row to open its request.")
    page.exports.tables["requests"] = requests
    page.exports.show(st.container(horizontal_alignment="right"), "latency")


def _page() -> None:
    page = ui.open_page(
        "Latency", "What verifying costs: per token, per verify, and in each request's end-to-end time."
    )
    if page is None:
        return
    times, requests = page.memo("latency", lambda: step_times(page)), page.data.requests(*REQUESTS)
    if page.datasets is not None:
        requests = requests[has_tag(requests["dataset"], page.datasets)]
    added, whole = overhead(requests)
    verify_ms, hold_ms = float(requests["verify_ms"].fillna(0).sum()), float(requests["hold_ms"].fillna(0).sum())
    touched = int((requests["overhead_ms"].fillna(0) > 0).sum())
    ui.cards(
        [
            Card("Overhead", share(added, whole), f"{milliseconds(added)} of {milliseconds(whole)} end to end"),
            Card(
                "Verify",
                milliseconds(verify_ms),
                f"{share(verify_ms, whole)} of {milliseconds(whole)}",
                PART_COLOURS["verify"],
            ),
            Card(
                "Hold", milliseconds(hold_ms), f"{share(hold_ms, whole)} of {milliseconds(whole)}", PART_COLOURS["hold"]
            ),
            Card(
                "Requests with overhead",
                share(touched, len(requests)),
                f"{of(touched, len(requests))} finished requests",
            ),
            Card(
                "Time per token",
                milliseconds(times.median),
                f"median of {times.steps:,} decode steps",
                PART_COLOURS["decode"],
            ),
            Card(
                "First token",
                milliseconds(float(requests["ttft_ms"].median())),
                f"median of {of(requests['ttft_ms'].notna().sum(), len(requests))} requests",
                PART_COLOURS["prefill"],
            ),
        ]
    )
    shown = page.memo("latency-figures", lambda: _figures(page, times, requests))
    ui.pairs(shown, page.exports)
    if len(requests):
        _worst(page, requests)


if __name__ == "__main__":
    ui.guarded(_page)
