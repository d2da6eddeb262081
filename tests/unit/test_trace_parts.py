"""The trace's small parts, to the letter: manifests of several writers, what lies in a folder, frames, rows and the ring."""

from __future__ import annotations

import json
import os
import re
import socket
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sglang_margingate.trace.errors import SchemaVersionError, TraceError
from sglang_margingate.trace.files import RowFile, kind_of, list_files, name_of, own_folder, parts, shared_folder
from sglang_margingate.trace.frames import conform, filter_columns, read_table, to_frame
from sglang_margingate.trace.manifest import (
    check_version,
    is_live,
    one_manifest,
    parse_time,
    read_manifest,
    utc_now,
    write_manifest,
)
from sglang_margingate.trace.ring import StepRing
from sglang_margingate.trace.rows import Cursor, damaged, gap, read_rows
from sglang_margingate.trace.schema import REQUEST_SCHEMA, SCHEMA_VERSION, STEP_SCHEMA
from sglang_margingate.trace.tables import (
    VERSION_KEY,
    chunk_len,
    chunk_tail,
    rows_table,
    steps_batch,
    to_array,
    write_whole,
)

T0, T1, T2 = (f"2026-01-01T00:00:0{i}.000Z" for i in range(3))


# ---- manifests --------------------------------------------------------------------------------------------------------


def writers(*fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"run": "r", "pid": i, "scheduler": {"dp_rank": i}, **each} for i, each in enumerate(fields)]


def test_one_writers_manifest_is_the_runs() -> None:
    (only,) = writers({"closed_at": T1, "totals": {"files": 2}})
    assert one_manifest([only]) is only


def test_a_run_lives_while_one_of_its_writers_does() -> None:
    both = writers(
        {"closed_at": T1, "heartbeat": T2, "totals": {"step_rows": 3, "files": 1}},
        {"heartbeat": T1, "totals": {"step_rows": 4, "dropped_rows": 5}},
    )
    one = one_manifest(both)
    assert (one["closed_at"], one["heartbeat"]) == (None, T1), "of those that live"
    assert one["totals"] == {"step_rows": 7, "files": 1, "dropped_rows": 5}
    assert (one["run"], one["pid"]) == ("r", 0), "all else is the first one's"
    assert one["schedulers"] == [
        {"scheduler": {"dp_rank": 0}, "pid": 0, "totals": both[0]["totals"], "heartbeat": T2, "closed_at": T1},
        {"scheduler": {"dp_rank": 1}, "pid": 1, "totals": both[1]["totals"], "heartbeat": T1, "closed_at": None},
    ]


def test_a_run_is_closed_when_all_of_its_writers_are() -> None:
    one = one_manifest(writers({"closed_at": T1, "heartbeat": T0}, {"closed_at": T2, "heartbeat": T1, "totals": None}))
    assert (one["closed_at"], one["heartbeat"], one["totals"]) == (T2, T1, {})
    assert one_manifest(writers({}, {}))["heartbeat"] is None


def test_times_are_utc_to_the_millisecond() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", utc_now())
    now = parse_time(utc_now())
    assert now is not None
    assert abs((datetime.now(timezone.utc) - now).total_seconds()) < 60
    assert (
        parse_time("2026-01-01T00:00:00") == parse_time("2026-01-01T00:00:00Z") == parse_time("2026-01-01T01:00+01:00")
    )
    assert [parse_time(x) for x in (None, 12, "", "yesterday")] == [None] * 4


@pytest.mark.parametrize(("age", "live"), [(0, True), (17, True), (23, False), (-17, True), (-23, False)])
def test_a_run_lives_for_twenty_seconds_after_its_last_beat(age: float, live: bool) -> None:
    beat = (datetime.now(timezone.utc) - timedelta(seconds=age)).isoformat()
    assert is_live({"heartbeat": beat}) is live
    assert not is_live({"heartbeat": beat, "closed_at": beat})
    assert is_live({"heartbeat": beat, "closed_at": ""}) is live
    assert not is_live({})


