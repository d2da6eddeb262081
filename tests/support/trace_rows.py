"""Rows of what a sink is given, as plain values by column: before Arrow rounds them."""

from __future__ import annotations

from typing import Any

from sglang_margingate.columns import LateColumns
from sglang_margingate.trace.schema import STEP_COLUMNS

NAMES = [column.name for column in STEP_COLUMNS]


def rows_of(chunk: LateColumns) -> list[dict[str, Any]]:
    """Return a dict of every column for each row; null is None."""
    columns = chunk.columns()
    assert columns.keys() <= set(NAMES)
    assert {len(values) for values in columns.values()} <= {len(chunk)}
    return [{name: columns[name][i] if name in columns else None for name in NAMES} for i in range(len(chunk))]
