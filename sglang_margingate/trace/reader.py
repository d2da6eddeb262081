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
from sglang_margingate.trace.files import KINDS, Listing, RowFile, list_files, parts
from sglang_margingate.trace.frames import to_frame
from sglang_margingate.trace.manifest import check_version, is_live, one_manifest, parse_time, read_manifest
from sglang_margingate.trace.rows import Cursor, damaged, gap, read_rows, settled
from sglang_margingate.trace.schema import MANIFEST_NAME, REQUEST_SCHEMA, SCHEMA_VERSION, STEP_SCHEMA
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
    broken: str = ""
    """Why its manifest cannot be used; the rows may be readable all the same."""

    @property
    def state(self) -> str:
        """One or a few words for a list."""
        if self.broken:
            return "broken"
        if self.is_live:
            return "live"
        if not self.manifest.get("closed_at"):
            return "ended without closing"
        return "incomplete" if self.warnings else "closed"


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
    tables, manifests, said = _tables(Path(path), step_columns, request_columns, filters)
    steps, requests = (pa.concat_tables(tables[kind]) for kind in KINDS)
    return Run(Path(path), one_manifest(manifests), to_frame(steps), to_frame(requests), said)


def request_table(path: str | os.PathLike[str], columns: Sequence[str]) -> pa.Table:
    """Return a run's request rows as Arrow has them: of many runs, one frame is made from all of their tables.

    Raises
    ------
    SchemaVersionError, TraceError
        As :func:`read_run`.
    """
    return pa.concat_tables(_tables(Path(path), [], columns, None)[0]["requests"])


def _tables(
    run_dir: Path, step_columns: Sequence[str] | None, request_columns: Sequence[str] | None, filters: Any
) -> tuple[dict[str, list[pa.Table]], list[dict[str, Any]], list[str]]:
    """Return the tables of a run's writers by kind, their manifests, and what could not be read."""
    tables: dict[str, list[pa.Table]] = {kind: [] for kind in KINDS}
    manifests, said = [], []
    for part in parts(run_dir):
        manifest, warnings = _open_run(part)
        at = {kind: Cursor() for kind in KINDS}
        # Requests first: the writer closes steps before requests, so that a request's steps are never missed.
        requests, w2 = read_rows(part, "requests", REQUEST_SCHEMA, request_columns, None, at["requests"])
        steps, w1 = read_rows(part, "steps", STEP_SCHEMA, step_columns, filters, at["steps"])
        read = {kind: at[kind].rows for kind, asked in zip(KINDS, (step_columns, request_columns)) if asked != []}
        tables["steps"].append(steps)
        tables["requests"].append(requests)
        said += [*warnings, *w1, *w2, *_missing(manifest, read)]
        manifests.append(manifest)
    return tables, manifests, said


def list_runs(trace_dir: str | os.PathLike[str]) -> list[RunInfo]:
    """List the runs below a folder, newest first; reads manifests and Parquet footers only.

    Never raises for what lies there: a damaged run is listed with warnings, a folder that is no run is left out,
    and a missing `trace_dir` is an empty list.
    """
    try:
        folders = [p for p in Path(trace_dir).iterdir() if p.is_dir()]
    except OSError:
        return []
    return newest_first([info for p in folders if (info := run_info(p)) is not None])


