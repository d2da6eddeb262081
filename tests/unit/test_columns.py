"""Columns that rows share: whoever reads them, as Arrow or one by one, finds what each row had."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_rows import rows_of

from sglang_margingate.columns import Shared
from sglang_margingate.runtime.state import Forward, StepRow, StepRows
from sglang_margingate.runtime.verifier import KvDelta
from sglang_margingate.trace.schema import STEP_SCHEMA
from sglang_margingate.trace.tables import steps_batch, to_array
from sglang_margingate.words import Reason

KINDS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.string(): st.text(max_size=3),
    pa.dictionary(pa.int32(), pa.string()): st.sampled_from(["", "a", "b"]),
    pa.timestamp("us", tz="UTC"): st.floats(0, 4e9).map(lambda t: round(t, 6)),
    pa.list_(pa.int32()): st.lists(st.integers(0, 9), max_size=2),
}


@given(data=st.data())
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("nulls", [False, True])
def test_shared_values_become_what_a_list_of_them_becomes(dtype: pa.DataType, nulls: bool, data: st.DataObject) -> None:
    one = KINDS[dtype] if not nulls else st.none() | KINDS[dtype]
    values = data.draw(st.lists(one, min_size=1, max_size=4))
    at = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=9))
    column = Shared.of(at).with_values(values[i] for i in dict.fromkeys(at))
    wanted = [values[i] for i in at]
    assert list(column) == wanted
    assert list(column[1:]) == wanted[1:]
    found = to_array(column, dtype)
    found.validate(full=True)
    assert found.type == dtype
    if pa.types.is_timestamp(dtype):
        wanted = [None if t is None else round(t * 1e6) for t in wanted]
        found = found.cast(pa.int64())
    assert found.to_pylist() == wanted


def test_nan_stays_and_what_does_not_fit_is_refused() -> None:
    for column in ([math.nan, 1.0], Shared.all(math.nan, 2)):
        found = to_array(column, pa.float32())
        assert found.null_count == 0
        assert math.isnan(found[0].as_py())
    for wrong, dtype in ((2**31, pa.int32()), ("x", pa.float32()), ("x", pa.bool_())):
        for column in ([wrong], Shared.all(wrong, 3)):
            with pytest.raises((ValueError, TypeError, OverflowError)):
                to_array(column, dtype)


def a_request(number: int, threshold: float = 0.5) -> Any:
    class Request:
        ledger = SimpleNamespace(
            number=number, request_id=f"r{number}", params=SimpleNamespace(dataset="arith", threshold=threshold)
        )

    return Request()


def quiet(state: Any, forward: Forward, step: int, **more: Any) -> StepRow:
    shared: dict[str, Any] = {"forward": forward, "threshold": state.ledger.params.threshold}
    return StepRow(0, 0, state, 9 + step, step, token=7, fast_token=7, second_token=8, **shared, **more)


def test_a_row_has_every_column_of_its_request_its_forward_and_its_own() -> None:
    one, other = a_request(1), a_request(2, 0.0625)
    prefill = Forward(False, 1, None, True, 10.5, 1, 3.0)
    decode = Forward(True, 2, 64, False, 11.25, 2, 2.0)
    verified = quiet(other, decode, 1, margin=0.125, structural=False)
    verified.reason, verified.verify_token, verified.verify_margin = Reason.MARGIN, 8, 0.25
    verified.window_rows, verified.delta, verified.waited_ms = 3, KvDelta(0.5, 0.75), 1.5
    verified.tops = (([7, 8], [-0.5, -1.0]), ([8, 7], [-0.25, -2.0]))
    rows = [
        quiet(one, prefill, 0, margin=2.0, structural=True),
        quiet(one, decode, 1, margin=0.25, structural=False),
        verified,
    ]
    first, second, third = rows_of(StepRows(rows, ["a", "b", "c"]))
    assert first == {
        "request": 1, "request_id": "r1", "dataset": "arith", "step": 0, "position": 9, "time": 10.5, "token": 7, "fast_token": 7,
        "second_token": 8, "margin": 2.0, "threshold": 0.5, "triggered": False, "reason": "none", "verify_token": None,
        "verify_margin": None, "flipped": False, "repaired": False, "kv_delta_first": None, "kv_delta_last": None,
        "window_rows": 0, "batch_rows": 1, "padded_rows": None, "canonical": True, "structural": True, "prefill": True,
        "step_ms": 3.0, "verify_ms": 0.0, "hold_ms": 0.0, "token_text": "a", "forward": 1, "fast_top_tokens": None,
        "fast_top_logprobs": None, "verify_top_tokens": None, "verify_top_logprobs": None,
    }  # fmt: skip
    assert second == {
        **first, "step": 1, "position": 10, "time": 11.25, "margin": 0.25, "triggered": True, "batch_rows": 2, "padded_rows": 64,
        "canonical": False, "structural": False, "prefill": False, "step_ms": 2.0, "token_text": "b", "forward": 2,
    }  # fmt: skip
    assert third == {
        **second, "request": 2, "request_id": "r2", "threshold": 0.0625, "margin": 0.125, "triggered": False, "reason": "margin", "verify_token": 8,
        "verify_margin": 0.25, "flipped": True, "repaired": True, "kv_delta_first": 0.5, "kv_delta_last": 0.75,
        "window_rows": 3, "verify_ms": 1.5, "token_text": "c", "fast_top_tokens": [7, 8], "fast_top_logprobs": [-0.5, -1.0],
        "verify_top_tokens": [8, 7], "verify_top_logprobs": [-0.25, -2.0],
    }  # fmt: skip


@pytest.mark.parametrize("texts", [False, True])
def test_chunks_lie_below_one_another_whatever_made_them(texts: bool) -> None:
    forwards = [Forward(True, 2, 64, True, 1.0 + n, n, 2.0) for n in range(3)]
    requests = [a_request(n) for n in range(2)]
    parts = [
        StepRows([quiet(r, f, k, structural=True) for r in requests], ["x", "y"] if texts else None)
        for k, f in enumerate(forwards)
    ]
    by_name = {"step": [5, 6], "request_id": ["a", "b"]}
    batch = steps_batch([*parts[:2], by_name, parts[2], []])
    batch.validate(full=True)
    assert batch.schema == STEP_SCHEMA
    found = batch.to_pydict()
    assert found["step"] == [0, 0, 1, 1, 5, 6, 2, 2]
    assert found["request_id"] == ["r0", "r1", "r0", "r1", "a", "b", "r0", "r1"]
    assert found["forward"] == [0, 0, 1, 1, None, None, 2, 2]
    assert found["token_text"] == (["x", "y"] * 2 + [None] * 2 + ["x", "y"] if texts else [None] * 8)
    rest = parts[0][1:]
    assert [row["request"] for row in rows_of(rest)] == [1]
    assert StepRows([]).columns() == {}
