"""The trace writer: what it writes, and what it survives."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sglang_margingate.trace import (
    SCHEMA_VERSION,
    STEP_COLUMNS,
    TraceError,
    TraceWriter,
    list_runs,
    read_manifest,
    read_run,
)
from sglang_margingate.trace import tables as tables_module
from sglang_margingate.trace import writer as writer_module
from sglang_margingate.trace.files import own_folder, shared_folder

ROOT = Path(__file__).resolve().parents[2]
NAMES = [c.name for c in STEP_COLUMNS]
FIRST = {
    "request": 3, "request_id": "r0", "dataset": "arith", "step": 0, "position": 7, "time": 1_700_000_000.25, "token": 5,
    "fast_token": 4, "second_token": 5, "margin": 0.0, "threshold": math.nan, "triggered": True, "reason": "margin", "verify_token": 5,
    "verify_margin": 0.125, "flipped": True, "repaired": True, "kv_delta_first": 0.5, "kv_delta_last": 1.0,
    "window_rows": 3, "batch_rows": 16, "padded_rows": 16, "canonical": False, "structural": False, "prefill": False, "step_ms": 2.5,
    "verify_ms": 1.5, "hold_ms": 0.0, "token_text": "é", "forward": 9, "fast_top_tokens": [4, 5],
    "fast_top_logprobs": [-0.5, -1.0], "verify_top_tokens": [5, 4], "verify_top_logprobs": [-0.25, -2.0],
}  # fmt: skip


def row(step: int = 0, **changes: object) -> tuple:
    values = {**FIRST, "step": step, **changes}
    return tuple(values[n] for n in NAMES)


@pytest.fixture
def writer(tmp_path: Path):
    w = TraceWriter(tmp_path, {"model": "/models/tiny net", "policy": "gate"}, seconds_per_file=60)
    yield w
    w.close()


def wait_for(condition) -> None:
    """Wait as long as it takes: what never comes ends at the limit that every test has."""
    while not condition():
        time.sleep(0.02)


def test_values_survive_the_round_trip(writer: TraceWriter) -> None:
    unverified = row(1, request_id="r1", verify_token=None, verify_margin=None, flipped=False, token_text=None)
    writer.add_steps([row(0), unverified])
    writer.add_steps({"request_id": ["r2"], "margin": [1.5]})  # by column; the rest is null
    writer.add_request({"request_id": "r0", "policy": "gate", "time": 1_700_000_000.5, "output_tokens": 2})
    writer.close()
    run = read_run(writer.path)
    assert run.warnings == []
    assert list(run.steps.columns) == NAMES
    first = run.steps.iloc[0].to_dict()
    for name, value in FIRST.items():
        if name == "time":
            assert first[name].timestamp() == value
        elif name == "threshold":
            assert math.isnan(first[name])
        elif isinstance(value, list):
            assert first[name].tolist() == value, name
        else:
            assert first[name] == value, name
    assert run.steps["verify_token"].isna().tolist() == [False, True, True]
    assert run.steps["step"].isna().tolist() == [False, False, True]
    assert str(run.steps["request_id"].dtype) == "category"
    assert run.requests.loc[0, "output_tokens"] == 2
    assert run.requests.loc[0, "time"].timestamp() == 1_700_000_000.5


def test_manifest_and_name(tmp_path: Path) -> None:
    a = TraceWriter(tmp_path / "new", {"model": "/models/tiny net/", "policy": "gate", "odd": Path("/x")})
    b = TraceWriter(tmp_path / "new", {"model": "/models/tiny net/", "policy": "gate"})
    assert a.path != b.path
    assert a.path.name.split("-", 2)[2].startswith(f"tiny_net-gate-{os.getpid()}")
    a.update_manifest(self_test={"ok": True})
    a.add_steps([row()])
    assert a.flush()
    wait_for(lambda: "self_test" in read_manifest(a.path))
    assert [i.is_live for i in list_runs(tmp_path / "new")] == [True, True]
    a.close()
    a.close()
    b.close()
    manifest = read_manifest(a.path)
    assert manifest["closed_at"] >= manifest["created"]
    assert manifest["schema_version"] == SCHEMA_VERSION
    assert manifest["odd"] == "/x"
    assert manifest["totals"]["step_rows"] == 1
    assert not list(a.path.glob(".*"))


def test_rotation_by_rows(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {}, rows_per_file=5000, seconds_per_file=60) as w:
        for i in range(20_000):
            w.add_steps([row(i)])
    files = sorted(w.path.glob("steps-*.parquet"))
    counts = [pq.read_metadata(f).num_rows for f in files]
    assert sum(counts) == 20_000
    assert len(counts) >= 3
    assert all(5000 <= c < 5000 + 2048 for c in counts[:-1])
    assert read_run(w.path).steps["step"].tolist() == list(range(20_000))


def test_rotation_by_seconds(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, {}, seconds_per_file=0.3) as w:
        w.add_steps([row()])
        wait_for(lambda: len(list(w.path.glob("steps-*.parquet"))) == 1)
        w.add_request({"request_id": "r0"})
        wait_for(lambda: len(list(w.path.glob("requests-*.parquet"))) == 1)


def test_stalled_writer_never_blocks_and_counts_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, go = threading.Event(), threading.Event()
    real = tables_module.write_whole

    def stall(*args):
        stalled.set()
        go.wait()
        real(*args)

    monkeypatch.setattr(writer_module, "write_whole", stall)
    w = TraceWriter(tmp_path, {}, ring_rows=1000, seconds_per_file=0.1)
    w.add_steps([row(-1)])
    assert stalled.wait()
    for i in range(500):  # 8,000 rows into a ring of 1,000
        w.add_steps([row(i)] * 16)
    w.add_steps({"step": list(range(1000, 1010))})
    w.add_request({"request_id": "kept"})
    assert w.dropped_rows == 8000 + 10 - 1000
    assert not w.flush(timeout=0.05)
    go.set()
    w.close()
    run = read_run(w.path, step_columns=["step"])
    assert run.steps["step"].tolist()[-10:] == list(range(1000, 1010)), "the oldest go, the newest stay"
    assert len(run.steps) == 1001
    assert len(run.requests) == 1
    assert run.manifest["totals"]["dropped_rows"] == 7010
    assert any("7,010" in line for line in run.warnings)


def test_one_chunk_above_the_ring(tmp_path: Path) -> None:
    ring = writer_module.StepRing(10)
    ring.append([(i,) for i in range(25)])
    assert (len(ring), ring.dropped) == (10, 15)
    assert ring.take(100) == ([[(i,) for i in range(15, 25)]], 10)


def test_rows_that_do_not_fit_are_counted_not_raised(writer: TraceWriter, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        for bad in (
            [row()[:-1]],
            {"nonsense": [1]},
            [row(token="text")],
            {"step": [1, 2], "token": [1]},
            [row(token=2**70)],
            [None],
        ):
            writer.add_steps(bad)
            assert writer.flush()
        writer.add_steps([row()])
        writer.add_request({"request_id": "good"})
        writer.add_request({"request_id": "bad", "no_such": 1})
        writer.close()
    assert writer.dropped_rows == 7
    assert writer.dropped_requests == 1
    assert (writer.step_rows, writer.request_rows) == (1, 1)
    assert len(caplog.records) == 1


def test_disk_full_then_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = tables_module.pq.write_table
    full = True

    def write_table(table, where, **options):
        if full:
            Path(where).write_bytes(b"PAR1 half")
            raise OSError(28, "No space left on device")
        real(table, where, **options)

    monkeypatch.setattr(tables_module.pq, "write_table", write_table)
    w = TraceWriter(tmp_path, {}, seconds_per_file=60)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            w.add_steps([row(), row()])
            w.add_request({"request_id": "waits"})
            assert w.flush()
        assert w.dropped_rows == 6
        assert w.write_errors == 6  # steps and requests, each of three times
        assert not list(w.path.glob(".steps*"))
        full = False
        w.add_steps([row()])
        assert w.flush()
        assert w.dropped_rows == 6
        w.close()
    assert len(caplog.records) == 2, "one warning when it fails, one when it recovers"
    assert "No space left on device" in caplog.text
    run = read_run(w.path)
    assert len(run.steps) == 1
    assert len(run.requests) == 3, "request rows wait for the disk"


def test_folder_removed_while_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TraceWriter(tmp_path / "t", {"model": "m"}, seconds_per_file=60) as w:
        w.add_steps([row(0)])
        assert w.flush()
        shutil.rmtree(tmp_path / "t")
        w.add_steps([row(1)])
        assert w.flush()
    run = read_run(w.path)
    assert run.steps["step"].tolist() == [1]
    assert run.manifest["model"] == "m"


def test_folder_replaced_by_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TraceWriter(tmp_path / "t", {}, seconds_per_file=60) as w, caplog.at_level(logging.WARNING):
        shutil.rmtree(tmp_path / "t")
        (tmp_path / "t").write_text("in the way")
        for _ in range(2):
            w.add_steps([row()])
            assert w.flush()
        assert w.dropped_rows == 2
        assert w.write_errors == 2
        assert len(caplog.records) == 1


def test_unwritable_at_start_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"cannot write traces in .*file/below: .*--margingate-trace-dir") as e:
        TraceWriter(tmp_path / "file" / "below", {})
    assert "\n" not in str(e.value)


def test_import_is_light() -> None:
    code = "import sys, sglang_margingate.trace.writer; assert not {'pandas', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


CRASHER = """
import sys, time
from sglang_margingate.trace import TraceWriter
sys.path.insert(0, "tests/unit")
w = TraceWriter(sys.argv[1], {"model": "m", "policy": "gate"}, rows_per_file=3000, seconds_per_file=0.2)
row = eval(sys.argv[2], {"nan": float("nan")})
step = 0
while True:
    w.add_steps([(*row[:3], step + i, *row[4:]) for i in range(16)])
    step += 16
    if step % 800 == 0:
        w.add_request({"request_id": str(step)})
    time.sleep(0.0002)