def is_run(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a run's manifest or rows."""
    folder = Path(path)
    return os.path.lexists(folder / MANIFEST_NAME) or any(list_files(folder, kind).files for kind in KINDS)


def newest_first(infos: list[RunInfo]) -> list[RunInfo]:
    """Return runs in the order in which lists show them."""
    return sorted(infos, key=lambda i: (i.created.timestamp() if i.created else 0.0, i.name), reverse=True)


def run_info(path: Path) -> RunInfo | None:
    """Return the summary of one run, or None where `path` is no run."""
    found = [info for part in parts(path) if (info := _part_info(part)) is not None]
    if not found or found[0].path != path:
        return None
    first = found[0]
    return RunInfo(
        path, path.name, one_manifest([info.manifest for info in found]), first.created,
        sum(info.step_rows for info in found), sum(info.request_rows for info in found), any(info.is_live for info in found),
        tuple(warning for info in found for warning in info.warnings), first.broken,
    )  # fmt: skip


def _part_info(path: Path) -> RunInfo | None:
    """Return the summary of what one writer wrote."""
    manifest: dict[str, Any] = {}
    warnings: list[str] = []
    broken = ""
    try:
        manifest, warnings = _open_run(path)
        if not manifest:
            broken = warnings[0]
    except SchemaVersionError as e:
        warnings, broken = [str(e)], str(e)
    except (TraceError, OSError):
        return None
    listings = {kind: settled(path, kind) for kind in KINDS}
    totals = manifest.get("totals") or {}
    # Schema 1.x left tens of thousands of files: where none is missing, their footers say nothing new.
    known = manifest.get("closed_at") and totals.get("files") == sum(len(found.files) for found in listings.values())
    counts = {kind: _count(kind, listings[kind], totals if known else {}, warnings) for kind in KINDS}
    warnings += _missing(manifest, counts)
    created = parse_time(manifest.get("created"))
    live = is_live(manifest)
    return RunInfo(
        path, path.name, manifest, created, counts["steps"], counts["requests"], live, tuple(warnings), broken
    )


def _count(kind: str, listing: Listing, totals: dict[str, int], warnings: list[str]) -> int:
    """Return a run's rows of one kind, by names, totals and footers; what is wrong with its files is a warning."""
    warnings += listing.odd
    warnings += [gap(kind, *span) for span in listing.gaps]
    promised = totals.get("step_rows" if kind == "steps" else "request_rows")
    rows: list[int] = []
    for file in listing.files:
        try:
            if promised is None and file.rows is None:
                rows.append(_footer_rows(str(file.path), file.size, file.mtime_ns))
            else:
                rows.append(_whole(file))
        except FileNotFoundError:
            rows.append(file.rows or 0)  # merged into another since
        except BAD_FILE as e:
            warnings.append(damaged(file.path, e))
    if promised is None or all(file.rows is not None for file in listing.files):
        return sum(rows)
    return promised if len(rows) == len(listing.files) else _count(kind, listing, {}, [])


def _whole(file: RowFile) -> int:
    """Return a file's rows by its name, where it begins and ends as a Parquet file does.

    Raises
    ------
    ValueError, OSError
        It does not.
    """
    with file.path.open("rb") as f:
        head = f.read(4)
        f.seek(-4, os.SEEK_END)
        if head != b"PAR1" or f.read(4) != b"PAR1":
            raise pa.ArrowInvalid("no Parquet magic bytes")
    return file.rows or 0


def _missing(manifest: dict[str, Any], rows: dict[str, int]) -> list[str]:
    """Say where the files hold fewer rows than the writer counted."""
    totals = manifest.get("totals") or {}
    promised = {"steps": totals.get("step_rows", 0), "requests": totals.get("request_rows", 0)}
    return [
        f"the writer counted {promised[kind]:,} rows of {kind}, the files hold {found:,}: "
        f"{promised[kind] - found:,} are missing (files deleted or damaged)"
        for kind, found in rows.items()
        if found < promised[kind]
    ]


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
        self._columns = {"steps": step_columns, "requests": request_columns}
        self._at: dict[tuple[Path, str], Cursor] = {}

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
        manifests = []
        tables: dict[str, list[pa.Table]] = {kind: [] for kind in KINDS}
        for part in parts(self.path):
            try:
                manifests.append(read_manifest(part))
                check_version(manifests[-1].get("schema_version"), str(part))
            except SchemaVersionError:
                raise
            except TraceError as e:
                warnings.append(str(e))
            # Requests first: the writer closes steps before requests, so that a request's steps are never missed.
            for kind, schema in (("requests", REQUEST_SCHEMA), ("steps", STEP_SCHEMA)):
                at = self._at.setdefault((part, kind), Cursor())
                table, more = read_rows(part, kind, schema, self._columns[kind], None, at)
                tables[kind].append(table)
                warnings += more
        if manifests:
            self.manifest = one_manifest(manifests)
        steps, requests = (to_frame(pa.concat_tables(tables[kind])) for kind in KINDS)
        return Run(self.path, self.manifest, steps, requests, warnings)


def _open_run(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return manifest and warnings of a folder; raise where it is no run or too new."""
    if not path.is_dir():
        raise TraceError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give one run, traces/<run>")
    warnings: list[str] = []
    manifest: dict[str, Any] = {}
    files = [file.path for kind in KINDS for file in list_files(path, kind).files]
    has_manifest = os.path.lexists(path / MANIFEST_NAME)
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


@lru_cache(maxsize=65_536)
def _footer_rows(file: str, size: int, mtime_ns: int) -> int:
    """Return a file's row count; size and time are in the key because a list of runs is asked for again and again."""
    del size, mtime_ns
    return int(pq.read_metadata(file).num_rows)
