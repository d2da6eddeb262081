"""Runs of schema 1.x, read as today's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_margingate.gate.policy import triggers
from sglang_margingate.trace import REQUEST_SCHEMA, STEP_SCHEMA, RunFollower, read_run
from sglang_margingate.trace import upgrade as upgrade_module
from sglang_margingate.trace.tables import VERSION_KEY
from sglang_margingate.trace.upgrade import Numbers, inputs, is_old, numbers_of, upgrade

ROOT = Path(__file__).resolve().parents[2]
STEPS = {
    "request_id": ["b", "a", "b", "b", "a"],
    "step": [0, 0, 1, 2, 1],
    "margin": [0.1, 0.1, 0.5, 3.0, math.nan],
    "threshold": [0.5, 0.5, 0.5, math.nan, 0.5],
    "reason": ["none", "none", "margin", "audit", "margin"],
    "flipped": [False, False, True, True, False],
    "canonical": [True, True, False, True, False],
    "prefill": [True, True, False, False, False],
    "batch_rows": [2, 2, 2, 2, 2],
    "padded_rows": [2, 2, 2, 2, 2],
}
REQUESTS = {
    "request_id": ["sampled", "b", "a"],
    "output_tokens": [9, 3, 1],
    "ttft_ms": [70.0, 5.0, 6.0],
    "tpot_ms": [0.0, 2.0, None],
    "e2e_ms": [70.0, 9.0, 6.0],
}


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    for name, columns, schema in (("steps", STEPS, STEP_SCHEMA), ("requests", REQUESTS, REQUEST_SCHEMA)):
        table = pa.table(columns)
        table = table.cast(pa.schema([schema.field(n) if n != "time" else table.schema.field(n) for n in columns]))
        pq.write_table(table.replace_schema_metadata({VERSION_KEY: b"1.0"}), tmp_path / f"{name}-0000.parquet")
    closed = '"created": "2026-01-01T00:00:00Z", "closed_at": "2026-01-01T00:01:00Z"'
    (tmp_path / "manifest.json").write_text(f'{{"schema_version": "1.0", {closed}}}')
    return tmp_path


def test_what_1x_said_and_what_it_never_observed(old_run: Path) -> None:
    run = read_run(old_run)
    steps, requests = run.steps, run.requests
    assert run.warnings == []
    assert list(steps.columns) == STEP_SCHEMA.names
    assert steps["request"].tolist() == [1, 2, 1, 1, 2]
    assert requests["request"].tolist() == [3, 1, 2], "the same numbers in both tables"
    assert steps["triggered"].tolist() == [False, False, True, False, True]
    assert steps["structural"].tolist() == [False, False, False, True, False]
    assert steps["padded_rows"].isna().all(), "1.x repeated batch_rows there"
    assert steps["canonical"].isna().tolist() == [True, True, False, False, False]
    assert requests["structural"].isna().all()
    assert requests["ttft_ms"].isna().tolist() == [True, False, False], "its whole time stood for an unseen first token"
    assert requests["tpot_ms"].isna().tolist() == [True, False, True]


def test_every_reader_numbers_alike(old_run: Path) -> None:
    """The dashboard reads requests and steps apart, and filters by columns that a 1.x file does not have."""
    late = RunFollower(old_run, step_columns=[], request_columns=["request", "request_id"]).poll().requests
    assert dict(zip(late["request_id"], late["request"])) == {"b": 1, "a": 2, "sampled": 3}
    found = read_run(old_run, step_columns=["step"], request_columns=[], filters=[("request", "==", 1)]).steps
    assert found["step"].tolist() == [0, 1, 2]
    low = read_run(old_run, step_columns=["request_id"], request_columns=[], filters=[("triggered", "==", True)]).steps
    assert low["request_id"].tolist() == ["b", "a"]


def test_triggering_is_the_gates_own_rule(tmp_path: Path) -> None:
    margins = np.array([0.0, 0.25, 0.5, 0.50001, 3.0, np.nan], dtype=np.float32)
    columns = {"margin": margins, "threshold": np.full(6, 0.5, np.float32), "prefill": np.zeros(6, bool)}
    pq.write_table(pa.table(columns), tmp_path / "steps-0000.parquet")
    found = read_run(tmp_path, step_columns=["triggered"]).steps["triggered"]
    assert found.tolist() == [triggers(float(m), 0.5) for m in margins]


def test_the_sample_run_is_read_without_a_warning() -> None:
    run = read_run(ROOT / "traces" / "sample")
    assert run.warnings == []
    assert run.steps["request"].nunique() == run.steps["request_id"].nunique()


def test_what_each_column_of_1x_becomes() -> None:
    """Written out, value by value: nulls, steps without a threshold, prefills."""
    table = pa.table(
        {
            "margin": pa.array([0.5, 0.5, None, 0.5, 0.5], pa.float32()),
            "threshold": pa.array([0.5, math.nan, 0.5, None, 0.5], pa.float32()),
            "canonical": pa.array([True, True, None, True, False]),
            "prefill": pa.array([False, False, False, None, True]),
        }
    )
    made = upgrade(table, ["triggered", "structural", "canonical", "padded_rows", "other"], None, True)
    assert made["triggered"].to_pylist() == [True, False, False, False, False]
    assert made["structural"].to_pylist() == [False, True, False, True, False]
    assert made["canonical"].to_pylist() == [True, True, None, True, None]
    assert made["canonical"].type == pa.bool_()
    assert made["padded_rows"].to_pylist() == [None] * 5
    assert made["padded_rows"].type == pa.int32()
    assert "other" not in made.column_names
    without = upgrade(
        table.drop_columns(["canonical", "prefill"]), ["structural", "triggered", "canonical"], None, True
    )
    assert without["structural"].to_pylist() == [False, True, False, True, False]
    assert without["triggered"].to_pylist() == [True, False, False, False, True], "nothing says that it was a prefill"
    assert "canonical" not in without.column_names
    requests = pa.table({"ttft_ms": [70.0, 5.0, 6.0], "tpot_ms": [0.0, 2.0, None]})
    assert upgrade(requests, ["ttft_ms", "tpot_ms"], None, False).to_pydict() == {
        "ttft_ms": [None, 5.0, 6.0], "tpot_ms": [None, 2.0, None],
    }  # fmt: skip
    assert upgrade(requests, ["ttft_ms"], None, True).to_pydict() == requests.to_pydict(), "steps have no such times"


def test_numbers_are_those_of_first_appearance_and_stay(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path)
    found = numbers.of(pa.chunked_array([pa.array(["b", None, "a"]), pa.array(["b"])]))
    assert found.to_pylist() == [1, None, 2, 1]
    assert found.type == pa.int32()
    assert numbers.of(pa.chunked_array([pa.array(["c", "a"]).dictionary_encode()])).to_pylist() == [3, 2]
    assert numbers_of(tmp_path) is numbers_of(tmp_path)
    assert numbers_of(tmp_path / "a") is not numbers_of(tmp_path / "b")
    for name in range(40):
        numbers_of(tmp_path / str(name))
    assert len(upgrade_module._NUMBERS) == 32, "the oldest are forgotten"


def test_which_columns_of_an_old_file_are_read() -> None:
    assert is_old(["request_id", "step"])
    assert not is_old(["request", "request_id"])
    have = ["margin", "threshold", "prefill", "canonical", "request_id", "step"]
    assert set(inputs(["triggered"], have)) == {"margin", "threshold", "prefill"}
    assert inputs(["step", "nothing"], have) == ["step"]


def test_a_step_without_a_threshold_was_structural_unless_it_ran_elsewhere() -> None:
    table = pa.table({"threshold": [math.nan, math.nan, None, 0.5], "canonical": [True, False, None, True]})
    for columns, expected in (
        (["threshold", "canonical"], [True, False, True, False]),
        (["threshold"], [True] * 3 + [False]),
    ):
        made = upgrade(table.select(columns), ["structural"], None, steps=True)
        assert made["structural"].to_pylist() == expected
        assert "structural" not in upgrade(table.select(columns), ["structural"], None, steps=False).column_names


def test_a_file_that_came_later_is_numbered_behind_those_before(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path)
    pq.write_table(pa.table({"request_id": ["x1", "x2"]}), tmp_path / "steps-0001.parquet")
    assert numbers.of(pa.chunked_array([["x2", None]])).to_pylist() == [2, None]
    pq.write_table(pa.table({"request_id": ["y1", "y2"]}), tmp_path / "steps-0002.parquet")
    assert numbers.of(pa.chunked_array([["y2", "x1"]])).to_pylist() == [4, 1]
    assert numbers.of(pa.chunked_array([["nowhere"]])).to_pylist() == [5]
