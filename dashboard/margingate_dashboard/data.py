"""Cached loading: each page names the columns that it needs, and only those are ever read.

A run's columns are kept once per server process and shared by all pages and browser tabs. Filters work on what is
returned, outside the cache. A live run grows: only files closed since the last look are read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import streamlit as st
from pandas.api.types import union_categoricals

from margingate_dashboard import states, tokens
from margingate_dashboard.facts import policies, runlist
from sglang_margingate.trace import RunFollower, RunInfo, TraceError, read_run
from sglang_margingate.trace.files import KINDS
from sglang_margingate.trace.frames import conform, read_table, to_frame
from sglang_margingate.trace.manifest import is_live, read_manifest
from sglang_margingate.trace.reader import newest_first, request_table, run_info
from sglang_margingate.trace.rows import settled
from sglang_margingate.trace.schema import REQUEST_SCHEMA, STEP_SCHEMA

KEPT_RUNS = 4
"""Runs whose columns stay in memory at once; the least recently opened goes first."""

KEPT_RESULTS = 64
"""Results per run that :meth:`RunData.memo` keeps."""

T = TypeVar("T")
Signature = tuple[tuple[str, int, int], ...]


@st.cache_resource(show_spinner=False)
def _infos() -> runlist.Kept[RunInfo]:
    return runlist.Kept()


@st.cache_resource(show_spinner=False)
def _counts() -> runlist.Kept[dict[str, object]]:
    return runlist.Kept()


def runs(trace_dir: Path) -> list[RunInfo]:
    """List the runs in the trace folder, newest first; a run whose folder has not changed is not read again.

    A folder that a symbolic link puts there from elsewhere is left out: nothing outside the trace folder is read.
    """
    kept, found = _infos(), []
    stamped = runlist.stamps(trace_dir)
    for name, stamp in stamped.items():
        path = trace_dir / name
        info = kept.get(path, stamp)
        if info is None or info.is_live:
            info = run_info(path)
            if info is None:
                continue
            kept.put(path, stamp, info)
        found.append(info)
    kept.only(trace_dir / name for name in stamped)
    return newest_first(found)


def counted(infos: list[RunInfo], seconds: float) -> dict[Path, dict[str, object] | str]:
    """Return the counts of runs: those known, and as many others as can be read in that time.

    A run that cannot be read has the reason in their place; one that was not read yet is absent.
    """
    kept, found, unread = _counts(), dict[Path, dict[str, object] | str](), []
    stamped = {info.path: runlist.stamp(info.path) for info in infos}
    for info in infos:
        known = kept.get(info.path, stamped[info.path])
        if known is None:
            unread.append(info.path)
        else:
            found[info.path] = known

    def read(paths: Sequence[Path]) -> dict[Path, dict[str, object] | str]:
        tables, whole = dict[Path, pa.Table](), dict[Path, dict[str, object] | str]()
        for path in paths:
            try:
                tables[path] = request_table(path, runlist.COLUMNS)
            except TraceError as error:
                whole[path] = str(error).split(": ", 1)[-1][:90]
        return {**whole, **runlist.count_together(tables)}

    for path, counts in runlist.within(seconds, unread, read).items():
        found[path] = counts
        if isinstance(counts, dict):
            kept.put(path, stamped[path], counts)
    kept.only(stamped)
    return found


def still_live(path: Path) -> bool:
    """Tell whether a run's writer lives, by its manifest as it is now."""
    try:
        return is_live(read_manifest(path))
    except TraceError:
        return False


def signature(path: Path) -> Signature:
    """Return what a run holds: equal while nothing was closed since, and whatever is merged meanwhile.

    One entry a kind with the number of its next row and of its rows; in a run of schema 1.x one a file, with size and time.
    """
    found: list[tuple[str, int, int]] = []
    for kind in KINDS:
        listing = settled(path, kind)
        found += [(f.path.name, f.size, f.mtime_ns) for f in listing.files if f.first is None]
        if listing.end:
            found.append((kind, listing.end, sum(f.rows or 0 for f in listing.files)))
    return tuple(found)


def _grown(seen: Signature, now: Signature) -> bool:
    """Tell whether all that was seen is still there, be it in other files."""
    rows = {name: (end, count) for name, end, count in now if name in KINDS}
    whole = set(now)
    return all(
        (rows.get(entry[0], (0, 0))[0] >= entry[1] and rows.get(entry[0], (0, 0))[1] >= entry[2])
        if entry[0] in KINDS
        else entry in whole
        for entry in seen
    )


