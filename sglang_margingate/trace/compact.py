"""Few and large files: a run's small ones are merged while it is written, and once more when it is closed.

A merge writes the whole file under a temporary name, gives it its final name in one step, and only then removes its
parts. Whatever interrupts it, each row can be read, and readers count it once (:mod:`sglang_margingate.trace.files`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.trace.errors import TraceError
from sglang_margingate.trace.files import KINDS, list_files, name_of, parts
from sglang_margingate.trace.tables import compression, create_private, text_columns

log = logging.getLogger(__name__)

Span = tuple[int, int]
"""First and last row of a file."""

FAN = 12
"""Files of one size that are merged into one."""

TIERS = (2_000, 50_000, 1_000_000)
"""Sizes of files, in rows: below each, at most :data:`FAN` wait to be merged. A row is rewritten some eight times."""

GROUP_ROWS = 65_536
"""Rows of a merged file's row group: what is in memory at once."""


def due(rows: Sequence[int]) -> slice | None:
    """Return which of a run's files are to be merged now, given the rows of each."""
    low = 0
    for tier in TIERS:
        begin = len(rows) - _tail(rows, tier)
        # Those of this size alone: a large file is not rewritten for the sake of a few small ones.
        mine = [i for i in range(begin, len(rows)) if rows[i] >= low]
        if len(mine) >= FAN:
            return slice(begin, mine[-1] + 1)
        low = tier
    return None


def small_tail(rows: Sequence[int], enough: int) -> slice | None:
    """Return a run's last files with fewer rows than `enough`; None where that is not more than one."""
    count = _tail(rows, enough)
    return slice(len(rows) - count, len(rows)) if count > 1 else None


def _tail(rows: Sequence[int], enough: int) -> int:
    """Return how many files at the end have fewer rows than `enough`."""
    return next((i for i, n in enumerate(reversed(rows)) if n >= enough), len(rows))


def merge(folder: Path, kind: str, spans: Sequence[Span]) -> Iterator[None]:
    """Merge adjacent files, a row group at each step: the writer's thread has other things to do between.

    Raises
    ------
    OSError, pyarrow.ArrowException
        A part cannot be read or the file cannot be written; the parts stay.
    """
    first, last = spans[0][0], spans[-1][1]
    parts = [folder / name_of(kind, *span) for span in spans]
    target = folder / name_of(kind, first, last)
    tmp = target.with_name(f".{target.name}.tmp")
    done = 0
    try:
        create_private(tmp)
        schema = pq.read_schema(parts[0])
        with pq.ParquetWriter(tmp, schema, compression=compression(), use_dictionary=text_columns(schema)) as out:
            for table in _groups(parts, schema):
                out.write_table(table, row_group_size=GROUP_ROWS)
                done += table.num_rows
                yield
        if done != last - first + 1:
            raise pa.ArrowInvalid(f"{folder.name}: files {parts[0].name} to {parts[-1].name} hold {done} rows")
        os.replace(tmp, target)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise
    _remove(parts)


def _groups(parts: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    rows = 0
    for part in parts:
        with pq.ParquetFile(part) as file:
            for batch in file.iter_batches(GROUP_ROWS, use_threads=False):
                waiting.append(pa.Table.from_batches([batch]).cast(schema))
                rows += batch.num_rows
                if rows >= GROUP_ROWS:
                    yield _one(waiting)
                    waiting, rows = [], 0
    if waiting:
        yield _one(waiting)


def _one(tables: list[pa.Table]) -> pa.Table:
    """Return one table; each part has dictionaries of its own."""
    return pa.concat_tables(tables).unify_dictionaries().combine_chunks()


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):  # readers pass over a part that stays
            file.unlink(missing_ok=True)


class ClosedFiles:
    """The files that a writer has closed, and their merging, a little at a time."""

    def __init__(self) -> None:
        self._spans: dict[str, list[Span]] = {kind: [] for kind in KINDS}
        self._from = dict.fromkeys(KINDS, 0)  # files from which on a merge is tried: raised where one failed
        self._job: tuple[str, list[Span], Iterator[None]] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._spans.values()))

    @property
    def merging(self) -> bool:
        """Whether a merge has begun and not ended."""
        return self._job is not None

    def add(self, kind: str, span: Span) -> None:
        """Note a file that was just closed."""
        self._spans[kind].append(span)

    def clear(self) -> None:
        """The folder was removed."""
        self._spans = {kind: [] for kind in KINDS}

    def merge_some(self, folder: Path) -> None:
        """Go on with a merge by one row group, or begin one where it is due."""
        if self._job is not None:
            self._step(folder)
            return
        for kind, spans in self._spans.items():
            chosen = due(_rows(spans)) if len(spans) >= self._from[kind] else None
            if chosen is not None:
                self._job = (kind, spans[chosen], merge(folder, kind, spans[chosen]))
                return

    def merge_small(self, folder: Path, enough: int) -> bool:
        """Merge the last files with fewer rows than `enough`, all at once; return whether there were any."""
        before = len(self)
        self._job = None  # the temporary file goes with it
        for kind, spans in self._spans.items():
            chosen = small_tail(_rows(spans), enough)
            if chosen is not None:
                self._job = (kind, spans[chosen], merge(folder, kind, spans[chosen]))
            while self._job is not None:
                self._step(folder)
        return len(self) < before

    def _step(self, folder: Path) -> None:
        assert self._job is not None
        kind, parts, steps = self._job
        spans = self._spans[kind]
        try:
            next(steps)
            return
        except StopIteration:
            if parts[0] in spans:  # else the folder was removed meanwhile, and begun anew
                at = spans.index(parts[0])
                spans[at : at + len(parts)] = [(parts[0][0], parts[-1][1])]
        except (OSError, ValueError, pa.ArrowException) as e:
            self._from[kind] = len(spans) + FAN
            log.warning("margingate trace: %s: small files stay apart: %s", folder, getattr(e, "strerror", None) or e)
        self._job = None


def _rows(spans: Sequence[Span]) -> list[int]:
    return [last - first + 1 for first, last in spans]


def compact(folder: Path, enough: int = TIERS[1]) -> tuple[int, int]:
    """Merge the small files of a run that nobody writes any more.

    Returns
    -------
    before, after
        Files of rows.

    Raises
    ------
    TraceError
        A file cannot be read or written, or the run is of schema 1.x.
    """
    before = after = 0
    for part, kind in itertools.product(parts(folder), KINDS):
        listing = list_files(part, kind)
        before += len(listing.files) + len(listing.replaced)
        if any(f.first is None for f in listing.files):
            raise TraceError(f"{folder}: a run of schema 1.x keeps its files as they are")
        _remove([f.path for f in listing.replaced])
        group: list[Span] = []
        for file in [*listing.files, None]:
            span = None if file is None else (file.first or 0, file.last or 0)
            joins = span is not None and span[1] - span[0] + 1 < enough and (not group or group[-1][1] + 1 == span[0])
            if joins and span is not None:
                group.append(span)
                continue
            if len(group) > 1:
                try:
                    for _ in merge(part, kind, group):
                        pass
                except (OSError, pa.ArrowException) as e:
                    first = (str(e).splitlines() or [type(e).__name__])[0]
                    raise TraceError(
                        f"{folder}: cannot merge its files ({first[:160]}); they stay as they are"
                    ) from None
            small = span is not None and span[1] - span[0] + 1 < enough
            group = [span] if small and span is not None else []
        after += len(list_files(part, kind).files)
    return before, after