"""


@pytest.mark.parametrize("delay", [0.0, 0.13, 0.41])
def test_kill_9_loses_only_the_open_file(tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-c", CRASHER, str(tmp_path), repr(row())]
    with subprocess.Popen(command, cwd=ROOT) as child:
        try:
            wait_for(lambda: len(list(tmp_path.glob("*/steps-*.parquet"))) >= 3)
            wait_for(lambda: list_runs(tmp_path)[0].step_rows >= 3000)  # a loaded machine writes smaller files
            time.sleep(delay)
        finally:
            child.send_signal(signal.SIGKILL)
    [info] = list_runs(tmp_path)
    assert [w for w in info.warnings if "stopped without closing" not in w] == []
    run = read_run(info.path)
    assert len(run.steps) == info.step_rows >= 3000
    assert run.steps["step"].tolist() == list(range(info.step_rows)), "no gap among the closed files"
    assert len(run.requests) == info.request_rows
    assert "closed_at" not in run.manifest
    for file in info.path.glob("*.parquet"):
        pq.read_table(file)
    json.loads((info.path / "manifest.json").read_text())


def test_folders_are_the_owners_alone_and_named_in_order(tmp_path: Path) -> None:
    assert [own_folder(tmp_path, "r").name for _ in range(3)] == ["r", "r-2", "r-3"]
    run = tmp_path / "shared"
    assert shared_folder(run, 0) == shared_folder(run, 0) == run, "any writer may be the first"
    assert shared_folder(run, 2) == run / "scheduler-2"
    with pytest.raises(FileExistsError):
        shared_folder(run, 2)
    made = [tmp_path / "r", tmp_path / "r-2", run, run / "scheduler-2"]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}


def test_totals_name_what_they_count(writer: TraceWriter) -> None:
    assert writer.totals() == {
        "step_rows": 0, "request_rows": 0, "dropped_rows": 0, "dropped_requests": 0, "write_errors": 0, "files": 0,
    }  # fmt: skip
    writer.add_steps({"step": [1, 2]})
    writer.add_request({"request": 1})
    assert writer.flush()
    assert writer.totals() == {
        "step_rows": 2, "request_rows": 1, "dropped_rows": 0, "dropped_requests": 0, "write_errors": 0, "files": 2,
    }  # fmt: skip


def test_a_run_says_who_writes_it_before_anything_is_written(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "deep" / "er", {"model": "m"}) as w:
        first = read_manifest(w.path)
    assert (first["pid"], first["run"], first["totals"]["step_rows"]) == (os.getpid(), w.path.name, 0)
    assert set(first["totals"]) == set(w.totals())
