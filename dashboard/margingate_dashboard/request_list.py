"""The requests of a run in an order: what the box of the Request page offers, and which of them is chosen."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import address, choose, links, states, ui
from margingate_dashboard.rates import milliseconds
from margingate_dashboard.summary import tag
from margingate_dashboard.tables import FLIP_CODES
from margingate_dashboard.ui import Page

ORDERS = ("most flips", "lowest margin", "slowest", "newest")
LISTED = 200
"""Requests offered in the box; any other is found by its id."""
HEALTH_CHECK = "HEALTH_CHECK"
"""What the ids of SGLang's own requests begin with."""


class Listing(NamedTuple):
    """The run's requests in one order, by their numbers: one id may stand for several."""

    numbers: list[int]
    place: dict[int, int]
    """Where each number stands in ``numbers``."""
    ids: list[str]
    datasets: np.ndarray
    values: np.ndarray
    """The number that they are ordered by."""
    live: bool
    shared: set[str]
    """Ids of more than one request."""

    def name(self, number: int) -> str:
        """Return the request's id."""
        return self.ids[self.place[number]]

    def label(self, number: int, order: str) -> str:
        """Return a request's line in the box; made for those alone that are offered."""
        at = self.place.get(number)
        if at is None:
            return str(number)
        name = self.ids[at] + (f" (request {number})" if self.ids[at] in self.shared else "")
        return f"{name}  ·  {tag(self.datasets[at])}  ·  {_note(float(self.values[at]), order, self.live)}"

    def asked(self, request_id: object, number: object) -> int | None:
        """Return the request that a link names: by number and id, or the newest one with the id."""
        wanted = links.parse_step(number)
        if wanted in self.place and request_id in (None, self.name(wanted)):
            return wanted
        return max((n for n, name in zip(self.numbers, self.ids) if name == request_id), default=None)


def _note(value: float, order: str, live: bool) -> str:
    if order == "most flips":
        return f"{value:,.0f} flip{'' if value == 1 else 's'}"
    if order == "lowest margin":
        return f"lowest margin {value:.6g}"
    if order == "slowest":
        return milliseconds(value) if np.isfinite(value) else ("running" if live else "no row")
    return f"{value:,.0f} steps"


def listing(page: Page, order: str) -> Listing:
    """Return the run's requests in the asked order.

    Requests without a row have steps all the same and are listed as well: they run, or the run ended before them; so are
    those with a row and no steps: nothing of them was observed. A server's own health checks are not listed.
    """
    steps = page.steps("request", "request_id", "dataset", "margin", "state", "prefill")
    numbers = steps["request"].to_numpy(dtype=np.int64, na_value=-1)
    ids = steps["request_id"]
    checks = ids.cat.categories.astype(str).str.startswith(HEALTH_CHECK)
    rows = np.flatnonzero((numbers >= 0) & ~np.append(checks, False)[ids.cat.codes.to_numpy()])
    codes, found = pd.factorize(numbers[rows])
    table = page.requests("request", "request_id", "dataset", "e2e_ms").drop_duplicates("request", keep="last")
    table = table[table["request"].notna() & ~table["request_id"].astype(str).str.startswith(HEALTH_CHECK)]
    unseen = table[~table["request"].isin(found)]
    count, first = len(found), np.zeros(len(found), dtype=np.int64)
    first[codes[::-1]] = rows[::-1]
    if order == "most flips":
        values = np.bincount(codes[np.isin(steps["state"].to_numpy()[rows], FLIP_CODES)], minlength=count).astype(float)
        values, falling = np.concatenate([values, np.zeros(len(unseen))]), True
    elif order == "lowest margin":
        lowest = np.full(count, np.inf)
        decode = ~states.as_bool(steps["prefill"])[rows]
        np.minimum.at(lowest, codes[decode], steps["margin"].to_numpy()[rows][decode])
        values, falling = np.concatenate([lowest, np.full(len(unseen), np.inf)]), False
    elif order == "slowest":
        times = dict(zip(table["request"].tolist(), table["e2e_ms"].tolist()))
        values = np.array([times.get(n, np.nan) for n in [*found.tolist(), *unseen["request"]]], dtype=float)
        falling = True
    else:
        values = np.concatenate([np.bincount(codes, minlength=count), np.zeros(len(unseen))])
        falling = True
    every = np.concatenate([found, unseen["request"].to_numpy(dtype=np.int64)])
    key = -every if order == "newest" else (-values if falling else values)  # NaN sorts last: those without a row
    ranked = np.lexsort((every, key))
    ordered = [int(n) for n in every[ranked]]
    names = np.array([*ids.iloc[first].astype(str), *unseen["request_id"].astype(str)], dtype=object)[ranked].tolist()
    datasets = np.array([*steps["dataset"].iloc[first], *unseen["dataset"]], dtype=object)[ranked]
    shared = {name for name, times in Counter(names).items() if times > 1}
    place = {number: at for at, number in enumerate(ordered)}
    return Listing(ordered, place, names, datasets, values[ranked], page.info.is_live, shared)


