"""Request: one response, token by token, with its margins, its flips and its time."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import address, annotate, data, links, states, tokens, ui, why_panel
from margingate_dashboard.cards import Card
from margingate_dashboard.clicks import clicked_step
from margingate_dashboard.context import flip_text
from margingate_dashboard.figures import request as figures
from margingate_dashboard.rates import milliseconds, number, of, share
from margingate_dashboard.request_list import choose_request
from margingate_dashboard.tables import FLIP_CODES
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, STATES, TRIGGERED
from margingate_dashboard.ui import Page

STRIP = 800
"""Tokens shown at once."""

REQUESTS = (
    "request",
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
    "steps",
    "retractions",
    "guarantee",
    "guarantee_note",
    "finish_reason",
    "temperature",
    "seed",
)


def _cards(request: pd.Series | None, steps: pd.DataFrame, live: bool) -> None:
    decode = steps[~states.as_bool(steps["prefill"])]
    state = decode["state"].to_numpy()
    flips = int(np.isin(state, FLIP_CODES).sum())
    low = int(states.triggered(decode).sum())
    repaired, missed = (int((state == states.CODE[s.name]).sum()) for s in (REPAIRED, MISSED))
    seen = int(states.verified(decode).sum())
    would = low and not (states.triggered(decode) & states.verified(decode)).any()
    items = [
        Card(
            "Would trigger" if would else "Triggered",
            f"{low:,}",
            f"{share(low, len(decode))} of {len(decode):,} decode steps" + (", none verified" if would else ""),
            TRIGGERED.colour,
        ),
        Card("Flips", f"{flips:,}", f"of {seen:,} verified steps", FLIPPED.colour),
        Card("Repaired", f"{repaired:,}", f"of {flips:,} flips", REPAIRED.colour),
        Card(
            "Missed",
            f"{missed:,}",
            f"{int(states.above(decode).sum()):,} flips above tau, {int(states.examined(decode).sum()):,} untriggered steps verified",
            MISSED.colour,
        ),
    ]
    if request is not None:
        added, whole = number(request["overhead_ms"], 0.0), number(request["e2e_ms"], 0.0)
        items += [
            Card("Overhead", milliseconds(added), f"{share(added, whole)} of {milliseconds(whole)} end to end"),
            Card(
                "TTFT",
                milliseconds(number(request["ttft_ms"])),
                f"time to first token; then TPOT {milliseconds(number(request['tpot_ms']))}",
            ),
            _sampling(request),
            Card(
                "Guarantee",
                str(request["guarantee"]),
                str(request["guarantee_note"] or "")
                if pd.notna(request["guarantee_note"])
                else f"policy {request['policy']}, {request['finish_reason']}",
            ),
        ]
    else:
        running = Card("Status", "running", "times appear when it has finished")
        items.append(running if live else Card("Status", "no row", "the run ended before this request did"))
    ui.cards(items)


def _sampling(request: pd.Series) -> Card:
    """Say how the request's tokens were chosen."""
    temperature, seed = request["temperature"], request["seed"]
    if pd.isna(temperature):
        return Card("Sampling", "not recorded", "the run was made before temperatures were")
    if not temperature:
        return Card("Sampling", "greedy", "temperature 0; the margin is that of the logits")
    if pd.isna(seed):
        return Card("Temperature", f"{temperature:g}", "sampled without a seed: no margin, nothing to repeat")
    return Card(
        "Temperature", f"{temperature:g}", f"sampled with seed {int(seed)}; the margin is that of logits plus noise"
    )


