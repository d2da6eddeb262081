"""Parquet tables of any readable schema version to pandas frames of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sglang_margingate.trace import upgrade

if TYPE_CHECKING:
    import pandas as pd

_ALWAYS_NULLABLE = {"verify_token", "padded_rows"}
"""Integers that may be null by contract: nullable in every run, so that their type does not hang on the data."""


def read_table(file: Path, names: Sequence[str], groups: Sequence[int] | None = None) -> pa.Table:
    """Read those of `names` that the file has or, in a run of schema 1.x, that can be made of what it has.

    Parameters
    ----------
    file, names
        The Parquet file, and columns of today's schema.
    groups
        Row groups to read; all by default.

    Raises
    ------
    OSError, pyarrow.ArrowException
        The file is not whole.
    """
    with pq.ParquetFile(file) as parquet:
        have = parquet.schema_arrow.names
        old = upgrade.is_old(have)
        columns = upgrade.inputs(names, have) if old else [n for n in names if n in set(have)]
        every = range(parquet.num_row_groups) if groups is None else groups
        table = parquet.read_row_groups(list(every), columns=columns)
    if not old:
        return table
    numbers = upgrade.numbers_of(file.parent) if "request" in names else None
    return upgrade.upgrade(table, names, numbers, steps=file.name.startswith("steps"))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table in `schema`: columns that an older minor version lacks are null, types are cast."""
    columns = []
    for f in schema:
        if f.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, f.type)]))
        elif table.schema.field(f.name).type != f.type:
            columns.append(table[f.name].cast(f.type))
        else:
            columns.append(table[f.name])
    if not columns:
        return table.select([])
    return pa.Table.from_arrays(columns, schema=schema)


def filter_columns(filters: Any, schema: pa.Schema) -> list[str]:
    """Return the columns that a filter needs; for an expression, which does not tell, all of them."""
    if filters is None:
        return []
    if not isinstance(filters, list):
        return list(schema.names)
    # pyarrow's list form: [(name, op, value), ...] or a list of such lists, joined by "or".
    terms = [t for part in filters for t in (part if isinstance(part, list) else [part])]
    return list(dict.fromkeys(t[0] for t in terms))


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Convert to pandas: dictionaries as categoricals, integers and booleans with nulls as nullable types."""
    import pandas as pd

    nullable = [
        f.name
        for f in table.schema
        if (pa.types.is_integer(f.type) or pa.types.is_boolean(f.type))
        and (f.name in _ALWAYS_NULLABLE or table[f.name].null_count)
    ]
    plain = table.drop_columns(nullable) if nullable else table
    frame = plain.to_pandas()
    if not nullable:
        return frame
    types = {pa.int32(): pd.Int32Dtype(), pa.bool_(): pd.BooleanDtype()}
    extra = table.select(nullable).to_pandas(types_mapper=types.get)
    return pd.concat([frame, extra], axis=1)[table.column_names]
