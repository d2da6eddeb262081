"""The traces folder within its limits: what goes, and what never does."""

from __future__ import annotations

import inspect
import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_margingate.config import MarginGateConfig, parse_keep
from sglang_margingate.serving import setup
from sglang_margingate.trace import TraceError, TraceWriter, list_runs
from sglang_margingate.trace import retention as retention_module
from sglang_margingate.trace.manifest import read_manifest, write_manifest
from sglang_margingate.trace.retention import limit_folder

DAY = 86_400.0


@dataclass(frozen=True)
class Keep:
    """Limits, as the server's configuration gives them."""

    age_seconds: float | None = None
    bytes: float | None = None

    def __str__(self) -> str:
        return f"{self.age_seconds} s, {self.bytes} bytes"


def iso(seconds_ago: float) -> str:
    return datetime.fromtimestamp(time.time() - seconds_ago, timezone.utc).isoformat()


def a_run(
    folder: Path, name: str, *, ended: float | None, beat: float = 0.0, size: int = 1000, **fields: object
) -> Path:
    """Write a run that ended some seconds ago, or (None) was never closed and was silent for `beat` seconds."""
    path = folder / name
    path.mkdir(parents=True)
    manifest = {"schema_version": "2.0", "run": name, "created": iso(9 * DAY), "heartbeat": iso(beat), **fields}
    if ended is not None:
        manifest["closed_at"] = iso(ended)
    write_manifest(path, manifest)
    (path / "steps-000000000-000000009.parquet").write_bytes(bytes(size))
    (path / ".steps-000000010-000000019.parquet.tmp").write_bytes(b"")
    return path


