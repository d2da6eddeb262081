"""The address of the page: what the reader chose, written here and nowhere else, so that no choice of theirs is lost.

When the browser asks for a run of the page while one is under way, Streamlit starts the new run beside the old one, which goes on
until it next asks whether to stop, and both share one ``st.query_params``. An old run that begins again meanwhile (after
``st.rerun``) fills it with the query string that it began with, over what a callback of the new run has just written; and a run
that is stopped between its callbacks and its end leaves what it wrote to the browser alone, whose newest request is older. The
browser then shows an address that the page does not. So what is written is also kept in the session, is read from there, and is
forgotten only when a run that knew it has ended whole: from then on the address may change by any other way, as by Back.

Parameters that a widget is bound to (``bind="query-params"``) are Streamlit's own and are not written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import streamlit as st

_WRITES = "address_writes"
"""In the session's state: what was written and not yet shown by a whole run, by parameter."""
_PAGE = "address_page"
"""In the session's state: the page that these writes belong to, which is the one that ran last."""

_inside: ContextVar[bool] = ContextVar("margingate_address_kept", default=False)


@dataclass(frozen=True, eq=False)
class _Write:
    """One write. Two of the same values are two: a run forgets those alone that it knew."""

    values: tuple[str, ...]
    """None of them: the parameter was taken out."""


def write(**params: str | Iterable[str] | None) -> None:
    """Write parameters into the address, in this order; None takes one out.

    In a callback, or before ``st.rerun``: the run that follows reads them.
    """
    given = {
        name: _Write(() if value is None else (value,) if isinstance(value, str) else tuple(value))
        for name, value in params.items()
    }
    # First: whatever comes after may be interrupted.
    st.session_state[_WRITES] = {**_written(), **given}
    _put(given)


def get_all(name: str) -> list[str]:
    """Return a parameter's values; none where the address does not name it."""
    found = _written().get(name)
    return st.query_params.get_all(name) if found is None else [*found.values]


def get(name: str) -> str | None:
    """Return a parameter's last value, or None."""
    values = get_all(name)
    return values[-1] if values else None


@contextmanager
def kept(page: str | None = None) -> Iterator[None]:
    """Run a page, or a fragment alone, at the address that was written; within another one this does nothing.

    Parameters
    ----------
    page
        The page's path: what was written on another one is dropped. None for a fragment, which is on the page that ran last.
    """
    if _inside.get():
        yield
        return
    token = _inside.set(True)
    try:
        if page is not None and st.session_state.get(_PAGE) != page:
            st.session_state[_PAGE], st.session_state[_WRITES] = page, {}
        known = _written()
        _put(known)
        yield
        # Not reached by a run that is interrupted. An older run may have begun again after this one.
        now = _written()
        _put(now)
        st.session_state[_WRITES] = {n: w for n, w in now.items() if w is not known.get(n)}
    finally:
        _inside.reset(token)


def _written() -> dict[str, _Write]:
    found: dict[str, _Write] = st.session_state.get(_WRITES, {})
    return found


def _put(writes: dict[str, _Write]) -> None:
    """Let Streamlit, and through it the browser, know what it does not."""
    for name, wanted in writes.items():
        if tuple(st.query_params.get_all(name)) == wanted.values:
            continue
        if wanted.values:
            st.query_params[name] = wanted.values[0] if len(wanted.values) == 1 else [*wanted.values]
        else:
            st.query_params.pop(name, None)
