"""Starting and stopping servers: no process is left, and a dead server says why. Real ones are in tests/server."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from sglang_margingate.bench.evidence.record import measure_all
from sglang_margingate.bench.servers import process as module
from sglang_margingate.bench.servers.client import ServerError
from sglang_margingate.bench.servers.process import cause, check_port, free_port, serve, stop


@dataclass
class Outcome:
    """What a measurement gives."""

    number: int


FAMILY = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_stop_ends_children_in_other_groups_and_those_that_ignore_sigint(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    stop(parent)
    assert parent.poll() is not None
    while child.is_running() and child.status() != "zombie":
        time.sleep(0.05)


def test_a_second_ctrl_c_in_the_midst_of_stopping_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    wait, waited = parent.wait, []

    def interrupted(timeout: float | None = None) -> int:
        waited.append(timeout)
        if len(waited) == 1:
            raise KeyboardInterrupt
        return wait(timeout)

    monkeypatch.setattr(parent, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stop(parent)
    assert waited[0] == module.STOP_SECONDS
    assert parent.poll() is not None
    while child.is_running() and child.status() != "zombie":
        time.sleep(0.05)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_measurement_ends_the_servers_of_its_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jobs: int
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    assert parent.stdout.readline()
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(module, "_running", [module.Server("http://127.0.0.1:1", tmp_path / "log", parent)])
    begun, out, main = [], tmp_path / "out.json", threading.main_thread().ident or 0

    def measure(number: int) -> Outcome:
        begun.append(number)
        if number == 0:
            return Outcome(0)
        if number == 1:
            while not out.exists():  # the first is on disk
                time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)  # only the main thread hears of it; this one waits
        parent.wait()
        raise ServerError("connection refused")

    with pytest.raises(KeyboardInterrupt):
        measure_all(measure, [0, 1, 2, 3], jobs, out)
    assert parent.poll() is not None
    assert [o["number"] for o in json.loads(out.read_text())["outcomes"]] == [0], "what was measured is kept"
    assert 3 not in begun


def test_dead_server_says_why(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with pytest.raises(ServerError, match="the server died") as error, serve(["--margingate-policy", "x"], log=log):
        pass
    assert "\n" not in str(error.value)
    assert "invalid choice: 'x'" in str(error.value)


def test_cause_is_the_last_error_else_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert cause(log) == "nothing was logged"
    log.write_text("starting\n[2026-11-22 20:00:00] ValueError: too long\n[2026-11-22 20:00:01] Received sigquit\n")
    assert cause(log) == "ValueError: too long"
    disabled = "OpenAI Responses API (/v1/responses) disabled: init failed (ModuleNotFoundError: No module named 'x')\n"
    log.write_text(f"starting\n[2026-11-22 20:00:00] {disabled}[2026-11-22 20:00:01] Killed\n")
    assert cause(log) == "Killed", "every server says the other line"
    log.write_text("starting\n[2026-11-22 20:00:01 TP0] Received sigquit\n\n")
    assert cause(log) == "Received sigquit"


def test_ports() -> None:
    assert check_port(free_port())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match="cannot be used"):
            check_port(taken.getsockname()[1])
    with pytest.raises(ServerError, match="port 99999"):
        check_port(99999)


WRITER = """
import json, pathlib, signal, sys, time
from setproctitle import setproctitle

setproctitle("sglang::scheduler")
run = pathlib.Path(sys.argv[1])
try:
    (run / "manifest.json").write_text("{}")
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(3)  # a loaded machine
    (run / "manifest.json").write_text(json.dumps({"closed_at": "now"}))
"""

LAUNCHER = """
import os, signal, subprocess, sys, time

writer = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
print(writer.stdout.readline(), flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    writer.kill()  # as SGLang's launcher does when it ends
"""


def test_a_run_is_closed_before_its_server_is_ended(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    pytest.importorskip("setproctitle")
    command = [sys.executable, "-c", LAUNCHER, WRITER, str(tmp_path)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert launcher.stdout is not None
    assert b"ready" in launcher.stdout.readline()
    stop(launcher, tmp_path)
    assert launcher.poll() is not None
    assert "closed_at" in (tmp_path / "manifest.json").read_text()


def test_a_server_started_where_sigint_is_ignored_heeds_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with module._heeding_sigint():
            child = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
                                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "this process's own way stays"
    finally:
        signal.signal(signal.SIGINT, before)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait() == -signal.SIGINT
