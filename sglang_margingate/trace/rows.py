"""Rows of a run's files, each once, whatever is merged beside the reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.trace.errors import BAD_FILE, TraceError
from sglang_margingate.trace.files import Listing, RowFile, list_files
from sglang_margingate.trace.frames import conform, filter_columns, read_table

_LOOKS = 4
"""Listings until a gap counts as one. A merge may hide rows from a listing that began before it; not from the next."""


def settled(path: Path, kind: str, start: int = 0) -> Listing:
    """List a run's files; where rows are missing look again, because a merge beside the listing can hide them."""
    for _ in range(_LOOKS):
        listing = list_files(path, kind, start)
        if not listing.gaps:
            break
    return listing


@dataclass
class Cursor:
    """How far the rows of one kind have been read."""

    next: int = 0
    """Number of the next row."""
    rows: int = 0
    """Rows read so far, or left to a filter."""
    seen: set[str] = field(default_factory=set)
    """Files of schema 1.x and notices that are done with."""

    def notice(self, text: str) -> list[str]:
        """Return a warning the first time that it is given."""
        if text in self.seen:
            return []
        self.seen.add(text)
        return [text]


def read_rows(
    path: Path, kind: str, schema: pa.Schema, columns: Sequence[str] | None, filters: Any, at: Cursor
) -> tuple[pa.Table, list[str]]:
    """Read the rows of one kind from the cursor on, with exactly the asked columns, and move it.

    Raises
    ------
    TraceError
        An unknown column was asked for.
    """
    names = list(schema.names if columns is None else columns)
    unknown = [n for n in names if n not in schema.names]
    if unknown:
        raise TraceError(f"unknown column {unknown[0]!r}; known: {', '.join(schema.names)}")
    read = pa.schema([schema.field(n) for n in dict.fromkeys([*names, *filter_columns(filters, schema)])])
    tables: list[pa.Table] = []
    warnings: list[str] = []
    while names:
        listing = settled(path, kind, at.next)
        for text in listing.odd:
            warnings += at.notice(text)
        if _read_listed(listing, kind, read, at, tables, warnings):
            break
    if filters is not None:
        keep = pq.filters_to_expression(filters) if isinstance(filters, list) else filters
        tables = [table.filter(keep) for table in tables]
    empty = pa.schema([schema.field(n) for n in names]).empty_table()
    return (pa.concat_tables([t.select(names) for t in tables]) if tables else empty), warnings


def _read_listed(
    listing: Listing, kind: str, read: pa.Schema, at: Cursor, tables: list[pa.Table], warnings: list[str]
) -> bool:
    """Read the files of a listing; return False where one was merged into another meanwhile: list again."""
    for file in listing.files:
        if file.first is None:
            if file.path.name in at.seen:
                continue
            at.seen.add(file.path.name)  # damaged under a final name it stays damaged: said once, never read again
        elif file.first > at.next:
            warnings.append(gap(kind, at.next, file.first - 1))
            at.next = file.first
        try:
            table = _checked(file, conform(read_table(file.path, read.names), read))
        except FileNotFoundError:
            if file.first is not None:
                return False
            continue
        except (*BAD_FILE, ValueError, TypeError, KeyError) as e:
            warnings.append(damaged(file.path, e))
        else:
            if file.first is not None:
                table = table.slice(at.next - file.first)
            at.rows += table.num_rows
            tables.append(table)
        if file.last is not None:
            at.next = file.last + 1
    return True


def _checked(file: RowFile, table: pa.Table) -> pa.Table:
    if file.rows is not None and len(table.column_names) and table.num_rows != file.rows:
        raise ValueError(f"it holds {table.num_rows:,} rows, its name says {file.rows:,}")
    return table


def gap(kind: str, first: int, last: int) -> str:
    """Say which rows are in no file."""
    what = "step" if kind == "steps" else "request"
    return f"{last - first + 1:,} {what} rows are missing: no file holds rows {first:,} to {last:,}"


def damaged(file: Path, e: Exception) -> str:
    """Say in one line what is wrong with a file."""
    first = (str(e).splitlines() or [type(e).__name__])[0]
    return f"{file.name}: not a whole Parquet file, skipped ({first[:120]})"
