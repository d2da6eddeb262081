"""The trace reader: projection, live runs, damaged runs and other schema versions."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sglang_margingate.trace import (
    REQUEST_SCHEMA,
    STEP_COLUMNS,
    STEP_SCHEMA,
    RunFollower,
    SchemaVersionError,
    TraceError,
    TraceWriter,
    list_runs,
    read_run,
)
from sglang_margingate.trace import schema as schema_module
from sglang_margingate.trace.reader import is_run

ROOT = Path(__file__).resolve().parents[2]
SECOND = "steps-000000010-000000019.parquet"


def steps(n: int, first: int = 0, rid: str = "r") -> dict:
    index = range(first, first + n)
    return {
        "request": [i % 4 for i in index],
        "request_id": [f"{rid}{i % 4}" for i in index],
        "dataset": ["arith"] * n,
        "step": list(index),
        "time": [1e9 + i for i in index],
        "margin": [i / 10 for i in index],
        "flipped": [i % 3 == 0 for i in index],
        "verify_token": [i if i % 3 == 0 else None for i in index],
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path, {"model": "m", "policy": "log"}, rows_per_file=10, seconds_per_file=60) as w:
        for k in range(3):
            w.add_steps(steps(10, 10 * k, f"f{k}-"))
            w.add_request({"request": k, "request_id": f"f{k}-0", "dataset": "arith", "output_tokens": 10})
            w.flush()
    return w.path


def test_all_columns_in_order(run_dir: Path) -> None:
    run = read_run(str(run_dir))
    assert list(run.steps.columns) == STEP_SCHEMA.names
    assert list(run.requests.columns) == REQUEST_SCHEMA.names
    assert run.steps["step"].tolist() == list(range(30))
    assert run.steps["request_id"].cat.categories.size == 12, "one dictionary over all files"
    assert run.steps["verify_token"].dtype == pd.Int32Dtype()
    assert run.steps["time"].dt.tz is not None
    assert run.warnings == []


def test_projection_and_filters(run_dir: Path) -> None:
    run = read_run(run_dir, step_columns=["margin", "dataset"], request_columns=[], filters=[("step", ">=", 25)])
    assert list(run.steps.columns) == ["margin", "dataset"]
    assert len(run.steps) == 5
    assert run.requests.empty
    expression = (pc.field("step") < 3) | (pc.field("margin") > 2.75)
    assert read_run(run_dir, step_columns=["step"], filters=expression).steps["step"].tolist() == [0, 1, 2, 28, 29]
    by_or = read_run(run_dir, step_columns=["step"], filters=[[("step", "<", 1)], [("step", ">", 28)]])
    assert by_or.steps["step"].tolist() == [0, 29]


def test_only_asked_columns_are_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = pq.ParquetFile.read_row_groups

    def spy(self: pq.ParquetFile, groups: list[int], columns: list[str]) -> pa.Table:
        asked.append(columns)
        return real(self, groups, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    read_run(run_dir, step_columns=["margin"], request_columns=["request_id"], filters=[("step", "<", 5)])
    assert asked == [["request_id"]] + [["margin", "step"]] * 3


def test_unknown_column(run_dir: Path) -> None:
    with pytest.raises(TraceError, match="unknown column 'marginn'"):
        read_run(run_dir, step_columns=["marginn"])


def test_list_runs_counts_rows(run_dir: Path) -> None:
    [info] = list_runs(run_dir.parent)
    assert (info.step_rows, info.request_rows, info.is_live, info.warnings) == (30, 3, False, ())
    assert info.created is not None
    assert info.manifest["policy"] == "log"


def test_live_reading_while_writing(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path / "later")
    assert follower.poll().steps.empty, "a run that does not exist yet is empty, not an error"
    with TraceWriter(tmp_path, {}, rows_per_file=500, seconds_per_file=0.1) as w:
        follower = RunFollower(w.path, step_columns=["step"])
        stop = threading.Event()

        def work() -> None:
            i = 0
            while not stop.is_set():
                w.add_steps(steps(16, i))
                i += 16
                time.sleep(0.001)

        thread = threading.Thread(target=work)
        thread.start()
        seen: list[int] = []
        polls = 0
        while len(seen) < 3000 or polls < 3:
            part = follower.poll()
            assert part.warnings == []
            polls += bool(len(part.steps))
            seen += part.steps["step"].tolist()
            assert read_run(w.path, step_columns=["step"]).steps["step"].is_monotonic_increasing
            time.sleep(0.02)
        stop.set()
        thread.join()
        assert follower.is_live
    seen += follower.poll().steps["step"].tolist()
    assert polls >= 3
    assert seen == list(range(w.step_rows))
    assert not follower.is_live
    assert follower.poll().steps.empty


def test_follower_says_a_damaged_file_once(run_dir: Path) -> None:
    follower = RunFollower(run_dir)
    follower.poll()
    (run_dir / "steps-000000030-000000039.parquet").write_bytes(b"PAR1")
    assert len(follower.poll().warnings) == 1
    assert follower.poll().warnings == []


@pytest.mark.parametrize(
    "damage", ["truncate", "garbage", "empty", "no_manifest", "bad_manifest", "list_manifest", "temp"]
)
def test_half_written_runs(run_dir: Path, damage: str) -> None:
    middle = run_dir / SECOND
    if damage == "truncate":
        middle.write_bytes(middle.read_bytes()[:-20])
    elif damage == "garbage":
        data = bytearray(middle.read_bytes())
        data[4:400] = bytes(396)  # the footer still reads
        middle.write_bytes(data)
    elif damage == "empty":
        middle.write_bytes(b"")
    elif damage == "temp":
        (run_dir / ".steps-0003.parquet.tmp").write_bytes(b"PAR1")
    elif damage == "no_manifest":
        (run_dir / "manifest.json").unlink()
    else:
        (run_dir / "manifest.json").write_text("{" if damage == "bad_manifest" else "[]")
    [info] = list_runs(run_dir.parent)
    run = read_run(run_dir)
    if damage in ("truncate", "garbage", "empty"):
        assert run.steps["step"].tolist() == [*range(10), *range(20, 30)]
        assert sum(SECOND in w for w in run.warnings) == 1
    else:
        assert len(run.steps) == 30
    if "manifest" in damage:
        assert run.manifest == {}
        assert run.warnings
    if damage == "temp":
        assert run.warnings == []
    assert not info.is_live


def test_only_steps_or_no_files(run_dir: Path) -> None:
    for f in run_dir.glob("requests-*"):
        f.unlink()
    assert read_run(run_dir).requests.empty
    for f in run_dir.glob("steps-*"):
        f.unlink()
    run = read_run(run_dir)
    assert list(run.steps.columns) == STEP_SCHEMA.names
    assert any("no rows" in w for w in run.warnings)
    assert list_runs(run_dir.parent)[0].step_rows == 0


def test_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert list_runs(tmp_path) == []
    assert list_runs(tmp_path / "none") == []
    for name in ("empty", "file", "none"):
        with pytest.raises(TraceError, match="traces/<run>") as e:
            read_run(tmp_path / name)
        assert "\n" not in str(e.value)


def edit_manifest(run_dir: Path, **fields: object) -> None:
    file = run_dir / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest.update(fields)
    file.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_newer_major_is_refused(run_dir: Path) -> None:
    edit_manifest(run_dir, schema_version="3.0")
    with pytest.raises(SchemaVersionError, match=r"schema 3\.0, .* up to 2\.x; upgrade"):
        read_run(run_dir)
    with pytest.raises(SchemaVersionError):
        RunFollower(run_dir).poll()
    [info] = list_runs(run_dir.parent)
    assert "schema 3.0" in info.warnings[0]


def test_newer_major_without_manifest_is_refused_too(run_dir: Path) -> None:
    (run_dir / "manifest.json").unlink()
    for f in run_dir.glob("*.parquet"):
        pq.write_table(pq.read_table(f).replace_schema_metadata({b"margingate_schema": b"3.1"}), f)
    with pytest.raises(SchemaVersionError):
        read_run(run_dir)


def test_other_minor_versions_are_read(run_dir: Path) -> None:
    edit_manifest(run_dir, schema_version="2.7")
    for f in run_dir.glob("steps-*.parquet"):
        table = pq.read_table(f).drop_columns(["hold_ms", "canonical", "dataset"])
        table = table.append_column("from_the_future", pa.array([1] * table.num_rows))
        # Another writer may not use dictionaries or our widths.
        for name, kind in (("step", pa.int64()), ("request_id", pa.string())):
            table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
        pq.write_table(table, f)
    run = read_run(run_dir)
    assert list(run.steps.columns) == STEP_SCHEMA.names
    assert run.steps["hold_ms"].isna().all()
    assert run.steps["canonical"].isna().all()
    assert run.steps["dataset"].isna().all()
    assert (run.steps["step"].dtype, run.steps["request_id"].dtype) == ("int32", "category")
    assert run.warnings == []


def test_crashed_run_is_not_live(run_dir: Path) -> None:
    old = (datetime.now(timezone.utc) - timedelta(seconds=60)).isoformat()
    edit_manifest(run_dir, closed_at=None, heartbeat=old)
    assert not list_runs(run_dir.parent)[0].is_live
    assert any("without closing" in w for w in read_run(run_dir).warnings)
    edit_manifest(run_dir, heartbeat=datetime.now(timezone.utc).isoformat())
    assert list_runs(run_dir.parent)[0].is_live


def test_more_than_9999_files_of_schema_1_keep_their_order(run_dir: Path) -> None:
    for number, file in zip((1, 9999, 10_000), sorted(run_dir.glob("steps-*"))):
        file.rename(run_dir / f"steps-{number:04d}.parquet")
    assert read_run(run_dir).steps["step"].tolist() == list(range(30))


@pytest.mark.parametrize("victims", [[0], [1], [2], [0, 1], [0, 1, 2]])
def test_missing_files_are_noticed(run_dir: Path, victims: list[int]) -> None:
    files = sorted(run_dir.glob("steps-*"))
    for k in victims:
        files[k].unlink()
    run, [info], part = read_run(run_dir), list_runs(run_dir.parent), RunFollower(run_dir).poll()
    assert len(run.steps) == len(part.steps) == info.step_rows == 30 - 10 * len(victims)
    for warnings in (run.warnings, info.warnings):
        [counted] = [w for w in warnings if "the writer counted" in w]
        assert f"30 rows of steps, the files hold {info.step_rows}: {10 * len(victims)} are missing" in counted
    if victims == [1]:
        said = "10 step rows are missing: no file holds rows 10 to 19"
        assert all(said in w for w in (run.warnings, info.warnings, part.warnings))


def test_missing_files_of_schema_1_are_noticed(run_dir: Path) -> None:
    for number, file in enumerate(sorted(run_dir.glob("steps-*"))):
        file.rename(run_dir / f"steps-{number:04d}.parquet")
    (run_dir / "steps-0001.parquet").unlink()
    assert any("30 rows of steps, the files hold 20" in w for w in read_run(run_dir).warnings)
    assert any("30 rows of steps, the files hold 20" in w for w in list_runs(run_dir.parent)[0].warnings)


def test_a_list_reads_no_footer_where_the_writer_counted(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of 20,000 files took 27 s."""
    from sglang_margingate.trace import reader as reader_module

    def refuse(*args: object) -> int:
        raise AssertionError("a footer was read")

    monkeypatch.setattr(reader_module, "_footer_rows", refuse)
    assert [list_runs(run_dir.parent)[0].step_rows, list_runs(run_dir.parent)[0].request_rows] == [30, 3]
    for kind in ("steps", "requests"):
        for number, file in enumerate(sorted(run_dir.glob(f"{kind}-*"))):
            file.rename(run_dir / f"{kind}-{number:04d}.parquet")
    [info] = list_runs(run_dir.parent)
    assert (info.step_rows, info.request_rows, info.warnings) == (30, 3, ())
    monkeypatch.undo()
    damaged = run_dir / "steps-0001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    [info] = list_runs(run_dir.parent)
    assert info.step_rows == 20
    assert any("steps-0001.parquet" in w for w in info.warnings)
    assert any("10 are missing" in w for w in info.warnings)


