"""Manifests that no writer of ours wrote: that run is broken, with its reason, and all others work."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from sglang_margingate.cli import main
from sglang_margingate.trace import RunFollower, TraceError, TraceWriter, list_runs, read_manifest, read_run
from sglang_margingate.trace.manifest import is_live, write_manifest

GOOD = {"schema_version": "2.0", "run": "x", "created": "2026-01-01T00:00:00Z", "closed_at": "2026-01-01T00:00:09Z"}
BAD = {
    "wrong type": (json.dumps({**GOOD, "model": ["a"]}), "model: expected `str`"),
    "wrong count": (json.dumps({**GOOD, "totals": {"step_rows": "many"}}), "totals[...]: expected `int`"),
    "negative count": (json.dumps({**GOOD, "totals": {"step_rows": -1}}), "totals[...]: expected `int` >= 0"),
    "time": (json.dumps({**GOOD, "heartbeat": 12}), "heartbeat: expected `str`"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep and valid": ('{"a": ' + "[" * 300 + "]" * 300 + "}", "nested more than 64 levels"),
    "long number": ('{"threshold": ' + "1" * 401 + "}", "a number of 401 characters"),
    "large number": ('{"threshold": 1e999}', "out of range (1e999)"),
    "NaN": ('{"threshold": NaN}', "NaN is not a JSON number"),
    "list": ("[1, 2]", "a JSON object was expected, found list"),
    "half": ('{"schema_version": "2.', "not valid JSON"),
    "not text": ("\udcff", "can't decode"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("bad", "good"):
        with TraceWriter(tmp_path / "made", {"model": "m", "policy": "log"}, seconds_per_file=60) as w:
            w.add_steps({"request": [1, 1], "request_id": ["r", "r"], "step": [0, 1], "margin": [1.0, 2.0],
                         "time": [1e9, 1e9 + 1], "flipped": [False, False], "triggered": [False, False]})  # fmt: skip
            w.add_request({"request": 1, "request_id": "r", "time": 1e9, "output_tokens": 2})
        (tmp_path / "traces").mkdir(exist_ok=True)
        shutil.move(w.path, tmp_path / "traces" / name)
    return tmp_path / "traces"


@pytest.mark.parametrize("case", BAD)
def test_a_broken_manifest_costs_its_run_alone(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, reason = BAD[case]
    (folder / "bad" / "manifest.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(TraceError, match=re.escape(reason)) as e:
        read_manifest(folder / "bad")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500
    states = {info.name: info.state for info in list_runs(folder)}
    assert states == {"bad": "broken", "good": "closed"}
    run = read_run(folder / "bad")
    assert (len(run.steps), run.manifest) == (2, {})
    assert any(reason in w for w in run.warnings)
    assert len(RunFollower(folder / "bad").poll().steps) == 2
    assert main(["runs", str(folder)]) == 0
    shown = capsys.readouterr()
    assert re.search(r"^bad .* broken$", shown.out, re.M)
    assert re.search(r"^good .* closed$", shown.out, re.M)
    assert reason in shown.err, "the list says what is wrong"
    assert str(folder) not in shown.err, "of the run by its name"
    assert main(["export", str(folder / "bad"), "--csv", str(folder.parent / "out")]) == 0
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("what", ["fifo", "link", "folder", "huge"])
def test_a_manifest_that_is_no_plain_file(folder: Path, what: str) -> None:
    """A FIFO would wait for a writer for ever."""
    file = folder / "bad" / "manifest.json"
    file.unlink()
    if what == "fifo":
        os.mkfifo(file)
    elif what == "link":
        file.symlink_to("/dev/zero")
    elif what == "folder":
        file.mkdir()
    else:
        file.touch()
        os.truncate(file, 2**40)
    assert {info.name: info.state for info in list_runs(folder)} == {"bad": "broken", "good": "closed"}
    assert len(read_run(folder / "bad").steps) == 2


def test_a_writer_never_writes_a_number_that_readers_refuse(tmp_path: Path) -> None:
    write_manifest(tmp_path, {**GOOD, "threshold": math.nan, "self_test": {"trials": [math.inf, 1.0]}})
    found = read_manifest(tmp_path)
    assert (found["threshold"], found["self_test"]) == (None, {"trials": [None, 1.0]})


def test_a_heartbeat_from_the_future_is_no_life(tmp_path: Path) -> None:
    assert not is_live({"heartbeat": (datetime.now(timezone.utc) + timedelta(days=1)).isoformat()})


def test_fields_of_a_newer_minor_version_are_kept(tmp_path: Path) -> None:
    write_manifest(tmp_path, {**GOOD, "schema_version": "2.9", "from_the_future": [1]})
    assert read_manifest(tmp_path)["from_the_future"] == [1]


def test_runs_can_merge_small_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa

    from sglang_margingate.trace.compact import name_of
    from sglang_margingate.trace.tables import steps_batch
    from sglang_margingate.trace.writer import write_whole

    table = pa.Table.from_batches([steps_batch([{"step": [2, 3]}])])
    write_whole(table, folder / "good" / name_of("steps", 2, 3))
    assert main(["runs", "--compact", str(folder)]) == 0
    assert "good: 3 files merged into 2" in capsys.readouterr().out
    assert read_run(folder / "good").steps["step"].tolist() == [0, 1, 2, 3]