def _absent(page: Page, asked: object, number: object) -> None:
    """Say that a link names a request that is not shown, and why; nothing else is shown then."""
    every = page.data.requests("request", "request_id")
    ids = {*every["request_id"].astype(str), *page.data.steps("request_id")["request_id"].unique().astype(str)}
    numbers = set(every["request"].dropna().astype(int))
    wanted = asked if asked is not None else number
    here = str(asked) in ids if asked is not None else links.parse_step(number) in numbers
    if here:
        st.warning(
            f"Request “{ui.markdown_safe(str(wanted)[:80])}” is hidden by the filters in the sidebar.",
            icon=":material/filter_alt:",
        )
    else:
        st.warning(f"Request “{ui.markdown_safe(str(wanted)[:80])}” is not in this run.", icon=":material/link_off:")
    st.page_link(ui.PAGES["requests"], label="All requests of this run", query_params=links.params(page.run))


def _forget() -> None:
    """Take out of the address which request is shown, and what of it."""
    address.write(request=None, number=None, step=None, tokens=None, find=None)


def choose_request(page: Page) -> tuple[int, str] | None:
    """Let the reader choose a request, and return its number and id; None where there is none, or the one asked for is not shown."""
    left, middle, right = st.columns([0.4, 0.4, 0.2], vertical_alignment="bottom")
    order = (
        left.segmented_control("Show first", ORDERS, default=ORDERS[0], key="order", bind="query-params") or ORDERS[0]
    )
    found = page.memo("requests", lambda: listing(page, order), order, page.info.is_live)
    if not found.numbers:
        ui.empty_state(
            "No requests", "<p>No step of this run (or of what is chosen in the sidebar) has been recorded yet.</p>"
        )
        return None
    asked, asked_number = address.get("request"), address.get("number")
    st.session_state["find"] = address.get("find") or ""

    def search() -> None:
        words = st.session_state["find"].strip()
        if words:
            _forget()
            address.write(find=words)
        else:  # what is shown stays
            address.write(find=None)

    typed = right.text_input(
        "Find by id", key="find", placeholder="request id", max_chars=200, on_change=search
    ).strip()
    known = found.asked(asked, asked_number)
    if known is None and (asked is not None or asked_number is not None):
        _absent(page, asked, asked_number)
        return None
    hits = [n for n, name in zip(found.numbers, found.ids) if typed in name] if typed else found.numbers
    if not hits:
        right.caption("no such id among those shown")
        hits, typed = found.numbers, ""
    offered = hits[:LISTED]
    if known is not None and known not in offered:  # what the address names is shown, whatever else is looked for
        offered = [known, *offered]
    chosen = offered[0] if known is None else known
    st.session_state["request_box"] = chosen

    def remember() -> None:
        number = st.session_state["request_box"]
        if number is None:
            return
        address.write(request=found.name(number), number=str(number), step=None, tokens=None)

    more = f", first {LISTED} of {len(hits):,}" if len(hits) > LISTED else f", {len(hits):,}"
    middle.selectbox(
        f"Request ({order}{more})",
        offered,
        key="request_box",
        on_change=remember,
        format_func=lambda number: found.label(number, order),
    )
    if known is not None and known != found.numbers[0] and not typed:
        middle.button(f"Go to the first by “{order}”", on_click=_forget, type="tertiary")
    choose.copy_link(run=page.run, request=found.name(chosen), number=str(chosen))
    return chosen, found.name(chosen)
