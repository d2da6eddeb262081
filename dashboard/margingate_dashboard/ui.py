"""What every page shares: header, choice of run, cards, exports, and the rule that no page shows a traceback."""

from __future__ import annotations

import functools
import html
import inspect
import io
import logging
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from margingate_dashboard import address, choose, data, links
from margingate_dashboard.cards import Card, cards_html
from margingate_dashboard.choose import FOLLOW_SECONDS, markdown_safe
from margingate_dashboard.facts.filters import Filters
from margingate_dashboard.figures.common import merged, relaid, safe
from margingate_dashboard.theme import CSS, DARK_CSS, THRESHOLD_COLOUR
from sglang_margingate.trace import RunInfo, TraceError
from sglang_margingate.trace.errors import brief
from sglang_margingate.trace.export import harmless

PAGES = {
    "runs": "runs.py",
    "overview": "overview.py",
    "requests": "requests.py",
    "request": "request.py",
    "margins": "margins.py",
    "flips": "flips.py",
    "latency": "latency.py",
    "tuning": "tuning.py",
    "compare": "compare.py",
}
"""Page scripts by URL path, relative to pages/app.py."""

THRESHOLD_INKS = ("#9C3A72", "#E39BC2")
"""The threshold's colour as text, in the light and the dark theme."""

LOGITS = re.compile(r"margin|threshold|from the sample")
"""Columns in logits."""
SIX_DIGITS = st.column_config.NumberColumn(format="%.6g")
"""As everywhere else: 0.015625 is no 0.01563 in one place and 0.01562 in another."""
FOUR_PLACES = st.column_config.NumberColumn(format="%.4f%%")
"""Bounds in a table."""

T = TypeVar("T")
P = ParamSpec("P")
_log = logging.getLogger("margingate.dashboard")
# Alternative texts for charts came after the oldest Streamlit that we support.
_CHART_HAS_ALT = "alt" in inspect.signature(st.plotly_chart).parameters


@dataclass
class Exports:
    """Everything on a page that can be saved; made only when asked for."""

    prefix: str
    figures: dict[str, go.Figure] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def show(self, key: str) -> None:
        """Show a menu of download buttons: at the foot of every page, as parts of some run alone and make the last tables."""
        if not self.figures and not self.tables:
            return
        with st.container(horizontal_alignment="right").popover("Export", icon=":material/download:"):
            if self.tables:
                st.caption("Tables")
            for name, frame in self.tables.items():
                left, right = st.columns(2)
                stem = f"{self.prefix}-{name}"
                left.download_button(
                    f"{name}.csv", partial(_csv, frame), f"{stem}.csv", "text/csv",
                    key=f"{key}-{name}-csv", on_click="ignore", width="stretch",
                )  # fmt: skip
                right.download_button(
                    f"{name}.parquet", partial(_parquet, frame), f"{stem}.parquet", "application/octet-stream",
                    key=f"{key}-{name}-parquet", on_click="ignore", width="stretch",
                )  # fmt: skip
            if self.figures:
                st.caption("Figures as interactive HTML; for PNG use the camera in a figure's own toolbar")
            for name, figure in self.figures.items():
                st.download_button(
                    f"{name}.html", partial(_figure_html, figure),
                    f"{self.prefix}-{name}.html", "text/html", key=f"{key}-{name}-html", on_click="ignore",
                    width="stretch",
                )  # fmt: skip


def _csv(frame: pd.DataFrame) -> bytes:
    return harmless(frame).to_csv(index=False).encode(errors="replace")


def _figure_html(figure: go.Figure) -> bytes:
    """Return one file that opens from disk: plotly.js is inside."""
    return str(figure.to_html(include_plotlyjs=True)).encode()


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


@dataclass
class Page:
    """The chosen run and what a page needs to show it."""

    info: RunInfo
    data: data.RunData
    filters: Filters
    """What of the run is shown."""
    exports: Exports

    @property
    def run(self) -> str:
        """The run's name."""
        return self.info.name

    def memo(self, name: str, make: Callable[[], T], *more: Hashable) -> T:
        """Return ``make()``, kept for this run, these filters and ``more`` (see :meth:`RunData.memo`)."""
        return self.data.memo((name, self.filters.key, *more), make)

    def steps(self, *names: str) -> pd.DataFrame:
        """Return the step rows that are shown, with these columns (see :meth:`RunData.steps`)."""
        return self._kept(self.data.steps, names)

    def requests(self, *names: str) -> pd.DataFrame:
        """Return the request rows that are shown, with these columns (see :meth:`RunData.requests`)."""
        return self._kept(self.data.requests, names)

    def _kept(self, load: Callable[..., pd.DataFrame], names: tuple[str, ...]) -> pd.DataFrame:
        wanted = self.filters.columns
        if not wanted:
            return load(*names)
        rows = load(*dict.fromkeys([*names, *wanted]))
        return rows.loc[self.filters.keep(rows), list(names)].reset_index(drop=True)

    @property
    def subtitle(self) -> str:
        """What figures say below their title: run, model, and the filter in force."""
        parts = [self.run, str(self.info.manifest.get("model") or "")]
        parts += self.filters.words()
        return safe(" · ".join(p for p in parts if p))