def test_a_manifest_is_private_and_readable_and_keeps_foreign_types(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"run": "r", "flags": {"path": Path("/x"), "pair": (1, float("nan")), "word": "é"}})
    file = tmp_path / "manifest.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().startswith('{\n  "run": "r",\n  "flags": {\n    "path": "/x",\n')
    assert file.read_text().endswith("}\n")
    assert read_manifest(tmp_path)["flags"] == {"path": "/x", "pair": [1, None], "word": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def manifest_of(folder: Path, text: str) -> dict[str, Any]:
    (folder / "manifest.json").write_text(text)
    return read_manifest(folder)


def test_numbers_and_nesting_up_to_the_limits_are_read(tmp_path: Path) -> None:
    for digits in (str(2**64 - 1), str(1 - 2**64), "0." + "1" * 38, "1.5e19"):
        assert manifest_of(tmp_path, f'{{"x": {digits}}}')["x"] == pytest.approx(float(digits))
    for digits in (str(2**64), str(-(2**64)), "1.9e19"):
        with pytest.raises(TraceError, match=re.escape(f"a number out of range ({digits})")):
            manifest_of(tmp_path, f'{{"x": {digits}}}')
    with pytest.raises(TraceError, match="a number of 41 characters"):
        manifest_of(tmp_path, '{"x": 0.' + "1" * 39 + "}")
    assert manifest_of(tmp_path, '{"x": ' + "[" * 62 + "1" + "]" * 62 + "}")
    with pytest.raises(TraceError, match="nested more than 64 levels deep"):
        manifest_of(tmp_path, '{"x": ' + "[" * 64 + "1" + "]" * 64 + "}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"policy": 7}', "policy: expected `str`, got `int`; the run's rows can still be read"),
        ('{"flags": {"a": 1}, "versions": {"torch": 2}}', "versions[...]: expected `str`, got `int`; the run's"),
        ("{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); the"),
        ('{"x": Infinity}', "Infinity is not a JSON number; the run's rows can still be read"),
        ("7", "a JSON object was expected, found int; the run's rows can still be read"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError) as error:
        manifest_of(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'manifest.json'}: {says}")


def test_a_folder_without_a_manifest_and_one_that_is_a_link(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as error:
        read_manifest(tmp_path)
    assert str(error.value) == f"{tmp_path}: no manifest.json; give the folder of one run, traces/<run>"
    (tmp_path / "manifest.json").symlink_to("/dev/null")
    with pytest.raises(TraceError, match=r"not a plain file \(a link, a FIFO or a device\)"):
        read_manifest(tmp_path)
    with pytest.raises(TraceError, match="cannot be read"):
        read_manifest(tmp_path / "manifest.json")


def test_a_newer_major_version_is_refused_and_nothing_else() -> None:
    major = int(SCHEMA_VERSION.split(".")[0])
    for found in (None, "garbled", SCHEMA_VERSION, f"{major}.99", "1.0"):
        check_version(found, "here")
    with pytest.raises(SchemaVersionError) as error:
        check_version(f"{major + 1}.0", "here")
    assert str(error.value) == (
        f"here: written with trace schema {major + 1}.0, this version reads up to {major}.x; "
        "upgrade sglang-margingate (pip install -U sglang-margingate)"
    )


def test_fields_of_a_newer_major_version_are_not_judged(tmp_path: Path) -> None:
    newer = f"{int(SCHEMA_VERSION.split('.')[0]) + 1}.0"
    assert manifest_of(tmp_path, json.dumps({"schema_version": newer, "model": ["a"]}))["model"] == ["a"]


# ---- folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_writers_are_private_and_in_their_order(tmp_path: Path) -> None:
    run = own_folder(tmp_path, "r")
    for part in (10, 2, 0):
        made = shared_folder(run, part)
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "manifest.json").touch()
    (run / "scheduler-3").mkdir()  # says nothing of itself yet
    (run / "scheduler-4").symlink_to(run / "scheduler-2")
    for odd in ("scheduler-0", "scheduler-x", "scheduler-01"):
        (run / odd).mkdir()
        (run / odd / "manifest.json").touch()
    assert parts(run) == [run, run / "scheduler-2", run / "scheduler-10"]
    assert parts(tmp_path / "missing") == [tmp_path / "missing"]


def test_what_lies_there_is_named_without_opening_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        found = {entry.name: kind_of(entry) for entry in os.scandir(tmp_path)}
    assert found == {
        "file": "",
        "link": "a symbolic link",
        "folder": "a folder",
        "fifo": "a FIFO",
        "socket": "a socket",
    }
    assert {kind_of(entry) for entry in os.scandir("/dev") if entry.name == "null"} == {"a device"}


def rows_of(files: list[RowFile]) -> list[tuple[int | None, int | None, int | None]]:
    return [(f.first, f.last, f.rows) for f in files]


def test_each_row_is_in_one_file_of_a_listing(tmp_path: Path) -> None:
    for first, last in ((0, 9), (10, 19), (0, 19), (30, 39), (35, 44), (40, 44)):
        (tmp_path / name_of("steps", first, last)).write_bytes(b"1234")
    (tmp_path / name_of("requests", 0, 9)).touch()
    (tmp_path / "steps-000000050-000000059.parquet").mkdir()
    (tmp_path / "steps-000000045-000000049.parquet").symlink_to("x")
    (tmp_path / ".steps-000000060-000000069.parquet.tmp").touch()
    found = list_files(tmp_path, "steps")
    assert rows_of(found.files) == [(0, 19, 20), (30, 39, 10), (35, 44, 10)]
    assert found.gaps == [(20, 29)]
    assert rows_of(found.replaced) == [(0, 9, 10), (10, 19, 10), (40, 44, 5)]
    assert found.end == 45
    assert found.files[0].size == 4
    assert found.files[0].path == tmp_path / name_of("steps", 0, 19)
    assert found.files[0].mtime_ns == found.files[0].path.stat().st_mtime_ns
    assert found.odd == [
        "steps-000000045-000000049.parquet: a symbolic link, not a file; skipped",
        "steps-000000050-000000059.parquet: a folder, not a file; skipped",
    ]
    later = list_files(tmp_path, "steps", 20)
    assert rows_of(later.files) == [(30, 39, 10), (35, 44, 10)]
    assert (later.gaps, later.end) == ([(20, 29)], 45)
    assert rows_of(later.replaced) == [(40, 44, 5)], "older ones are no news"
    inside = list_files(tmp_path, "steps", 19)
    assert rows_of(inside.files)[0] == (0, 19, 20)
    assert inside.end == 45
    assert vars(list_files(tmp_path / "missing", "steps")) == vars(list_files(tmp_path / "empty", "steps"))


def test_files_of_schema_1_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("steps-10000.parquet", "steps-9999.parquet", "steps-0002.parquet"):
        (tmp_path / name).touch()
    found = list_files(tmp_path, "steps")
    assert [f.path.name for f in found.files] == ["steps-0002.parquet", "steps-9999.parquet", "steps-10000.parquet"]
    assert rows_of(found.files) == [(None, None, None)] * 3
    assert (found.end, found.gaps) == (0, [])


# ---- tables and frames ------------------------------------------------------------------------------------------------


def test_columns_take_python_numbers_and_times_to_the_microsecond() -> None:
    times = to_array([1.0000006, 12.25, None], pa.timestamp("us", "UTC"))
    assert times.cast(pa.int64()).to_pylist() == [1_000_001, 12_250_000, None]
    assert to_array([1, None], pa.int32()).to_pylist() == [1, None]


def test_chunks_are_rows_or_columns() -> None:
    assert [chunk_len(c) for c in ({}, {"a": [1, 2], "b": [3, 4]}, [(1,), (2,), (3,)])] == [0, 2, 3]
    columns = {"a": [1, 2, 3]}
    assert chunk_tail(columns, 2) == {"a": [3]}
    assert columns == {"a": [1, 2, 3]}
    assert chunk_tail([(1,), (2,)], 1) == [(2,)]


def test_a_batch_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^unknown step column 'a'$"):
        steps_batch([{"b": [1], "a": [1], "step": [1]}])
    with pytest.raises(ValueError, match=f"^a step row must have {len(STEP_SCHEMA)} values, in STEP_COLUMNS order$"):
        steps_batch([[(1,)]])
    with pytest.raises(ValueError, match=r"^the columns of a step chunk differ in length$"):
        steps_batch([{"step": [1, 2], "token": [1]}])
    batch = steps_batch([{"step": [1, 2]}, [tuple(None for _ in STEP_SCHEMA)]])
    assert batch.column("step").to_pylist() == [1, 2, None]
    assert batch.column("token").to_pylist() == [None] * 3
    with pytest.raises(ValueError, match="x"):
        rows_table([{"x": 1}], REQUEST_SCHEMA)
    assert rows_table([], REQUEST_SCHEMA).num_rows == 0


def test_a_file_appears_whole_private_and_with_its_version(tmp_path: Path) -> None:
    table = pa.Table.from_batches([steps_batch([{"step": [0, 1], "reason": ["none", "none"]}])])
    write_whole(table, tmp_path / "steps.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["steps.parquet"]
    assert (tmp_path / "steps.parquet").stat().st_mode & 0o777 == 0o600
    assert pq.read_schema(tmp_path / "steps.parquet").metadata[VERSION_KEY] == SCHEMA_VERSION.encode()
    columns = pq.read_metadata(tmp_path / "steps.parquet").row_group(0)
    kinds = {columns.column(i).path_in_schema: columns.column(i) for i in range(columns.num_columns)}
    assert "RLE_DICTIONARY" in kinds["reason"].encodings
    assert "RLE_DICTIONARY" not in kinds["step"].encodings
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(OSError, match="taken"):
        write_whole(table, tmp_path / "taken")
    assert {p.name for p in tmp_path.iterdir()} == {"steps.parquet", "taken"}, "nothing is left behind"


def test_a_table_is_brought_into_todays_schema() -> None:
    schema = pa.schema([("a", pa.int32()), ("b", pa.string()), ("c", pa.bool_())])
    table = conform(pa.table({"b": ["x"], "a": pa.array([1], pa.int64()), "more": [2]}), schema)
    assert table.schema == schema
    assert table.to_pylist() == [{"a": 1, "b": "x", "c": None}]
    assert conform(pa.table({"a": [1, 2]}), pa.schema([])).num_columns == 0


def test_a_filter_tells_which_columns_it_needs() -> None:
    schema = pa.schema([("a", pa.int32()), ("b", pa.string()), ("c", pa.bool_())])
    assert filter_columns(None, schema) == []
    assert filter_columns([("b", "<", 1), ("a", "=", 2), ("b", ">", 0)], schema) == ["b", "a"]
    assert filter_columns([[("c", "=", True)], [("a", "=", 2), ("c", "=", False)]], schema) == ["c", "a"]
    assert filter_columns(pa.compute.field("a") > 1, schema) == ["a", "b", "c"]


def test_frames_have_nullable_types_where_a_null_may_be() -> None:
    table = pa.table({
        "i": pa.array([1, None], pa.int32()), "f": pa.array([1.0, None]), "b": pa.array([True, None]),
        "full": pa.array([1, 2], pa.int32()), "verify_token": pa.array([1, 2], pa.int32()), "s": ["x", None],
    })  # fmt: skip
    frame = to_frame(table)
    assert list(frame) == ["i", "f", "b", "full", "verify_token", "s"]
    assert frame.dtypes[["i", "b", "full", "verify_token", "f"]].astype(str).to_dict() == {
        "i": "Int32", "b": "boolean", "full": "int32", "verify_token": "Int32", "f": "float64"
    }  # fmt: skip
    assert frame["i"].isna().tolist() == [False, True]
    plain = to_frame(pa.table({"full": pa.array([1, 2], pa.int32())}))
    assert isinstance(plain, pd.DataFrame)
    assert plain["full"].dtype == "int32"


def test_row_groups_can_be_chosen_and_missing_columns_are_left_out(tmp_path: Path) -> None:
    pq.write_table(pa.table({"request": [1, 2, 3], "step": [4, 5, 6]}), tmp_path / "steps.parquet", row_group_size=1)
    assert read_table(tmp_path / "steps.parquet", ["step", "token"]).to_pydict() == {"step": [4, 5, 6]}
    assert read_table(tmp_path / "steps.parquet", ["request"], [2, 0]).to_pydict() == {"request": [3, 1]}


# ---- rows and the ring ------------------------------------------------------------------------------------------------


def steps_file(folder: Path, first: int, last: int, rows: int | None = None) -> Path:
    numbers = list(range(first, last + 1))[:rows]
    file = folder / name_of("steps", first, last)
    write_whole(pa.Table.from_batches([steps_batch([{"request": numbers, "step": numbers}])]), file)
    return file


def test_a_cursor_reads_each_row_once_and_says_what_is_missing(tmp_path: Path) -> None:
    at = Cursor()
    steps_file(tmp_path, 0, 4)
    table, warnings = read_rows(tmp_path, "steps", STEP_SCHEMA, ["step"], None, at)
    assert (table["step"].to_pylist(), warnings, at.next, at.rows) == ([0, 1, 2, 3, 4], [], 5, 5)
    steps_file(tmp_path, 0, 7)  # merged: three of its rows are new
    steps_file(tmp_path, 10, 11)
    table, warnings = read_rows(tmp_path, "steps", STEP_SCHEMA, ["step"], None, at)
    assert table["step"].to_pylist() == [5, 6, 7, 10, 11]
    assert warnings == ["2 step rows are missing: no file holds rows 8 to 9"]
    assert (at.next, at.rows) == (12, 10)
    steps_file(tmp_path, 12, 15, rows=2)
    table, warnings = read_rows(tmp_path, "steps", STEP_SCHEMA, ["step"], None, at)
    assert (table.num_rows, at.next, at.rows) == (0, 16, 10)
    assert warnings == [
        "steps-000000012-000000015.parquet: not a whole Parquet file, skipped (it holds 2 rows, its name says 4)"
    ]
    assert read_rows(tmp_path, "steps", STEP_SCHEMA, ["step"], None, at)[1] == [], "said once"
    assert read_rows(tmp_path, "steps", STEP_SCHEMA, [], None, Cursor())[0].num_columns == 0
    kept, _ = read_rows(tmp_path, "steps", STEP_SCHEMA, ["token"], [("step", ">", 9)], Cursor())
    assert (kept.column_names, kept.num_rows) == (["token"], 2)
    with pytest.raises(TraceError, match=r"^unknown column 'nope'; known: request, "):
        read_rows(tmp_path, "steps", STEP_SCHEMA, ["step", "nope"], None, Cursor())


def test_notices_are_given_once_and_errors_in_one_line() -> None:
    at = Cursor()
    assert [at.notice("x"), at.notice("y"), at.notice("x")] == [["x"], ["y"], []]
    assert gap("requests", 1_000, 2_999) == "2,000 request rows are missing: no file holds rows 1,000 to 2,999"
    said = damaged(Path("a/steps-1.parquet"), ValueError("one\ntwo"))
    assert said == "steps-1.parquet: not a whole Parquet file, skipped (one)"
    assert damaged(Path("f"), KeyError()) == "f: not a whole Parquet file, skipped (KeyError)"
    assert damaged(Path("f"), ValueError("x" * 200)) == f"f: not a whole Parquet file, skipped ({'x' * 120})"


def test_a_full_ring_drops_the_oldest_rows_and_counts_them() -> None:
    ring = StepRing(5)
    ring.append([(1,), (2,), (3,)])
    ring.append([(4,), (5,)])
    assert (len(ring), ring.dropped) == (5, 0), "up to the limit nothing goes"
    ring.append([(6,)])
    assert (len(ring), ring.dropped) == (5, 1)
    ring.append([(7,), (8,)])
    assert (len(ring), ring.dropped) == (5, 3)
    assert ring.take(1) == ([[(4,), (5,)]], 2)
    assert ring.take(2) == ([[(6,)], [(7,), (8,)]], 3)
    assert ring.take(2) == ([], 0)
    assert len(ring) == 0
    ring.append([(i,) for i in range(9)])
    assert ring.take(1) == ([[(4,), (5,), (6,), (7,), (8,)]], 5), "of one chunk the newest rows stay"
    assert ring.dropped == 7
