"""Several schedulers of one server: who attested, who lives, what they say as one, and the run that they share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_margingate.config import CONFIG_ENV, ConfigError, MarginGateConfig, Policy
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Opened, Requests
from sglang_margingate.serving.several import launch
from sglang_margingate.serving.several.schedulers import Scheduler, attest, attested, different, merged, missing, watch
from sglang_margingate.settings import several
from sglang_margingate.trace import RunFollower, TraceWriter, list_runs, read_run
from sglang_margingate.trace.compact import compact
from sglang_margingate.trace.manifest import read_manifest, write_manifest
from sglang_margingate.trace.retention import limit_folder

STAMP = "20261127-004500/77"


def a_step(number: int) -> dict[str, Any]:
    return {"request": [number], "request_id": [f"r{number}"], "step": [0]}


def a_request(number: int) -> dict[str, Any]:
    return {"request": number, "request_id": f"r{number}"}


# ---- attesting and living ---------------------------------------------------------------------------------------------


def test_every_process_of_every_scheduler_must_attest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "config.json"))
    assert missing(2, 1, attested()) == ["0", "1"]
    attest(1, 0, "abc")
    assert attested() == [Scheduler(1, 0, os.getpid(), "abc")]
    assert missing(2, 1, attested()) == ["0"]
    attest(0, 0)
    assert missing(2, 1, attested()) == []
    assert missing(2, 2, attested()) == ["0.1", "1.1"]
    assert different(attested()) == 1, "its answers would have other bits"
    attest(0, 0, "abc")
    assert different(attested()) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "config.json"))
    return tmp_path


def scheduler(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    """Start a process that attests, serves until it is interrupted, and says when it has closed."""
    code = (
        "import sys, time\n"
        "from multiprocessing.util import _exit_function\n"
        "from sglang_margingate.serving.several.schedulers import attest\n"
        f"attest({rank}, 0)\n"
        "try:\n    time.sleep(600)\n"
        f"except KeyboardInterrupt:\n    open(r'{folder}/closed-{rank}', 'w').close()\n"
    )
    return subprocess.Popen([sys.executable, "-c", code])


def until(holds: Any) -> None:
    """Wait as long as it takes: what never comes ends at the limit that every test has."""
    while not holds():
        time.sleep(0.05)


def test_a_killed_scheduler_is_named_the_others_close_and_the_server_ends(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    children = [scheduler(folder, rank) for rank in range(2)]
    until(lambda: len(attested()) == 2)
    ended: list[bool] = []
    thread = watch(attested(), lambda: ended.append((folder / "closed-0").exists()), 0.05)
    time.sleep(0.3)
    assert thread.is_alive()
    children[1].kill()  # a zombie, as nobody asks for its status
    until(lambda: bool(ended))
    thread.join()
    assert ended == [True], "the server ended before the other scheduler had closed"
    assert f"scheduler 1 (rank 0, process {children[1].pid}) has ended" in caplog.text
    for child in children:
        child.wait()


def test_a_scheduler_that_ends_by_itself_is_no_news(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = scheduler(folder, 0)
    until(lambda: len(attested()) == 1)
    ended: list[bool] = []
    watch(attested(), lambda: ended.append(True), 0.05)
    child.send_signal(signal.SIGINT)
    child.wait()
    time.sleep(0.5)
    assert not ended
    assert "has ended" not in caplog.text


# ---- status -----------------------------------------------------------------------------------------------------------


def state(rank: int, of: int = 2) -> dict[str, Any]:
    return {
        "policy": "gate", "scheduler": {"dp_rank": rank, "of": of, "pid": 10 + rank}, "ranks": [{"rank": 0}],
        "totals": {"steps": 10 + rank, "verify_ms": 0.5}, "verifier": {"passes": 2}, "uptime_seconds": 1.0, "host": {"decode": {"mean_us": 100.0 + rank}},
        "missed": {"missed": 0, "checked": 50, "upper_95": 0.06}, "notes": ["both", f"of {rank}"],
        "batch_rows": {"now": 1, "max": 4 + rank, "steps_by_rows": {"1": 3, str(4 + rank): 2}},
        "trace": {"path": f"run/{rank}", "dropped_rows": rank, "write_errors": 0},
    }  # fmt: skip


def test_counts_add_up_and_each_scheduler_is_shown() -> None:
    one = merged([state(0), state(1)])
    assert "host" not in one, "each has a thread of its own"
    assert [each["host"]["decode"]["mean_us"] for each in one["schedulers"]] == [100.0, 101.0]
    assert one["totals"] == {"steps": 21, "verify_ms": 1.0}
    assert one["verifier"] == {"passes": 4}
    assert one["batch_rows"] == {"now": 2, "max": 5, "steps_by_rows": {"1": 6, "4": 2, "5": 2}}
    assert one["missed"]["checked"] == 100
    assert one["missed"]["upper_95"] == pytest.approx(0.0295, abs=1e-3), "the bound of all that was checked"
    assert one["notes"] == ["both", "of 0", "of 1"]
    assert one["trace"] == {"path": "run/0", "dropped_rows": 1, "write_errors": 0}
    assert [each["scheduler"]["pid"] for each in one["schedulers"]] == [10, 11]
    assert merged([state(0, of=1)]) == state(0, of=1)


# ---- numbers and metrics ----------------------------------------------------------------------------------------------


def test_no_two_schedulers_give_a_request_the_same_number() -> None:
    config, metrics = MarginGateConfig(policy=Policy.GATE), Metrics(False, "m")
    numbers = []
    for rank in range(3):
        recorder = Recorder(SimpleNamespace(late=False), None, metrics)  # type: ignore[arg-type]
        requests = Requests(config, recorder, Labels(config, recorder, metrics), None, schedulers=(rank, 3))
        numbers.append([requests.open(Opened(f"r{k}", None, True)).ledger.number for k in range(3)])
        assert requests.open(Opened("HEALTH_CHECK_1", None, True)).hidden
    assert numbers == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]


def test_several_schedulers_have_a_label_of_their_own() -> None:
    code = (
        "from sglang_margingate.runtime.metrics import Metrics\n"
        "from prometheus_client import generate_latest\n"
        "import sys\n"
        "Metrics(True, 'm', None if sys.argv[1] == '-' else int(sys.argv[1])).step(True, False, False)\n"
        "print(generate_latest().decode())"
    )
    for rank, wanted in (
        ("1", 'margingate_steps_total{dp_rank="1",model_name="m"} 1.0'),
        ("-", 'margingate_steps_total{model_name="m"} 1.0'),
    ):
        done = subprocess.run([sys.executable, "-c", code, rank], capture_output=True, text=True, check=True)
        assert wanted in done.stdout


# ---- one run ----------------------------------------------------------------------------------------------------------


def write(folder: Path, rows: tuple[int, ...] = (3, 2)) -> Path:
    """Write a run by two schedulers, whose requests have odd and even numbers."""
    writers = []
    for part, count in enumerate(rows):
        manifest = {"model": "m", "policy": "gate", "scheduler": {"dp_rank": part, "of": 2}}
        writer = TraceWriter(folder, manifest, stamp=STAMP, part=part)
        for k in range(count):
            number = 2 * k + part + 1
            writer.add_steps(a_step(number))
            writer.add_request(a_request(number))
        writers.append(writer)
    for writer in writers:
        writer.close()
    return writers[0].path


def test_one_run_folder_is_read_as_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert path.name == "20261127-004500-m-gate-77"
    assert sorted(p.name for p in path.iterdir() if p.is_dir()) == ["scheduler-1"]
    run = read_run(path)
    assert sorted(run.requests["request"]) == [1, 2, 3, 4, 5]
    assert sorted(run.steps["request"]) == [1, 2, 3, 4, 5]
    assert run.warnings == []
    assert run.manifest["totals"]["step_rows"] == 5
    assert [each["scheduler"]["dp_rank"] for each in run.manifest["schedulers"]] == [0, 1]
    (info,) = list_runs(tmp_path)
    assert (info.step_rows, info.request_rows, info.state, info.warnings) == (5, 5, "closed", ())


def test_a_live_run_of_several_is_followed(tmp_path: Path) -> None:
    writers = [TraceWriter(tmp_path, {"model": "m"}, stamp=STAMP, part=part) for part in range(2)]
    follower = RunFollower(writers[0].path)
    seen: list[int] = []
    for turn in range(2):
        for part, writer in enumerate(writers):
            writer.add_request(a_request(2 * turn + part + 1))
            assert writer.flush()
        seen += list(follower.poll().requests["request"])
        assert follower.is_live
    assert seen == [1, 2, 3, 4], "each row once"
    writers[0].close()
    follower.poll()
    assert follower.is_live, "the other writer lives"
    writers[1].close()
    follower.poll()
    assert not follower.is_live
    assert follower.manifest["closed_at"]


def test_the_trace_of_the_other_stays_whole_when_one_is_killed(tmp_path: Path) -> None:
    path = write(tmp_path)
    killed = {**read_manifest(path / "scheduler-1"), "heartbeat": "2026-01-01T00:00:00.000Z"}
    del killed["closed_at"]
    write_manifest(path / "scheduler-1", killed)
    run = read_run(path)
    assert len(run.requests) == 5
    assert [w for w in run.warnings if "without closing" in w and "scheduler-1" in w]
    (info,) = list_runs(tmp_path)
    assert info.state == "ended without closing"


def test_old_runs_of_several_are_removed_whole(tmp_path: Path) -> None:
    path = write(tmp_path)
    other = write(tmp_path / "others")
    (other / "scheduler-1" / "notes.txt").write_text("mine")
    keep: Any = SimpleNamespace(age_seconds=60.0, bytes=None)
    assert [run.path for run in limit_folder(tmp_path, keep, now=time.time() + 3600)] == [path]
    assert not path.exists()
    assert limit_folder(tmp_path / "others", keep, now=time.time() + 3600) == []
    assert read_run(other).manifest


def test_files_of_all_writers_are_merged(tmp_path: Path) -> None:
    writers = [TraceWriter(tmp_path, {"model": "m"}, stamp=STAMP, part=part, rows_per_file=1) for part in range(2)]
    for writer in writers:
        for k in range(3):
            writer.add_request(a_request(k + 1))
            assert writer.flush()
    before, after = compact(writers[0].path, 100)
    assert (before, after) == (6, 2)
    for writer in writers:
        writer.close()


@pytest.mark.parametrize("verifies", [True, False])
def test_what_several_gpus_need_is_set_before_the_schedulers_start(
    monkeypatch: pytest.MonkeyPatch, verifies: bool
) -> None:
    model = SimpleNamespace(num_attention_heads=32, get_total_num_kv_heads=lambda: 8, hidden_size=4096)
    monkeypatch.setattr(launch.sgl, "model_config", lambda _args: model)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 8)
    for name in (launch.RUN_ENV, several.PULL, *several.FIXED):
        monkeypatch.setenv(name, "kept")  # so that the test leaves nothing behind
        monkeypatch.delenv(name)
    args = SimpleNamespace(tp_size=4, dp_size=2, device="cuda", chunked_prefill_size=8192, max_prefill_tokens=16384)
    launch.prepare(args, args, verifies)
    assert os.environ[launch.RUN_ENV].endswith(f"/{os.getpid()}")
    assert (os.environ.get(several.PULL) == "65536") is verifies, "a server that only looks on stays SGLang's own"
    args.dp_size = 1
    launch.prepare(args, args, verifies)
    assert launch.RUN_ENV not in os.environ
    args.tp_size = 5
    if verifies:
        with pytest.raises(ConfigError, match="--tp-size 5"):
            launch.prepare(args, args, verifies)
