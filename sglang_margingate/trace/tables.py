"""Python rows to Arrow tables, and tables to whole Parquet files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_margingate.trace.schema import SCHEMA_VERSION, STEP_SCHEMA

VERSION_KEY = b"margingate_schema"
"""Schema metadata key: each file names its schema version, so that it can be judged without its manifest."""

StepChunk = Sequence[tuple[Any, ...]] | Mapping[str, Sequence[Any]]
"""Rows of one decode step: tuples in ``STEP_COLUMNS`` order, or equally long columns by name (absent ones are null)."""


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


def to_array(values: list[Any], dtype: pa.DataType) -> pa.Array:
    """Convert one column; timestamps come as float seconds since the epoch (UTC), None is null, NaN stays NaN."""
    if pa.types.is_timestamp(dtype):
        micros = pc.round(pc.multiply(pa.array(values, pa.float64()), 1e6))
        return micros.cast(pa.int64()).cast(dtype)
    return pa.array(values, dtype)


def steps_batch(chunks: Iterable[StepChunk]) -> pa.RecordBatch:
    """Convert chunks of step rows into one record batch of ``STEP_SCHEMA``.

    Raises
    ------
    ValueError, TypeError
        A row has the wrong length, a column is unknown, or a value does not fit its column.
    """
    names = STEP_SCHEMA.names
    columns: list[list[Any]] = [[] for _ in names]
    for chunk in chunks:
        if isinstance(chunk, Mapping):
            unknown = set(chunk) - set(names)
            if unknown:
                raise ValueError(f"unknown step column {sorted(unknown)[0]!r}")
            rows = chunk_len(chunk)
            for name, column in zip(names, columns):
                values = chunk.get(name)
                if values is None:
                    column.extend([None] * rows)
                else:
                    # NumPy columns become plain Python numbers: faster to convert than a list of NumPy scalars.
                    column.extend(values.tolist() if hasattr(values, "tolist") else values)
        else:
            made = list(chunk)  # once: some chunks make their rows when they are read
            if any(len(row) != len(names) for row in made):
                raise ValueError(f"a step row must have {len(names)} values, in STEP_COLUMNS order")
            for column, values in zip(columns, zip(*made)):
                column.extend(values)
    if len({len(c) for c in columns}) > 1:
        raise ValueError("the columns of a step chunk differ in length")
    arrays = [to_array(c, f.type) for c, f in zip(columns, STEP_SCHEMA)]
    return pa.RecordBatch.from_arrays(arrays, schema=STEP_SCHEMA)


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