def guarded(render: Callable[[], None]) -> None:
    """Run a page; what cannot be read is said in one line, and nothing ever shows as a traceback."""
    try:
        render()
    except TraceError as error:
        st.error(markdown_safe(error), icon=":material/error:")
    except Exception as error:  # the last line of defence: the log has the traceback, the reader a sentence
        _log.exception("page failed")
        st.error(
            f"This page could not be shown ({type(error).__name__}: {markdown_safe(str(error)[:200])}). "
            "The dashboard's terminal has the details.",
            icon=":material/error:",
        )


def fragment(render: Callable[P, None], run_every: float | None = None) -> Callable[P, None]:
    """Return a part of a page that reruns alone, guarded: Streamlit shows a fragment's errors before its page can."""

    @functools.wraps(render)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> None:
        with address.kept():
            guarded(lambda: render(*args, **kwargs))

    return st.fragment(quiet, run_every=run_every)


def styles() -> None:
    """Put the style sheet on the page."""
    st.html(CSS + (DARK_CSS if st.context.theme.type == "dark" else ""))


def header(title: str, lead: str, chips: Iterable[tuple[str, str]] = ()) -> None:
    """Show a page's title line.

    Parameters
    ----------
    title, lead
        Name of the page, and one sentence that says what it answers.
    chips
        (text, CSS class) pairs; texts are escaped here.
    """
    spans = "".join(f'<span class="mg-chip {css}">{html.escape(text)}</span>' for text, css in chips)
    st.html(
        f'<div class="mg-head"><h1>{html.escape(title)}</h1>{spans}</div><p class="mg-lead">{html.escape(lead)}</p>'
    )


def run_chips(info: RunInfo) -> list[tuple[str, str]]:
    """Return the chips that name a run, its model, policy and device."""
    manifest = info.manifest
    chips = [(info.name, "")]
    if info.is_live:
        chips.append(("● live", "live"))
    chips += [(str(manifest[k]), "") for k in ("model", "policy", "device") if manifest.get(k)]
    if manifest.get("synthetic"):
        chips.append(("made-up data", "warn"))
    return chips


def cards(items: Iterable[Card]) -> None:
    """Show headline numbers."""
    st.html(cards_html(items))


def empty_state(title: str, body_html: str) -> None:
    """Show why there is nothing to see and what to do about it (``body_html`` must be our own, escaped text)."""
    st.html(f'<div class="mg-empty"><h3>{html.escape(title)}</h3>{body_html}</div>')


def no_runs() -> None:
    """Say how to make a run."""
    folder = html.escape(str(links.trace_dir()))
    empty_state(
        "No runs here yet",
        f"<p>This dashboard shows runs from <code>{folder}</code>, and that folder has none. A server writes one while "
        "it "
        "serves:</p><pre>python -m sglang_margingate.launch_server --model-path MODEL --margingate-policy gate \\\n"
        f"    --margingate-trace-dir {folder}</pre>"
        "<p>or look at the sample run of the repository:</p>"
        "<pre>python -m sglang_margingate.dashboard --trace-dir traces"
        "</pre><p>This page follows along: a new run appears within seconds.</p>",
    )


def open_page(title: str, lead: str, *, filtered: bool = True, link: bool = True) -> Page | None:
    """Show a page's header for the chosen run; None (and a reason on the page) where there is nothing to show.

    Parameters
    ----------
    title, lead
        As for :func:`header`.
    filtered
        Whether the sidebar's filters are offered.
    link
        Whether the view's address is offered; a page that chooses more than the run offers it itself.
    """
    styles()
    infos = data.runs(links.trace_dir())
    if not infos:
        header(title, lead)
        no_runs()
        choose.await_first_run()
        return None
    info = choose.choose_run(infos)
    if info is None:
        header(title, lead)
        choose.missing(address.get("run"), infos)
        return None
    st.set_page_config(page_title=f"{title} · {info.name} · MarginGate")
    header(title, lead, run_chips(info))
    run = data.run_data(info.path)
    filters = choose.choose_filters(run) if filtered else Filters()
    if info.is_live:
        choose.follow(info)
    if link:
        choose.copy_link(run=info.name)
    for warning in dict.fromkeys([*info.warnings, *run.warnings]):
        st.caption(f":material/warning: {markdown_safe(brief(warning, info.path))}")
    exports = Exports(f"{info.name}-{title.lower()}")
    return Page(info, run, filters, exports)