@pytest.mark.parametrize("what", ["fifo", "link", "folder", "socket"])
def test_what_is_no_file_is_skipped_and_named(run_dir: Path, what: str) -> None:
    """A FIFO hung every reader; a link to a device would."""
    odd = run_dir / "steps-000000030-000000039.parquet"
    if what == "fifo":
        os.mkfifo(odd)
    elif what == "link":
        odd.symlink_to("/dev/zero")
    elif what == "folder":
        odd.mkdir()
    else:
        where = os.open(run_dir, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{where}/{odd.name}")
        os.close(where)
    run, follower = read_run(run_dir), RunFollower(run_dir)
    assert len(run.steps) == len(follower.poll().steps) == 30
    assert [w for w in run.warnings if odd.name in w and "skipped" in w]
    assert [w for w in list_runs(run_dir.parent)[0].warnings if odd.name in w]
    assert follower.poll().warnings == [], "said once"


def test_every_column_is_documented_and_the_readme_is_up_to_date() -> None:
    assert all(c.doc for c in (*STEP_COLUMNS, *schema_module.REQUEST_COLUMNS))
    text = (ROOT / "traces" / "README.md").read_text(encoding="utf-8")
    assert schema_module.with_tables(text) == text, "run: python -m sglang_margingate.trace.schema traces/README.md"


def test_a_run_is_a_folder_with_a_manifest_or_with_rows(tmp_path: Path) -> None:
    for name, file in (("both", SECOND), ("rows", SECOND), ("told", None), ("neither", "notes.txt")):
        (tmp_path / name).mkdir()
        if file is not None:
            (tmp_path / name / file).touch()
        if name in ("both", "told"):
            (tmp_path / name / "manifest.json").touch()
    assert {p.name for p in tmp_path.iterdir() if is_run(p)} == {"both", "rows", "told"}
    assert not is_run(tmp_path / "missing")


def test_a_follower_reads_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {}) as w:
        w.add_steps(steps(4))
        w.add_request({"request": 1, "request_id": "r1"})
        assert w.flush()
        found = RunFollower(w.path, step_columns=["token"], request_columns=["request_id", "request"]).poll()
    assert (list(found.steps), list(found.requests)) == (["token"], ["request_id", "request"])
