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
from margingate_dashboard.facts.policies import leading, present
from margingate_dashboard.facts.quantiles import QUANTILES, quantile_table
from margingate_dashboard.figures import latency as figures
from margingate_dashboard.rates import milliseconds, of, share
from margingate_dashboard.summary import overhead
from margingate_dashboard.theme import PART_COLOURS
from margingate_dashboard.ui import Page

STEPS = ("policy", "prefill", "batch_rows", "step_ms", "verify_ms", "window_rows", "verified")
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
    "steps",
    "prefill_chunks",
    "floored_tokens",
)
WORST = 10
ECDF, HISTOGRAM = "share at or below", "histogram"


def quantile_config() -> dict[str, object]:
    """Return how quantiles are written."""
    return {name: st.column_config.NumberColumn(format="%.2f") for name in QUANTILES}


class Times(NamedTuple):
    """Quantiles of step times, by policy and batch rows."""

    steps: int
    """Decode steps with a time."""
    medians: dict[str, float]
    """Median time of a decode step, by policy."""
    whole: dict[str, pd.DataFrame]
    verify: dict[str, pd.DataFrame]
    window: pd.DataFrame
    """By columns recomputed for the step."""


def step_times(page: Page) -> Times:
    """Sum up the run's step times."""
    steps = page.steps(*STEPS)
    keep = ~states.as_bool(steps["prefill"])
    rows = steps["batch_rows"].fillna(0).to_numpy(dtype=np.int32)
    took, waited = steps["step_ms"].to_numpy(), steps["verify_ms"].to_numpy()
    whole, verify, medians = {}, {}, {}
    names = present(steps["policy"])
    for name in names:
        mine = keep & (steps["policy"] == name).to_numpy() if len(names) > 1 else keep
        known = took[mine & np.isfinite(took)]
        medians[name] = float(np.median(known)) if known.size else float("nan")
        whole[ui.safe(name)] = figures.quantiles(rows[mine], took[mine])
        paid = mine & (waited > 0)
        verify[ui.safe(name)] = figures.quantiles(rows[paid], waited[paid])
    window = steps["window_rows"].fillna(0).to_numpy(dtype=np.int32)
    seen = keep & steps["verified"].to_numpy() & (window > 0)
    known = took[keep & np.isfinite(took)]
    return Times(
        steps=known.size,
        medians=medians,
        whole=whole,
        verify=verify,
        window=figures.quantiles(window[seen], waited[seen]),
    )


def _by_policy(requests: pd.DataFrame, column: str, scale: float = 1.0) -> dict[str, np.ndarray]:
    groups = requests.groupby(requests["policy"].astype("string").fillna("unknown"), observed=True)[column]
    return {ui.safe(name): scale * values.to_numpy(dtype=np.float64) for name, values in groups}


def _figures(page: Page, times: Times, requests: pd.DataFrame, shape: str) -> dict[str, go.Figure]:
    draw = figures.ecdf if shape == ECDF else figures.distribution
    by_policy = functools.partial(_by_policy, requests)
    waits = "Verify time of the steps that waited for one"
    axis = "overhead, % of end-to-end time"
    return {
        "step-time": figures.by_rows(times.whole, "Time of a decode step by batch size", "decode step", page.subtitle),
        "verify-time": figures.by_rows(times.verify, waits, "verify", page.subtitle),
        "tpot": draw(by_policy("tpot_ms"), "TPOT (time per output token), by request", "ms", page.subtitle),
        "verify-cost": figures.verify_cost(times.window, page.subtitle),
        "overhead": draw(by_policy("overhead_share", 100.0), "Overhead by request", axis, page.subtitle),
        "ttft": draw(by_policy("ttft_ms"), "TTFT (time to first token), by request", "ms", page.subtitle),
    }


@ui.fragment
def _worst(page: Page, requests: pd.DataFrame) -> None:
    st.markdown(f"##### Most overhead: the worst {min(WORST, len(requests))} of {len(requests):,} requests")
    shown = requests.nlargest(WORST, "overhead_ms").assign(overhead_share=lambda f: 100 * f["overhead_share"])
    rows = ui.chosen_rows(
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
        "worst",
        [str(n) for n in shown["request"]],
        key="table-worst",
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
    page.exports.show("latency")


def _page() -> None:
    page = ui.open_page(
        "Latency", "What verifying costs: per token, per verify, and in each request's end-to-end time."
    )
    if page is None:
        return
    times, every = page.memo("latency", lambda: step_times(page)), page.requests(*REQUESTS)
    policy = leading(every["policy"])
    requests = every[(every["policy"] == policy).to_numpy()]
    if every["policy"].nunique() > 1:
        st.markdown(f"##### Policy {ui.markdown_safe(policy)}: {of(len(requests), len(every))} finished requests")
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
                "Decode step",
                milliseconds(times.medians.get(policy, float("nan"))),
                "median time of a forward and its verify",
                PART_COLOURS["decode"],
            ),
            Card(
                "TPOT",
                milliseconds(float(requests["tpot_ms"].median())),
                f"time per output token, median of {of(requests['tpot_ms'].notna().sum(), len(requests))} requests",
                PART_COLOURS["decode"],
            ),
            Card(
                "TTFT",
                milliseconds(float(requests["ttft_ms"].median())),
                f"time to first token, median of {of(requests['ttft_ms'].notna().sum(), len(requests))} requests",
                PART_COLOURS["prefill"],
            ),
        ]
    )
    st.markdown("##### Quantiles by policy")
    ui.table(quantile_table(every), "quantiles", page.exports, column_config=quantile_config())
    shape = st.segmented_control("Requests as", (ECDF, HISTOGRAM), default=ECDF, key="as", bind="query-params") or ECDF
    shown = page.memo("latency-figures", lambda: _figures(page, times, every, shape), shape)
    ui.pairs(shown, page.exports)
    if float(every["overhead_ms"].fillna(0).sum()) > 0:
        _worst(page, every)
    else:
        st.caption("No request of these waited for a verify: there is no worst one.")
        page.exports.tables["requests"] = every
        page.exports.show("latency")


if __name__ == "__main__":
    ui.guarded(_page)