def left(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_old_runs_go_and_live_ones_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_run(tmp_path, "old", ended=3 * DAY)
    a_run(tmp_path, "young", ended=0.5 * DAY)
    a_run(tmp_path, "dead", ended=None, beat=2 * DAY)
    a_run(tmp_path, "live", ended=None, beat=1.0)
    a_run(tmp_path, "silent", ended=None, beat=600.0)
    own = a_run(tmp_path, "own", ended=5 * DAY)
    with caplog.at_level(logging.INFO):
        removed = limit_folder(tmp_path, Keep(DAY), own)
    assert [r.path.name for r in removed] == ["old", "dead"], "the oldest first"
    assert left(tmp_path) == {"young", "live", "silent", "own"}
    assert sum("removed run" in r.getMessage() and "86400.0 s" in r.getMessage() for r in caplog.records) == 2


def test_too_much_goes_oldest_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for day in range(5):
        a_run(tmp_path, f"day{day}", ended=day * DAY + 1, size=1_000_000)
    a_run(tmp_path, "live", ended=None, size=1_000_000)
    limit_folder(tmp_path, Keep(None, 3.2e6))
    assert left(tmp_path) == {"day0", "day1", "live"}, "live ones count, and stay"
    limit_folder(tmp_path, Keep(None, 0.5e6))
    assert left(tmp_path) == {"live"}
    assert "above --margingate-trace-keep None s, 500000.0 bytes" in caplog.text


@pytest.mark.parametrize(
    "why",
    ["renamed", "no_manifest", "broken", "deep", "foreign", "note", "subfolder", "link", "linked_manifest", "a_file"],
)
def test_what_is_never_removed(tmp_path: Path, why: str) -> None:
    """Somebody's own things may lie in or beside the folder of runs."""
    traces, outside = tmp_path / "traces", tmp_path / "outside"
    path = a_run(outside if why == "link" else traces, "old", ended=9 * DAY)
    traces.mkdir(exist_ok=True)
    if why == "renamed":
        path = path.rename(traces / "kept-by-hand")
    elif why == "no_manifest":
        (path / "manifest.json").unlink()
    elif why == "broken":
        (path / "manifest.json").write_text('{"closed_at": 7}')
    elif why == "deep":
        (path / "manifest.json").write_text("[" * 100_000)
    elif why == "foreign":
        (path / "manifest.json").write_text('{"run": "old", "closed_at": "2020-01-01T00:00:00Z"}')
    elif why == "note":
        (path / "notes.txt").write_text("do not lose me")
    elif why == "subfolder":
        (path / "more").mkdir()
    elif why == "link":
        (traces / "old").symlink_to(path)
    elif why == "linked_manifest":
        (path / "manifest.json").rename(tmp_path / "manifest.json")
        (path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    else:
        (traces / "manifest.json").write_text("{}")
        path = traces / "manifest.json"
        limit_folder(traces, Keep(60))
        assert left(traces) == {"manifest.json"}
        return
    before = sorted(p.name for p in path.iterdir())
    assert limit_folder(traces, Keep(60, 1e6)) == []
    assert sorted(p.name for p in path.iterdir()) == before


def test_a_link_within_a_run_goes_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "precious.parquet").write_text("precious")
    path = a_run(tmp_path / "traces", "old", ended=9 * DAY)
    (path / "steps-000000010-000000019.parquet").symlink_to(tmp_path / "precious.parquet")
    assert limit_folder(tmp_path / "traces", Keep(DAY))
    assert (tmp_path / "precious.parquet").read_text() == "precious"
    assert left(tmp_path / "traces") == set()


def test_a_removal_cut_short_is_finished_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_run(tmp_path, "old", ended=9 * DAY)
    real = os.unlink

    def stop(name: str, **kwargs: int) -> None:
        if name == "manifest.json":
            raise PermissionError(13, "Permission denied")
        real(name, **kwargs)

    monkeypatch.setattr(retention_module.os, "unlink", stop)
    assert limit_folder(tmp_path, Keep(DAY)) == []
    assert [p.name for p in path.iterdir()] == ["manifest.json"]
    monkeypatch.undo()
    assert len(limit_folder(tmp_path, Keep(DAY))) == 1


def test_the_writer_does_it_at_start_and_hourly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(tmp_path, "old", ended=3 * DAY)
    done = threading.Event()
    real = retention_module.limit_folder

    def limit(*args: object) -> None:
        real(*args)
        done.set()

    from sglang_margingate.trace import writer as writer_module

    monkeypatch.setattr(writer_module, "limit_folder", limit)
    with TraceWriter(tmp_path, {"model": "m"}, keep=Keep(DAY)) as w:
        assert done.wait()
        assert left(tmp_path) == {w.path.name}
        done.clear()
        a_run(tmp_path, "later", ended=3 * DAY)
        w._limited_at -= 3601
        assert done.wait()
        assert left(tmp_path) == {w.path.name}
    assert read_manifest(w.path)["run"] == w.path.name
    assert len(list_runs(tmp_path)) == 1


def test_no_limit_removes_nothing(tmp_path: Path) -> None:
    a_run(tmp_path, "old", ended=900 * DAY)
    assert limit_folder(tmp_path, Keep()) == []
    assert limit_folder(tmp_path / "absent", Keep(DAY)) == []
    with pytest.raises(TraceError):
        read_manifest(tmp_path)


def test_the_flag_is_what_the_writer_goes_by(tmp_path: Path) -> None:
    """From ``--margingate-trace-keep`` to the folder."""
    a_run(tmp_path, "old", ended=3 * DAY)
    a_run(tmp_path, "young", ended=0.5 * DAY)
    assert [r.path.name for r in limit_folder(tmp_path, parse_keep("1d,1GB"))] == ["old"]


def test_the_server_hands_its_limits_to_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr("sglang_margingate.trace.TraceWriter", lambda *args, **kwargs: given.append(kwargs["keep"]))
    monkeypatch.setattr(setup, "run_facts", lambda *args: {})
    monkeypatch.setattr(setup.sgl, "tp_rank", lambda: 0)
    config = MarginGateConfig(trace_dir=str(tmp_path), trace_keep=parse_keep("2d"))
    scheduler = SimpleNamespace(server_args=None)
    arguments = [config, scheduler, *[None] * (len(inspect.signature(setup._writer).parameters) - 2)]
    setup._writer(*arguments)
    assert given == [parse_keep("2d")]


def size_of(run: Path) -> int:
    return sum(file.stat().st_size for file in run.iterdir())


def test_a_folder_of_exactly_the_limit_keeps_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [a_run(tmp_path, name, ended=end) for name, end in (("a", 300.0), ("b", 200.0))]
    (runs[0] / "steps-000000010-000000019.parquet").symlink_to(
        "/dev/null"
    )  # a link has no bytes of its own to give back
    whole = sum(
        (run / name).stat().st_size for run in runs for name in os.listdir(run) if not (run / name).is_symlink()
    )
    with caplog.at_level(logging.INFO):
        assert limit_folder(tmp_path, Keep(None, whole)) == []
        assert caplog.records == []
        (gone,) = limit_folder(tmp_path, Keep(None, whole - 1))
    assert (gone.path.name, gone.size) == ("a", size_of(runs[1]))
    assert [record.getMessage() for record in caplog.records] == [
        f"margingate trace: removed run a ({gone.size / 1e6:.1f} MB): beyond the size of --margingate-trace-keep "
        f"None s, {whole - 1} bytes"
    ]


def test_the_age_of_a_run_is_judged_at_the_moment_that_is_asked_about(tmp_path: Path) -> None:
    run = a_run(tmp_path, "a", ended=300.0)
    ended = datetime.fromisoformat(str(read_manifest(run)["closed_at"])).timestamp()
    assert limit_folder(tmp_path, Keep(DAY), now=ended + DAY) == [], "not older than the limit"
    assert [r.path.name for r in limit_folder(tmp_path, Keep(DAY), now=ended + DAY + 1)] == ["a"]


def test_what_cannot_be_brought_within_the_limit_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_run(tmp_path, "live", ended=None, size=2_000_000)
    with caplog.at_level(logging.INFO):
        assert limit_folder(tmp_path, Keep(None, 1e6)) == []
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{tmp_path} holds 2.0 MB, above --margingate-trace-keep None s, 1000000.0 bytes" in record.getMessage()
    assert limit_folder(tmp_path / "nowhere", Keep(None, 1.0)) == []


def test_a_link_to_a_run_is_none_of_the_folders(tmp_path: Path) -> None:
    elsewhere = a_run(tmp_path / "elsewhere", "old", ended=9 * DAY)
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "old").symlink_to(elsewhere)
    assert limit_folder(tmp_path / "traces", Keep(DAY)) == []
    assert (elsewhere / "manifest.json").exists()