def _unobserved(page: Page, chosen: int) -> None:
    """Show a request of which no step was observed: its row, and why there is no more."""
    rows = page.data.requests(*REQUESTS)
    request = rows[rows["request"] == chosen].iloc[-1]
    why = request["guarantee_note"] if pd.notna(request["guarantee_note"]) else "no reason was recorded"
    tokens_out = int(number(request["output_tokens"], 0))
    ui.cards(
        [
            Card("Output", f"{tokens_out:,}", f"tokens, finished by {request['finish_reason']}"),
            Card("TTFT", milliseconds(number(request["ttft_ms"])), "time to first token"),
            Card("TPOT", milliseconds(number(request["tpot_ms"])), "time per output token"),
            Card(
                "End to end",
                milliseconds(number(request["e2e_ms"])),
                f"largest batch {int(number(request['max_batch_rows'], 0))}",
            ),
            _sampling(request),
            Card("Guarantee", str(request["guarantee"]), str(why)),
        ]
    )
    _prompt(page, chosen, request)
    ui.empty_state(
        "No step of this request was observed",
        f"<p>It ran under policy {html.escape(str(request['policy']))}; {html.escape(str(why))}. Its tokens and margins are "
        "not in the trace.</p>",
    )


def _select(step: int) -> None:
    """Write into the address which step is selected; the page of tokens that it stands on comes with it."""
    address.write(step=str(step), tokens=None)


def _step_box(selected: int | None, last: int) -> None:
    """Show the box of the selected step: another one whenever a step was selected elsewhere.

    Were it the same one, a message that the browser sends before it knows of the new step would name the old one, or none, and
    Streamlit would take that for the reader's typing.
    """
    number = st.session_state.get("step_boxes", 0)
    if st.session_state.get(f"step_box-{number}", -1) != selected:
        st.session_state.pop(f"step_box-{number}", None)
        number = st.session_state["step_boxes"] = number + 1
        st.session_state[f"step_box-{number}"] = selected

    def typed() -> None:
        if number != st.session_state["step_boxes"]:
            return  # into a box that the page has replaced since
        value = st.session_state[f"step_box-{number}"]
        if value is None:
            address.write(step=None)
        else:
            _select(int(value))

    st.number_input(
        "Step",
        0,
        last,
        value=None,
        step=1,
        key=f"step_box-{number}",
        on_change=typed,
        width=150,
        placeholder="none",
    )


def _step_controls(steps: pd.DataFrame) -> int | None:
    """Let the reader go from flip to flip; the step is part of the link."""
    selected = links.parse_step(address.get("step"))
    last = int(steps["step"].max())
    if selected is not None and not 0 <= selected <= last:
        st.caption(f":material/link_off: step {selected} is not recorded; this request has steps 0 to {last}")
        selected = None
    notable = steps.loc[steps["state"].isin(FLIP_CODES), "step"].tolist()

    here = -1 if selected is None else selected
    before, after = [s for s in notable if s < here], [s for s in notable if s > here]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        _step_box(selected, last)
        st.button(
            "Previous flip",
            icon=":material/chevron_left:",
            shortcut="p",
            help="Key p",
            disabled=not before,
            on_click=_select,
            args=(before[-1] if before else 0,),
        )
        st.button(
            "Next flip",
            icon=":material/chevron_right:",
            shortcut="n",
            help="Key n",
            disabled=not after,
            on_click=_select,
            args=(after[0] if after else 0,),
        )
        place = f"{notable.index(here) + 1} of {len(notable)}" if here in notable else f"{len(notable)}"
        st.caption(f"{place} flip{'s' if len(notable) != 1 else ''} in this response")
    return selected


