"""Runs of schema 1.x, as the rows of today's schema.

Schema 1.x knew a request by its id alone, said by a NaN threshold that a step was structural, left the reader to
compare margins with thresholds, and repeated ``batch_rows`` as ``padded_rows``. What it never observed is null here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_margingate.trace.errors import BAD_FILE
from sglang_margingate.trace.files import KINDS, list_files

_INPUTS: dict[str, tuple[str, ...]] = {
    "request": ("request_id",),
    "triggered": ("margin", "threshold", "prefill"),
    "structural": ("threshold", "canonical"),
    "canonical": ("prefill",),
    "padded_rows": (),
    "ttft_ms": ("tpot_ms",),
}
"""Columns made or mended here, and what they are made of."""


def is_old(names: Iterable[str]) -> bool:
    """Tell from a file's columns whether schema 1.x wrote it: it had no number of the request."""
    return "request" not in names


def inputs(names: Sequence[str], have: Iterable[str]) -> list[str]:
    """Return the columns of a 1.x file that `names` need."""
    wanted = dict.fromkeys(c for name in names for c in (name, *_INPUTS.get(name, ())))
    present = set(have)
    return [n for n in wanted if n in present]


def upgrade(table: pa.Table, names: Sequence[str], numbers: Numbers | None, steps: bool) -> pa.Table:
    """Return a 1.x table with those of `names` that can be known; its other columns stay as they are."""
    made: dict[str, pa.Array | pa.ChunkedArray] = {}
    have = set(table.column_names)
    for name in names:
        if name == "request" and numbers is not None and "request_id" in have:
            made[name] = numbers.of(table["request_id"])
        elif name == "triggered" and {"margin", "threshold"} <= have:
            made[name] = _triggered(table)
        elif name == "structural" and steps and "threshold" in have:
            unset = pc.or_kleene(pc.is_nan(table["threshold"]), pc.is_null(table["threshold"]))
            made[name] = pc.fill_null(
                pc.and_(pc.fill_null(unset, True), pc.fill_null(table["canonical"], True))
                if "canonical" in have
                else unset,
                True,
            )
        elif name == "canonical" and {"canonical", "prefill"} <= have:
            # 1.x said so of every prefill under a verifying policy, whatever it ran with.
            made[name] = pc.if_else(pc.fill_null(table["prefill"], False), pa.scalar(None, pa.bool_()), table[name])
        elif name == "padded_rows":
            made[name] = pa.nulls(table.num_rows, pa.int32())
        elif name in ("ttft_ms", "tpot_ms") and not steps and {name, "tpot_ms"} <= have:
            # Of a request that nothing was measured of (a sampled one) 1.x wrote the whole time, and 0 a token.
            unseen = pc.fill_null(pc.equal(table["tpot_ms"], 0.0), False)
            made[name] = pc.if_else(unseen, pa.scalar(None, table[name].type), table[name])
    for name, column in made.items():
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


def _triggered(table: pa.Table) -> pa.ChunkedArray:
    """Return margin <= threshold; a margin that is not a number triggers, a step without a threshold does not."""
    margin, threshold = table["margin"], table["threshold"]
    above = pc.fill_null(pc.greater(margin, threshold), True)
    low = pc.and_(pc.invert(above), pc.fill_null(pc.invert(pc.is_nan(threshold)), False))
    if "prefill" not in table.column_names:
        return low
    return pc.and_(low, pc.invert(pc.fill_null(table["prefill"], False)))


class Numbers:
    """The numbers that a 1.x run's request ids get: their places in the order of first appearance, from 1.

    One object a run and process (:func:`numbers_of`), because the tables of steps and of requests are read apart.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: dict[str, tuple[int, int]] = {}
        self._number: dict[str, int] = {}
        self._lock = Lock()

    def of(self, ids: pa.ChunkedArray) -> pa.Array:
        """Return the number of each id; null for a null id."""
        unique = pc.unique(ids).to_pylist()
        with self._lock:
            if any(name is not None and name not in self._number for name in unique):
                self._look()
            for name in unique:
                if name is not None:
                    self._number.setdefault(name, len(self._number) + 1)
            values = pa.array([None if name is None else self._number[name] for name in unique], pa.int32())
        plain = ids.cast(pa.string()) if pa.types.is_dictionary(ids.type) else ids
        where = pc.index_in(plain, value_set=pa.array(unique, pa.string()))
        return values.take(where.combine_chunks() if isinstance(where, pa.ChunkedArray) else where)

    def _look(self) -> None:
        """Number the ids of the run's files in their order: steps first, then requests without a recorded step."""
        for kind in KINDS:
            for file in list_files(self._path, kind).files:
                stamp = (file.size, file.mtime_ns)
                if self._seen.get(file.path.name) == stamp:
                    continue
                self._seen[file.path.name] = stamp
                try:
                    with pq.ParquetFile(file.path) as parquet:
                        ids = parquet.read(columns=["request_id"])["request_id"]
                except (*BAD_FILE, KeyError):
                    continue
                for name in pc.unique(ids).to_pylist():
                    if name is not None:
                        self._number.setdefault(name, len(self._number) + 1)


_NUMBERS: dict[str, Numbers] = {}
_KEPT = 32


def numbers_of(path: Path) -> Numbers:
    """Return the numbers of a run's request ids, the same for every reader of this process."""
    key = str(path.absolute())
    if key not in _NUMBERS:
        while len(_NUMBERS) >= _KEPT:
            _NUMBERS.pop(next(iter(_NUMBERS)))
        _NUMBERS[key] = Numbers(path)
    return _NUMBERS[key]