@dataclass
class _Group:
    """Columns that were first asked for together, and so are read together."""

    follower: RunFollower
    frame: pd.DataFrame


@dataclass
class _Columns:
    """The loaded columns of one kind of row (steps or requests) of one run."""

    path: Path
    kind: str
    groups: list[_Group] = field(default_factory=list)
    seen: Signature = ()
    warnings: list[str] = field(default_factory=list)

    def frame(self, names: Sequence[str], now: Signature) -> pd.DataFrame:
        if not _grown(self.seen, now):
            self.groups.clear()  # a file was replaced or removed: another run under the same name
            self.warnings.clear()
        if now != self.seen:
            for group in self.groups:
                self._poll(group)
            self.seen = now
        have = {name for group in self.groups for name in group.frame.columns}
        missing = [name for name in names if name not in have]
        if missing:
            self._open(missing)
        if len({len(group.frame) for group in self.groups}) > 1:
            # A file closed between two reads, or one of its columns is damaged: read all in one go, so that rows match.
            every = [name for group in self.groups for name in group.frame.columns]
            self.groups.clear()
            self._open(every)
        by_name = {name: group.frame[name] for group in self.groups for name in group.frame.columns}
        return pd.DataFrame({name: by_name[name] for name in names}, copy=False)

    def _open(self, names: Sequence[str]) -> None:
        if self.kind == "steps":
            follower = RunFollower(self.path, step_columns=names, request_columns=[])
        else:
            follower = RunFollower(self.path, step_columns=[], request_columns=names)
        group = _Group(follower, pd.DataFrame())
        self._poll(group)
        self.groups.append(group)

    def _poll(self, group: _Group) -> None:
        fresh = group.follower.poll()
        rows = fresh.steps if self.kind == "steps" else fresh.requests
        for warning in fresh.warnings:
            if warning not in self.warnings:
                self.warnings.append(warning)
        group.frame = rows if group.frame.empty else (_append(group.frame, rows) if len(rows) else group.frame)