def chart(fig: go.Figure, name: str, exports: Exports, *, key: str | None = None, **more: Any) -> Any:
    """Show a figure and put it into the page's export menu."""
    # A copy, in this reader's theme: figures are kept, and shared between readers.
    fig = exports.figures[name] = inked(fig, st.context.theme.type == "dark")
    if _CHART_HAS_ALT:
        more["alt"] = (fig.layout.meta or {}).get("title", name)
    config = {
        "displaylogo": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
        "toImageButtonOptions": {"format": "png", "filename": f"{exports.prefix}-{name}", "scale": 2},
    }
    return st.plotly_chart(fig, key=key or f"chart-{name}", config=config, **more)


def inked(fig: go.Figure, dark: bool) -> go.Figure:
    """Return the figure with texts that can be read in the light or the dark theme.

    Streamlit's own grey of axis texts is 3.7:1 on white, and the threshold's colour, which is for lines, is 3:1.
    """
    ink = "#A9AFBA" if dark else "#555B66"
    layout = fig.layout.to_plotly_json()
    axes = [n for n in layout if n.startswith(("xaxis", "yaxis"))]
    notes = [
        merged(note, {"font": {"color": THRESHOLD_INKS[dark]}})
        if (note.get("font") or {}).get("color") == THRESHOLD_COLOUR
        else note
        for note in layout.get("annotations") or ()
    ]
    texts = {n: {"tickfont": {"color": ink}, "title": {"font": {"color": ink}}} for n in axes}
    return relaid(fig, texts, {"font": {"color": ink}, "annotations": notes})


def pairs(figures: dict[str, go.Figure], exports: Exports) -> None:
    """Show figures two by two, each pair beginning at one height."""
    names = list(figures)
    for start in range(0, len(names), 2):
        for place, name in zip(st.columns(2), names[start : start + 2]):
            with place:
                chart(figures[name], name, exports)


__all__ = [
    "FOLLOW_SECONDS", "PAGES", "Exports", "Page", "brief", "cards", "chart", "chosen_cell", "chosen_rows", "empty_state",
    "fragment", "guarded", "header", "inked", "markdown_safe", "no_runs", "open_page", "pairs", "run_chips", "safe", "styles", "table",
]  # fmt: skip


def table(frame: pd.DataFrame, name: str, exports: Exports, *, key: str | None = None, **more: Any) -> Any:
    """Show a table and put it into the page's export menu."""
    exports.tables[name] = frame
    config = {n: SIX_DIGITS for n in frame.columns if LOGITS.search(str(n)) and frame[n].dtype.kind == "f"}
    # The browser rounds to the nearest, and a bound that is rounded down is none; what is saved is exact.
    bounds = [n for n in frame.columns if "at most" in str(n) and frame[n].dtype.kind == "f"]
    shown = frame.assign(**{n: np.ceil(1e4 * frame[n] - 1e-6) / 1e4 for n in bounds}) if bounds else frame
    config |= {n: FOUR_PLACES for n in bounds}
    config |= more.pop("column_config", {})
    return st.dataframe(
        shown, key=key or f"table-{name}", hide_index=True, placeholder="–", column_config=config, **more
    )


def _select(key: str, kind: str, wanted: list[Any]) -> None:
    """Let a table show as selected what the address says: after Back as well."""
    state = st.session_state.get(key)
    if [*(state["selection"][kind] if state else ())] != wanted:
        st.session_state[key] = {"selection": {kind: wanted}}


def chosen_rows(
    frame: pd.DataFrame,
    name: str,
    exports: Exports,
    param: str,
    ids: Sequence[str],
    *,
    key: str,
    start: Sequence[int] = (),
    many: bool = False,
    **more: Any,
) -> list[int]:
    """Show a table whose selected rows stand in the address, and return their places.

    Parameters
    ----------
    frame, name, exports, key
        As for :func:`table`.
    param
        The query parameter.
    ids
        What names each row there.
    start
        Rows that are selected where the address names none.
    many
        Whether several rows can be selected.
    """
    places = {row: at for at, row in enumerate(ids)}
    asked = [places[row] for row in address.get_all(param) if row in places]
    rows = (asked if many else asked[:1]) or [at for at in start if at < len(ids)]
    _select(key, "rows", rows)

    def remember() -> None:
        picked = [ids[at] for at in st.session_state[key]["selection"]["rows"] if at < len(ids)]
        address.write(**{param: picked})

    mode = "multi-row" if many else "single-row"
    table(frame, name, exports, key=key, on_select=remember, selection_mode=mode, **more)
    return rows


def chosen_cell(
    frame: pd.DataFrame, name: str, exports: Exports, param: str, *, key: str, **more: Any
) -> tuple[int, str] | None:
    """Show a table of which one cell can be selected, which stands in the address, and return its row and column."""
    row, _, column = (address.get(param) or "").partition(":")
    at = links.parse_step(row)
    cell = (at, column) if at is not None and at < len(frame) and column in frame.columns else None
    _select(key, "cells", [cell] if cell else [])

    def remember() -> None:
        cells = st.session_state[key]["selection"]["cells"]
        address.write(**{param: f"{cells[0][0]}:{cells[0][1]}" if cells else None})

    table(frame, name, exports, key=key, on_select=remember, selection_mode="single-cell", **more)
    return cell
