"""Request: one response, token by token, with its margins, its flips and its time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import data, links, states, tokens, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.context import flip_text
from margingate_dashboard.figures import request as figures
from margingate_dashboard.rates import milliseconds, number, of, share
from margingate_dashboard.summary import has_tag, tag
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, STATES, TRIGGERED
from margingate_dashboard.ui import Page

ORDERS = ("most flips", "lowest margin", "slowest", "newest")
LISTED = 200
"""Requests offered in the box; any other is found by its id."""
STRIP = 800
"""Tokens shown at once."""

REQUESTS = (
    "request_id",
    "dataset",
    "policy",
    "repair",
    "prompt_tokens",
    "cached_tokens",
    "floored_tokens",
    "output_tokens",
    "triggers",
    "verified",
    "audited",
    "flips",
    "missed",
    "ttft_ms",
    "tpot_ms",
    "e2e_ms",
    "prefill_ms",
    "verify_ms",
    "hold_ms",
    "overhead_ms",
    "overhead_share",
    "max_batch_rows",
    "retractions",
    "guarantee",
    "guarantee_note",
    "finish_reason",
)


def listing(page: Page, order: str) -> pd.DataFrame:
    """Return the run's requests in the asked order: request_id, dataset and the number that they are ordered by.

    Requests that are still running have steps but no request row; they are listed as well.
    """
    steps = page.data.steps("request_id", "dataset", "margin", "state", "prefill")
    ids = steps["request_id"]
    codes = ids.cat.codes.to_numpy()
    keep = codes >= 0
    if page.datasets is not None:
        keep &= has_tag(steps["dataset"], page.datasets)
    count = len(ids.cat.categories)
    present = np.bincount(codes[keep], minlength=count)
    first = np.zeros(count, dtype=np.int64)
    first[codes[keep][::-1]] = np.flatnonzero(keep)[::-1]
    table = pd.DataFrame({"request_id": ids.cat.categories.astype(str), "steps": present, "first": first})
    table["dataset"] = [tag(v) for v in steps["dataset"].iloc[first]]
    if order == "most flips":
        flips = np.isin(steps["state"].to_numpy(), [states.CODE[s.name] for s in (FLIPPED, REPAIRED, MISSED)]) & keep
        table["key"] = np.bincount(codes[flips], minlength=count)
        table["note"] = [f"{n:,} flip{'' if n == 1 else 's'}" for n in table["key"]]
        table["key"] = -table["key"]
    elif order == "lowest margin":
        lowest = np.full(count, np.inf)
        decode = keep & ~states.as_bool(steps["prefill"])
        np.minimum.at(lowest, codes[decode], steps["margin"].to_numpy()[decode])
        table["key"] = lowest
        table["note"] = table["key"].map("lowest margin {:.4g}".format)
    elif order == "slowest":
        times = (
            page.data.requests("request_id", "e2e_ms").drop_duplicates("request_id").set_index("request_id")["e2e_ms"]
        )
        table["key"] = -table["request_id"].map(times).astype(float)
        table["note"] = [milliseconds(-v) if v == v else "running" for v in table["key"]]
    else:
        table["key"] = -table["first"]
        table["note"] = table["steps"].map("{:,} steps".format)
    return table[table["steps"] > 0].sort_values(["key", "first"], kind="stable").reset_index(drop=True)


def _choose(page: Page) -> str | None:
    left, middle, right = st.columns([0.4, 0.4, 0.2], vertical_alignment="bottom")
    order = left.segmented_control("Show first", ORDERS, default=ORDERS[0], key="order") or ORDERS[0]
    table = page.memo("requests", lambda: listing(page, order), order)
    if table.empty:
        ui.empty_state("No requests", "<p>No step of this run (or of the chosen datasets) has been recorded yet.</p>")
        return None
    asked = st.query_params.get("request")
    typed = right.text_input("Find by id", key="find", placeholder="request id", max_chars=200).strip()
    everything = set(table["request_id"])
    if typed:
        hits = [rid for rid in table["request_id"] if typed in rid]
        if hits:
            table = table[table["request_id"].isin(hits)]
        else:
            right.caption("no such id in this run")
    known = links.known_run(asked, everything)
    if asked is not None and known is None:
        st.warning(f"Request “{ui.markdown_safe(asked[:80])}” is not in this run.", icon=":material/link_off:")
    offered = table["request_id"].head(LISTED).tolist()
    if known is not None and known not in offered and not typed:
        offered.insert(0, known)
    labels = {r: f"{r}  ·  {d}  ·  {n}" for r, d, n in zip(table["request_id"], table["dataset"], table["note"])}
    chosen = known if known in offered else offered[0]
    st.session_state["request_box"] = chosen

    def remember() -> None:
        st.query_params["request"] = st.session_state["request_box"]
        st.query_params.pop("step", None)

    more = f", first {LISTED} of {len(table):,}" if len(table) > LISTED else f", {len(table):,}"
    middle.selectbox(
        f"Request ({order}{more})",
        offered,
        key="request_box",
        on_change=remember,
        format_func=lambda r: labels.get(r, r),
    )
    if asked != chosen:
        st.query_params["request"] = str(chosen)
        st.query_params.pop("step", None)
    return str(chosen)


def _cards(request: pd.Series | None, steps: pd.DataFrame) -> None:
    decode = steps[~states.as_bool(steps["prefill"])]
    state = decode["state"].to_numpy()
    flips = int(np.isin(state, [states.CODE[s.name] for s in (FLIPPED, REPAIRED, MISSED)]).sum())
    low = int(states.triggered(decode).sum())
    repaired, missed = (int((state == states.CODE[s.name]).sum()) for s in (REPAIRED, MISSED))
    seen = int(states.verified(decode).sum())
    items = [
        Card("Triggered", f"{low:,}", f"{share(low, len(decode))} of {len(decode):,} decode steps", TRIGGERED.colour),
        Card("Flips", f"{flips:,}", f"of {seen:,} verified steps", FLIPPED.colour),
        Card("Repaired", f"{repaired:,}", f"of {flips:,} flips", REPAIRED.colour),
        Card(
            "Missed", f"{missed:,}", f"of {seen - low if seen > low else 0:,} untriggered steps verified", MISSED.colour
        ),
    ]
    if request is not None:
        added, whole = number(request["overhead_ms"], 0.0), number(request["e2e_ms"], 0.0)
        items += [
            Card("Overhead", milliseconds(added), f"{share(added, whole)} of {milliseconds(whole)} end to end"),
            Card(
                "First token",
                milliseconds(number(request["ttft_ms"])),
                f"then {milliseconds(float(request['tpot_ms']))} a token",
            ),
            Card(
                "Guarantee",
                str(request["guarantee"]),
                str(request["guarantee_note"] or "")
                if pd.notna(request["guarantee_note"])
                else f"policy {request['policy']}, {request['finish_reason']}",
            ),
        ]
    else:
        items.append(Card("Status", "running", "times appear when it has finished"))
    ui.cards(items)


def _step_controls(steps: pd.DataFrame) -> int | None:
    """Let the reader go from flip to flip; the step is part of the link."""
    selected = links.parse_step(st.query_params.get("step"))
    last = int(steps["step"].max())
    if selected is not None and not 0 <= selected <= last:
        st.caption(f":material/link_off: step {selected} is not recorded; this request has steps 0 to {last}")
        selected = None
    notable = steps.loc[
        steps["state"].isin([states.CODE[s.name] for s in (FLIPPED, REPAIRED, MISSED)]), "step"
    ].tolist()

    def go(step: int) -> None:
        st.query_params["step"] = str(step)

    def typed() -> None:
        value = st.session_state["step_box"]
        if value is None:
            st.query_params.pop("step", None)
        else:
            go(int(value))

    st.session_state["step_box"] = selected
    here = -1 if selected is None else selected
    before, after = [s for s in notable if s < here], [s for s in notable if s > here]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.number_input("Step", 0, last, step=1, key="step_box", on_change=typed, width=150, placeholder="none")
        st.button(
            "Previous flip",
            icon=":material/chevron_left:",
            disabled=not before,
            on_click=go,
            args=(before[-1] if before else 0,),
        )
        st.button(
            "Next flip",
            icon=":material/chevron_right:",
            disabled=not after,
            on_click=go,
            args=(after[0] if after else 0,),
        )
        place = f"{notable.index(here) + 1} of {len(notable)}" if here in notable else f"{len(notable)}"
        st.caption(f"{place} flip{'s' if len(notable) != 1 else ''} in this response")
    return selected


def _strip(page: Page, chosen: str, steps: pd.DataFrame, selected: int | None) -> None:
    pages = -(-len(steps) // STRIP)
    part = 0
    if pages > 1:
        want = 0 if selected is None else int((steps["step"] < selected).sum()) // STRIP
        names = [
            f"{int(steps['step'].iloc[i * STRIP])}–{int(steps['step'].iloc[min(len(steps), (i + 1) * STRIP) - 1])}"
            for i in range(pages)
        ]
        span = st.selectbox("Tokens", names, index=min(want, pages - 1), key=f"part-{selected}", width=220)
        part = names.index(str(span))
    known = data.vocabulary(page.data)
    shown = steps.iloc[part * STRIP : (part + 1) * STRIP]
    strip = page.memo("strip", lambda: tokens.strip(shown, known, selected), chosen, part, selected)
    st.html(tokens.legend() + strip)


def _page() -> None:
    page = ui.open_page(
        "Request", "One response, token by token: where the margin was low, what flipped, and where the time went."
    )
    if page is None:
        return
    chosen = _choose(page)
    if chosen is None:
        return
    steps = data.request_steps(page.info.path, chosen)
    steps = steps.assign(state=states.classify(steps))
    steps["shown"] = [ui.safe(tokens.plain(t, i)) for t, i in zip(steps["token_text"], steps["token"])]
    rows = page.data.requests(*REQUESTS)
    mine = rows[rows["request_id"] == chosen]
    request = None if mine.empty else mine.iloc[-1]
    _cards(request, steps)
    _prompt(page, chosen, request)
    selected = _step_controls(steps)
    _strip(page, chosen, steps, selected)
    log = st.session_state.setdefault("log_margins", True)
    left, right = st.columns([0.64, 0.36])
    with left:
        event = ui.chart(
            page.memo("margins", lambda: figures.margins(steps, selected, log, page.subtitle), chosen, selected, log),
            "margins",
            page.exports,
            key=f"margins-{chosen}",
            on_select="rerun",
            selection_mode="points",
        )
        st.toggle("Logarithmic margins", key="log_margins")
    with right:
        ui.chart(
            figures.waterfall(pd.Series(dtype=float) if request is None else request, page.subtitle),
            "latency",
            page.exports,
        )
    _follow_click(event, chosen, selected)
    if selected is not None:
        st.markdown(f"##### Step {selected} as text, for an issue")
        st.code(
            flip_text(page.run, page.info.manifest, chosen, steps, selected, data.vocabulary(page.data)),
            language=None,
            wrap_lines=True,
        )
    wanted = steps.assign(state=[STATES[s].name for s in steps["state"]]).drop(columns="shown")
    page.exports.tables["steps"] = wanted
    # A table of 27 columns takes the browser longer than the rest of the page: only where it is asked for.
    if st.toggle("All steps as a table", key="all-steps"):
        ui.table(wanted, "steps", page.exports)
    page.exports.show(page.export_place, "request")


def _follow_click(event: object, chosen: str, selected: int | None) -> None:
    """A click on a step of the margin plot selects it."""
    points = getattr(getattr(event, "selection", None), "points", None) or []
    step = links.parse_step(points[0].get("x")) if points else None
    # The plot keeps its selection over reruns: only a new click counts.
    if step is not None and (chosen, step) != st.session_state.get("clicked"):
        st.session_state["clicked"] = (chosen, step)
        if step != selected:
            st.query_params["step"] = str(step)
            st.rerun()


def _prompt(page: Page, chosen: str, request: pd.Series | None) -> None:
    if request is None:
        return
    floored = int(number(request["floored_tokens"], 0))
    cache = f"{of(number(request['cached_tokens'], 0), number(request['prompt_tokens'], 0))} from the prefix cache"
    text = page.data.requests("request_id", "prompt_text")
    prompt = text.loc[text["request_id"] == chosen, "prompt_text"].dropna()
    with st.expander(
        f"Prompt: {int(number(request['prompt_tokens'], 0)):,} tokens, {cache}"
        + (f", {floored} given up" if floored else "")
    ):
        if len(prompt):
            st.text(prompt.iloc[-1])
        else:
            st.caption("The run did not record text (start the server with --margingate-trace-text on to record it).")


if __name__ == "__main__":
    ui.guarded(_page)
