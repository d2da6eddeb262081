"""The requests of a run in an order: what the box of the Request page offers."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pandas as pd

from margingate_dashboard import links, states
from margingate_dashboard.rates import milliseconds
from margingate_dashboard.summary import tag
from margingate_dashboard.tables import FLIP_CODES
from margingate_dashboard.ui import Page

ORDERS = ("most flips", "lowest margin", "slowest", "newest")
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