def _append(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Stack two frames; categories are merged, because pandas would turn differing ones into objects."""
    columns: dict[str, object] = {}
    for name in old.columns:
        a, b = old[name], new[name]
        if isinstance(a.dtype, pd.CategoricalDtype) and isinstance(b.dtype, pd.CategoricalDtype):
            columns[name] = union_categoricals([a, b])
        else:
            columns[name] = pd.concat([a, b], ignore_index=True)
    return pd.DataFrame(columns, copy=False)


_DERIVED: dict[str, tuple[Callable[[pd.DataFrame], np.ndarray], tuple[str, ...]]] = {
    "state": (states.classify, states.STATE_COLUMNS),
    "triggered": (states.triggered, ("triggered",)),
    "verified": (states.verified, ("reason",)),
    "examined": (states.examined, ("reason", "triggered")),
    "above": (states.above, ("reason", "triggered", "flipped")),
}
"""Columns made here from columns on disk, or freed of nulls: how, and from which."""

OF_REQUEST = ("policy", "guarantee")
"""Columns of a step that its request's row holds."""


class RunData:
    """The rows of one run, loaded column by column.

    Parameters
    ----------
    path
        The run's folder.

    Notes
    -----
    Shared between sessions: treat returned frames as read-only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps = _Columns(path, "steps")
        self._requests = _Columns(path, "requests")
        self._derived: dict[str, tuple[Signature, np.ndarray | pd.Categorical]] = {}
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._kept_of: Signature = ()
        self._lock = threading.RLock()

    def steps(self, *names: str) -> pd.DataFrame:
        """Return step rows with these columns; ``state`` (code) and ``verified`` count as columns, and ``triggered`` has no nulls.

        Raises
        ------
        TraceError
            The run cannot be read (:class:`~sglang_margingate.trace.SchemaVersionError` for a newer schema).
        """
        with self._lock:
            now = signature(self.path)
            real = [n for n in names if n not in _DERIVED and n not in OF_REQUEST]
            wanted = [n for n in names if n not in real]
            stale = [n for n in wanted if self._derived.get(n, (None,))[0] != now]
            needs = [c for n in stale for c in (_DERIVED[n][1] if n in _DERIVED else ("request",))]
            frame = self._steps.frame(list(dict.fromkeys([*real, *needs])) or ["step"], now)
            for name in stale:
                made = _DERIVED[name][0](frame) if name in _DERIVED else self._of_request(name, frame["request"])
                self._derived[name] = (now, made)
            for name in wanted:
                frame[name] = self._derived[name][1]
            return frame[list(names)]

    def requests(self, *names: str) -> pd.DataFrame:
        """Return request rows with these columns (all except the prompt text by default).

        ``policy`` is the policy as shown (:func:`margingate_dashboard.facts.policies.shown_policy`).
        """
        with self._lock:
            wanted = names or tuple(n for n in REQUEST_SCHEMA.names if n != "prompt_text")
            needs = [*wanted, *(policies.COLUMNS if "policy" in wanted else ())]
            frame = self._requests.frame(list(dict.fromkeys(needs)), signature(self.path))
            if "policy" in wanted:
                frame = policies.with_policy(frame)
            return frame[list(wanted)]

    def _of_request(self, name: str, numbers: pd.Series) -> pd.Categorical:
        return policies.of_request(numbers, self.requests("request", name), name)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, kept until the run grows: counts of a million steps are made once, not at every click.

        Shared between sessions like the rows, so what is returned must not be changed.
        """
        with self._lock:
            now = signature(self.path)
            if now != self._kept_of:
                self._kept.clear()
                self._kept_of = now
            if key not in self._kept:
                self._kept[key] = make()
                if len(self._kept) > KEPT_RESULTS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return cast(T, self._kept[key])

    @property
    def version(self) -> Signature:
        """What is loaded: changes when a live run has grown."""
        return self._steps.seen

    @property
    def warnings(self) -> list[str]:
        """What could not be read so far, one line each."""
        return list(dict.fromkeys([*self._steps.warnings, *self._requests.warnings]))


@st.cache_resource(max_entries=KEPT_RUNS, show_spinner=False)
def _run_data(path: str) -> RunData:
    return RunData(Path(path))


def run_data(path: Path) -> RunData:
    """Return the shared data of one run."""
    return _run_data(str(path))


def request_steps(path: Path, request: int) -> pd.DataFrame:
    """Return every column of one request's steps, in order; a step written twice (retraction) counts once."""
    return run_data(path).memo(("request", request), lambda: _request_steps(run_data(path), request))


def vocabulary(run: RunData) -> dict[int, str]:
    """Return the text of every token id that the run committed."""

    def make() -> dict[int, str]:
        steps = run.steps("token", "token_text")
        return tokens.vocabulary(steps["token"], steps["token_text"])

    return run.memo("vocabulary", make)


def _request_steps(run: RunData, request: int) -> pd.DataFrame:
    numbers = run.steps("request")["request"].to_numpy(dtype=np.int64, na_value=-1)
    found = _from_files(run.path, request, np.flatnonzero(numbers == request))
    if found is None:
        found = read_run(run.path, request_columns=[], filters=[("request", "==", request)]).steps
    steps = found.sort_values("step", kind="stable").drop_duplicates("step", keep="last")
    return steps.reset_index(drop=True)


def _from_files(path: Path, request: int, rows: np.ndarray) -> pd.DataFrame | None:
    """Read the rows of one request from those files alone that hold them; None where that cannot be told for sure.

    A request's steps lie close together, so this reads one or two row groups of a long run instead of all.
    """
    tables, offset = [], 0
    listing = settled(path, "steps")
    try:
        for file in listing.files:
            with pq.ParquetFile(file.path) as parquet:
                counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            for group, count in enumerate(counts):
                mine = rows[(rows >= offset) & (rows < offset + count)] - offset
                if mine.size:
                    table = read_table(file.path, STEP_SCHEMA.names, groups=[group])
                    tables.append(conform(table, STEP_SCHEMA).take(pa.array(mine)))
                offset += count
    except (OSError, pa.ArrowException, EOFError):
        return None  # a damaged file shifts the rows of all after it
    if not tables:
        return None
    found = to_frame(pa.concat_tables(tables))
    whole = len(found) == rows.size and bool((found["request"] == request).all())
    return found if whole else None


__all__ = ["RunData", "RunInfo", "TraceError", "request_steps", "run_data", "runs", "signature", "vocabulary"]
