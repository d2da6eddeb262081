"""Starting and stopping servers: no process is left, and a dead server says why. Real ones are in tests/server."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_margingate.bench.servers import process as module
from sglang_margingate.bench.servers.client import ServerError
from sglang_margingate.bench.servers.process import cause, check_port, free_port, serve, stop

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
    end = time.monotonic() + 5
    while child.is_running() and child.status() != "zombie" and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == "zombie"


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
