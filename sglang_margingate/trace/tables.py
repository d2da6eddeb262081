"""Python rows to Arrow tables, and tables to whole Parquet files."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.columns import LateColumns, Shared
from sglang_margingate.trace.schema import SCHEMA_VERSION, STEP_SCHEMA

VERSION_KEY = b"margingate_schema"
"""Schema metadata key: each file names its schema version, so that it can be judged without its manifest."""

StepChunk = LateColumns | Sequence[tuple[Any, ...]] | Mapping[str, Sequence[Any]]
"""Step rows: tuples in ``STEP_COLUMNS`` order, or equally long columns by name (absent ones are null), made or to be made."""


def chunk_len(chunk: StepChunk) -> int:
    """Return the number of rows of a chunk."""
    if isinstance(chunk, Mapping):
        return len(next(iter(chunk.values()))) if chunk else 0
    return len(chunk)


def chunk_tail(chunk: StepChunk, skip: int) -> StepChunk:
    """Return the chunk without its first `skip` rows, leaving the caller's object alone."""
    if isinstance(chunk, Mapping):
        return {name: values[skip:] for name, values in chunk.items()}
    return chunk[skip:]


_FIELDS = tuple((field.name, field.type) for field in STEP_SCHEMA)
_CODES = {pa.int32(): "i", pa.float32(): "f"}
"""How the standard library's arrays call a column's numbers; they refuse what does not fit, and take half of Arrow's time."""


def to_array(values: Sequence[Any], dtype: pa.DataType) -> pa.Array:
    """Convert one column; timestamps come as float seconds since the epoch (UTC), None is null, NaN stays NaN."""
    if isinstance(values, Shared):
        return _shared_array(values, dtype)
    plain = _plain(values, dtype)
    if plain is not None:
        return _of_plain(plain, dtype)
    if pa.types.is_timestamp(dtype):
        values = [None if seconds is None else round(seconds * 1e6) for seconds in values]
    return pa.array(values, dtype)


def _shared_array(column: Shared, dtype: pa.DataType) -> pa.Array:
    """Convert each value once. NumPy spreads them over the rows: Arrow takes three times as long for so few."""
    plain = _plain(column.values, dtype)
    if plain is not None:
        return _of_plain(plain.take(column.at), dtype)
    if pa.types.is_boolean(dtype) and all(type(value) is bool for value in column.values):
        return pa.array(np.array(column.values).take(column.at), dtype)
    return to_array(column.values, dtype).take(_of_plain(np.asarray(column.at), pa.int32()))


def _plain(values: Sequence[Any], dtype: pa.DataType) -> np.ndarray | None:
    """Return a column's numbers as they lie in memory; None where there is a null among them, or it has no numbers."""
    try:
        return np.asarray(array(_CODES[dtype], values))
    except (KeyError, TypeError):
        return None


def _of_plain(numbers: np.ndarray, dtype: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(dtype, len(numbers), [None, pa.py_buffer(numbers)])


def steps_batch(chunks: Iterable[StepChunk]) -> pa.RecordBatch:
    """Convert chunks of step rows into one record batch of ``STEP_SCHEMA``.

    Raises
    ------
    ValueError, TypeError
        A row has the wrong length, a column is unknown, or a value does not fit its column.
    """
    parts = [part for part in _made(chunks) if part]
    rows = [chunk_len(part) for part in parts]
    if any(len(column) != n for part, n in zip(parts, rows) for column in part.values()):
        raise ValueError("the columns of a step chunk differ in length")
    columns = parts[0] if len(parts) == 1 else _one_below_the_other(parts, rows)
    arrays = [
        to_array(columns[name], dtype) if name in columns else pa.nulls(sum(rows), dtype) for name, dtype in _FIELDS
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=STEP_SCHEMA)


def _made(chunks: Iterable[StepChunk]) -> Iterator[Mapping[str, Sequence[Any]]]:
    """Make the columns of each chunk, of neighbours that come late at once: most of what a column takes it takes once."""
    for kind, some in groupby(chunks, type):
        same = list(some)
        yield from map(_columns_of, [kind.joined(same)] if issubclass(kind, LateColumns) else same)


def _columns_of(chunk: StepChunk) -> Mapping[str, Sequence[Any]]:
    """Return the columns of one chunk, checked where a caller wrote them."""
    if isinstance(chunk, LateColumns):
        return chunk.columns()
    names = STEP_SCHEMA.names
    if isinstance(chunk, Mapping):
        if unknown := chunk.keys() - set(names):
            raise ValueError(f"unknown step column {min(unknown)!r}")
        # NumPy columns become plain Python numbers: faster to convert than a list of NumPy scalars.
        return {name: values.tolist() if hasattr(values, "tolist") else values for name, values in chunk.items()}
    if any(len(row) != len(names) for row in chunk):
        raise ValueError(f"a step row must have {len(names)} values, in STEP_COLUMNS order")
    return dict(zip(names, zip(*chunk)))


def _one_below_the_other(parts: Sequence[Mapping[str, Sequence[Any]]], rows: Sequence[int]) -> dict[str, list[Any]]:
    names = set().union(*parts)
    return {name: [v for part, n in zip(parts, rows) for v in part.get(name, repeat(None, n))] for name in names}


def rows_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Convert dict rows into a table of `schema`; absent keys are null.

    Raises
    ------
    ValueError, TypeError
        A key is unknown or a value does not fit its column.
    """
    unknown = set().union(*rows) - set(schema.names) if rows else set()
    if unknown:
        raise ValueError(f"unknown request column {sorted(unknown)[0]!r}")
    return pa.Table.from_arrays([to_array([r.get(f.name) for r in rows], f.type) for f in schema], schema=schema)


@cache
def compression() -> str:
    """Return the codec of new files: zstd where this pyarrow has it, else snappy, else none."""
    return next((c for c in ("zstd", "snappy") if pa.Codec.is_available(c)), "none")


def text_columns(schema: pa.Schema) -> list[str]:
    """Return the columns worth a dictionary in the file: on numbers it costs a third of the time and saves nothing."""
    return [f.name for f in schema if pa.types.is_dictionary(f.type) or pa.types.is_string(f.type)]


def create_private(file: Path) -> None:
    """Make an empty file that only its owner reads: prompts and settings are nobody else's business."""
    file.unlink(missing_ok=True)
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def write_whole(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that has its final name only once it is whole.

    Not fsynced: it survives the death of the process at any instant, not that of the machine.

    Raises
    ------
    OSError
        The file cannot be written; nothing is left behind where it can be helped.
    """
    tmp = path.with_name(f".{path.name}.tmp")
    table = table.replace_schema_metadata({VERSION_KEY: SCHEMA_VERSION.encode()})
    try:
        create_private(tmp)
        pq.write_table(table, tmp, compression=compression(), use_dictionary=text_columns(table.schema))
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            tmp.unlink(missing_ok=True)
        raise
