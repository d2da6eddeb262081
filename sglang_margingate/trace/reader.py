"""The reader: whole runs, lists of runs, and runs that are still being written.

Reading never trusts the folder: what is whole is read, what is not becomes a warning.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.trace.errors import BAD_FILE, SchemaVersionError, TraceError
from sglang_margingate.trace.files import run_files
from sglang_margingate.trace.frames import conform, filter_columns, read_table, to_frame
from sglang_margingate.trace.manifest import check_version, is_live, parse_time, read_manifest
from sglang_margingate.trace.schema import (
    MANIFEST_NAME,
    REQUEST_SCHEMA,
    REQUESTS_GLOB,
    SCHEMA_VERSION,
    STEP_SCHEMA,
    STEPS_GLOB,
)
from sglang_margingate.trace.tables import VERSION_KEY

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Run:
    """One run in memory."""

    path: Path
    manifest: dict[str, Any]
    """Empty where the manifest is missing or garbled."""
    steps: pd.DataFrame
    """Step rows in the order written; dictionary columns are categoricals."""
    requests: pd.DataFrame
    """Request rows in the order they finished."""
    warnings: list[str] = field(default_factory=list)
    """What could not be read or is known to be missing, one line each."""


@dataclass(frozen=True)
class RunInfo:
    """What a list of runs shows: manifest and row counts, no rows."""

    path: Path
    name: str
    manifest: dict[str, Any]
    created: datetime | None
    step_rows: int
    request_rows: int
    is_live: bool
    warnings: tuple[str, ...] = ()


def read_run(
    path: str | os.PathLike[str],
    *,
    step_columns: Sequence[str] | None = None,
    request_columns: Sequence[str] | None = None,
    filters: Any = None,
) -> Run:
    """Read a run.

    Parameters
    ----------
    path
        The run's folder, ``traces/<run>``.
    step_columns, request_columns
        Columns to read, in this order; all by default. Others are not read from disk. An empty list skips that kind.
    filters
        Step rows to keep: pyarrow's list form, ``[("margin", "<", 0.5)]``, or a ``pyarrow.compute`` expression.

    Returns
    -------
    Run
        Integer and boolean columns that hold nulls come as pandas' nullable types, floats with NaN for null.

    Raises
    ------
    SchemaVersionError
        A newer, incompatible schema wrote the run.
    TraceError
        `path` is not a run, or an unknown column was asked for.
    """
    run_dir = Path(path)
    manifest, warnings = _open_run(run_dir)
    steps, w1 = _read_kind(run_files(run_dir, STEPS_GLOB), STEP_SCHEMA, step_columns, filters)
    requests, w2 = _read_kind(run_files(run_dir, REQUESTS_GLOB), REQUEST_SCHEMA, request_columns, None)
    return Run(run_dir, manifest, to_frame(steps), to_frame(requests), [*warnings, *w1, *w2])


def list_runs(trace_dir: str | os.PathLike[str]) -> list[RunInfo]:
    """List the runs below a folder, newest first; reads manifests and Parquet footers only.

    Never raises for what lies there: a damaged run is listed with warnings, a folder that is no run is left out,
    and a missing `trace_dir` is an empty list.
    """
    try:
        folders = [p for p in Path(trace_dir).iterdir() if p.is_dir()]
    except OSError:
        return []
    infos = [info for p in folders if (info := run_info(p)) is not None]
    return sorted(infos, key=lambda i: (i.created.timestamp() if i.created else 0.0, i.name), reverse=True)


def run_info(path: Path) -> RunInfo | None:
    """Return the summary of one run, or None where `path` is no run."""
    manifest: dict[str, Any] = {}
    warnings: list[str] = []
    try:
        manifest, warnings = _open_run(path)
    except SchemaVersionError as e:
        warnings = [str(e)]
    except (TraceError, OSError):
        return None
    counts = []
    for glob in (STEPS_GLOB, REQUESTS_GLOB):
        rows = 0
        for file in run_files(path, glob):
            try:
                stat = file.stat()
                rows += _footer_rows(str(file), stat.st_size, stat.st_mtime_ns)
            except BAD_FILE as e:
                warnings.append(_damaged(file, e))
        counts.append(rows)
    created = parse_time(manifest.get("created"))
    return RunInfo(path, path.name, manifest, created, counts[0], counts[1], is_live(manifest), tuple(warnings))


class RunFollower:
    """Follow a run that is still being written: each :meth:`poll` reads only files closed since the last one.

    Parameters
    ----------
    path, step_columns, request_columns
        As for :func:`read_run`. The folder may appear later.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step_columns: Sequence[str] | None = None,
        request_columns: Sequence[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = {}
        self._columns = {STEPS_GLOB: step_columns, REQUESTS_GLOB: request_columns}
        self._seen: set[str] = set()

    @property
    def is_live(self) -> bool:
        """Whether the writer was alive at the last poll."""
        return is_live(self.manifest)

    def poll(self) -> Run:
        """Return the rows of files closed since the last poll (possibly none), with the manifest as it is now.

        Raises
        ------
        SchemaVersionError
            A newer, incompatible schema writes the run.
        """
        warnings: list[str] = []
        try:
            self.manifest = read_manifest(self.path)
            check_version(self.manifest.get("schema_version"), str(self.path))
        except SchemaVersionError:
            raise
        except TraceError as e:
            warnings.append(str(e))
        tables = []
        # Requests are listed first: the writer closes steps before requests, so a request's steps are never missed.
        fresh = {
            glob: [f for f in run_files(self.path, glob) if f.name not in self._seen]
            for glob in (REQUESTS_GLOB, STEPS_GLOB)
        }
        for glob, schema in ((STEPS_GLOB, STEP_SCHEMA), (REQUESTS_GLOB, REQUEST_SCHEMA)):
            table, more = _read_kind(fresh[glob], schema, self._columns[glob], None)
            tables.append(table)
            warnings += more
            # A damaged file under a final name stays damaged: said once, never retried.
            self._seen.update(f.name for f in fresh[glob])
        return Run(self.path, self.manifest, to_frame(tables[0]), to_frame(tables[1]), warnings)


def _open_run(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return manifest and warnings of a folder; raise where it is no run or too new."""
    if not path.is_dir():
        raise TraceError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give one run, traces/<run>")
    warnings: list[str] = []
    manifest: dict[str, Any] = {}
    files = [*run_files(path, STEPS_GLOB), *run_files(path, REQUESTS_GLOB)]
    has_manifest = (path / MANIFEST_NAME).exists()
    if not has_manifest and not files:
        raise TraceError(f"{path}: not a run (no {MANIFEST_NAME}, no steps-*.parquet); give one run, traces/<run>")
    try:
        manifest = read_manifest(path)
        version: object = manifest.get("schema_version")
    except TraceError as e:
        warnings.append(str(e))
        version = _file_version(files)
    check_version(version, str(path))
    if has_manifest and manifest and version is None:
        warnings.append(f"{path / MANIFEST_NAME}: no schema_version; {SCHEMA_VERSION} is assumed")
    dropped = (manifest.get("totals") or {}).get("dropped_rows", 0)
    if dropped:
        warnings.append(f"{path}: the writer dropped {dropped:,} step rows (ring full or disk error)")
    if not manifest.get("closed_at") and not is_live(manifest):
        warnings.append(f"{path}: the writer stopped without closing the run; its last seconds may be missing")
    if not files:
        warnings.append(f"{path}: no rows have been written")
    return manifest, warnings


def _file_version(files: list[Path]) -> str | None:
    for file in files:
        try:
            found = (pq.read_schema(file).metadata or {}).get(VERSION_KEY)
        except BAD_FILE:
            continue
        if found:
            return str(found.decode(errors="replace"))
    return None


def _read_kind(
    files: list[Path], schema: pa.Schema, columns: Sequence[str] | None, filters: Any
) -> tuple[pa.Table, list[str]]:
    """Read files of one kind into one table with exactly the asked columns."""
    names = list(schema.names if columns is None else columns)
    unknown = [n for n in names if n not in schema.names]
    if unknown:
        raise TraceError(f"unknown column {unknown[0]!r}; known: {', '.join(schema.names)}")
    want = pa.schema([schema.field(n) for n in names])
    needed = filter_columns(filters, schema)
    read = pa.schema([schema.field(n) for n in dict.fromkeys([*names, *needed])])
    tables, warnings = [], []
    for file in files if names else ():
        try:
            table = conform(read_table(file, read.names), read)
        except (*BAD_FILE, ValueError, TypeError, KeyError) as e:
            warnings.append(_damaged(file, e))
            continue
        if filters is not None:
            table = table.filter(pq.filters_to_expression(filters) if isinstance(filters, list) else filters)
        tables.append(table.select(names))
    return (pa.concat_tables(tables) if tables else want.empty_table()), warnings


def _damaged(file: Path, e: Exception) -> str:
    first = (str(e).splitlines() or [type(e).__name__])[0]
    return f"{file.name}: not a whole Parquet file, skipped ({first[:120]})"


@lru_cache(maxsize=65_536)
def _footer_rows(file: str, size: int, mtime_ns: int) -> int:
    """Return a file's row count; size and time are in the key because a list of runs is asked for again and again."""
    del size, mtime_ns
    return int(pq.read_metadata(file).num_rows)