def test_the_log_says_which_limit_a_run_was_beyond(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    a_run(tmp_path, "old", ended=3 * DAY)
    a_run(tmp_path, "large", ended=60.0, size=1_000_000)
    with caplog.at_level(logging.INFO):
        limit_folder(tmp_path, Keep(DAY, 1000.0))
    assert [r.getMessage().partition(" --margingate")[0] for r in caplog.records] == [
        "margingate trace: removed run old (0.0 MB): older than",
        "margingate trace: removed run large (1.0 MB): beyond the size of",
    ]


def test_what_a_link_leads_to_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(100_000))
    run = a_run(tmp_path / "runs", "r", ended=60.0, size=10)
    plain = sum(p.stat().st_size for p in run.iterdir())
    (run / "steps-000000010-000000019.parquet").symlink_to(tmp_path / "large")
    names, size = retention_module._content(run)
    assert (len(names), size) == (4, plain)


def test_a_file_that_is_gone_already_does_not_keep_the_others(tmp_path: Path) -> None:
    run = a_run(tmp_path, "r", ended=60.0)
    names = ("steps-gone.parquet", *(p.name for p in run.iterdir()))
    assert retention_module._remove(retention_module.OldRun(run, 0.0, 0, ((run, names),)))
    assert not run.exists()