def _strip(page: Page, chosen: int, steps: pd.DataFrame, selected: int | None) -> None:
    pages = -(-len(steps) // STRIP)
    part = 0
    if pages > 1:
        starts = steps["step"].iloc[::STRIP].tolist()
        ends = [*(steps["step"].iloc[STRIP - 1 :: STRIP].tolist()), int(steps["step"].iloc[-1])][:pages]
        asked = links.parse_step(address.get("tokens"))
        at = selected if asked is None else asked
        part = 0 if at is None else max(0, int(np.searchsorted(starts, at, side="right")) - 1)
        st.session_state["tokens_box"] = part

        def turn(to: int | None = None) -> None:
            address.write(tokens=str(starts[st.session_state["tokens_box"] if to is None else to]))

        with st.container(horizontal=True, vertical_alignment="bottom"):
            st.selectbox(
                "Tokens",
                range(pages),
                format_func=lambda i: f"{starts[i]}–{ends[i]}",
                key="tokens_box",
                on_change=turn,
                width=220,
            )
            st.button(
                "Earlier tokens", icon=":material/arrow_back:", disabled=part == 0, on_click=turn, args=(part - 1,)
            )
            st.button(
                "Later tokens",
                icon=":material/arrow_forward:",
                disabled=part == pages - 1,
                on_click=turn,
                args=(part + 1,),
            )
    known = data.vocabulary(page.data)
    shown = steps.iloc[part * STRIP : (part + 1) * STRIP]
    strip = page.memo("strip", lambda: tokens.strip(shown, known, selected), chosen, part, selected)
    st.html(tokens.legend() + strip)


def _page() -> None:
    page = ui.open_page(
        "Request",
        "One response, token by token: where the margin was low, what flipped, and where the time went.",
        link=False,
    )
    if page is None:
        return
    found = choose_request(page)
    if found is None:
        return
    chosen, request_id = found
    if not (page.data.steps("request")["request"] == chosen).any():
        _unobserved(page, chosen)
        return
    steps = data.request_steps(page.info.path, chosen)
    steps = steps.assign(state=states.classify(steps))
    steps["shown"] = [ui.safe(tokens.plain(t, i)) for t, i in zip(steps["token_text"], steps["token"])]
    rows = page.data.requests(*REQUESTS)
    mine = rows[rows["request"] == chosen]
    request = None if mine.empty else mine.iloc[-1]
    _cards(request, steps, page.info.is_live)
    _prompt(page, chosen, request)
    selected = _step_controls(steps)
    _strip(page, chosen, steps, selected)
    pressed = clicked_step(f"tokens-{chosen}")
    if pressed is not None and pressed != selected:
        _select(pressed)
        st.rerun()
    log = st.toggle("Logarithmic margins", value=True, key="log", bind="query-params")
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
    with right:
        ui.chart(
            figures.waterfall(pd.Series(dtype=float) if request is None else request, page.subtitle),
            "latency",
            page.exports,
        )
    _follow_click(event, chosen, selected)
    annotate.show(page, chosen, selected)
    if selected is not None:
        why_panel.show(page, steps, selected, f"{chosen}-{selected}")
        st.markdown(f"##### Step {selected} as text, for an issue")
        st.code(
            flip_text(page.run, page.info.manifest, request_id, steps, selected, data.vocabulary(page.data)),
            language=None,
            wrap_lines=True,
        )
    wanted = steps.assign(state=[STATES[s].name for s in steps["state"]]).drop(columns="shown")
    page.exports.tables["steps"] = wanted
    # A table of 27 columns takes the browser longer than the rest of the page: only where it is asked for.
    if st.toggle("All steps as a table", key="all", bind="query-params"):
        ui.table(wanted, "steps", page.exports)
    page.exports.show("request")


def _follow_click(event: object, chosen: int, selected: int | None) -> None:
    """A click on a step of the margin plot selects it."""
    points = getattr(getattr(event, "selection", None), "points", None) or []
    step = links.parse_step(points[0].get("x")) if points else None
    # The plot keeps its selection over reruns: only a new click counts.
    if step is not None and (chosen, step) != st.session_state.get("clicked"):
        st.session_state["clicked"] = (chosen, step)
        if step != selected:
            _select(step)
            st.rerun()


def _prompt(page: Page, chosen: int, request: pd.Series | None) -> None:
    if request is None:
        return
    floored = int(number(request["floored_tokens"], 0))
    cache = f"{of(number(request['cached_tokens'], 0), number(request['prompt_tokens'], 0))} from the prefix cache"
    text = page.data.requests("request", "prompt_text")
    prompt = text.loc[text["request"] == chosen, "prompt_text"].dropna()
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
