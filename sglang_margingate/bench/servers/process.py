"""Start a margingate server for a test or a benchmark, wait until it serves, and leave no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from sglang_margingate.bench.servers.client import Client, ServerError

READY = "The server is fired up"
"""SGLang logs this after its warm-up request was answered."""

QUIET = ("warning", "error", "critical")
"""Log levels at which that line is missing."""

OURS, STOCK = "sglang_margingate.launch_server", "sglang.launch_server"

GATE_ALONE = ("--margingate-policy", "gate", "--margingate-fast-path", "stock")
"""Flags of a server whose gate does all the work: what looks at the gate itself asks for it, whatever the default is."""

STOP_SECONDS = 60.0
CLOSE_SECONDS = 30.0
"""A scheduler gets this long to write its last rows and close its run; a loaded machine needs some of it."""
SCHEDULER = "sglang::scheduler"
"""How SGLang names the processes that decode, and that hold a run open."""
POLL_SECONDS = 0.1
_CAUSE = re.compile(r"margingate: error:|^\S*(Error|Exception|Interrupt)\b.*:|: error: |\b\w+Error: ")
_HARMLESS = re.compile(r"OpenAI Responses API .* disabled: ")
"""Said by every SGLang without openai_harmony, whatever it dies of."""
_STAMP = re.compile(r"^\[\d{4}-\d\d-\d\d [\d:.]+[^\]]*\]\s*")

Progress = Callable[[float, str], None]
"""Called with the seconds waited so far and the last line of the log."""


@dataclass
class Server:
    """One running server."""

    base_url: str
    log_path: Path
    process: subprocess.Popen[bytes] = field(repr=False)
    flags: tuple[str, ...] = ()
    _client: Client | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Process id of the launcher; it leads its own process group."""
        return self.process.pid

    @property
    def client(self) -> Client:
        """A client of this server."""
        if self._client is None:
            self._client = Client(self.base_url)
            self._client.post_mortem = self._post_mortem
        return self._client

    def alive(self) -> bool:
        """Return whether the launcher still runs."""
        return self.process.poll() is None

    def _post_mortem(self) -> str:
        try:
            self.process.wait(1.0)  # a connection breaks a moment before the process is gone
        except subprocess.TimeoutExpired:
            return ""
        return f"; the server died (exit {self.process.returncode}): {self.last_error()} (log: {self.log_path})"

    def last_error(self) -> str:
        """Return the line of the log that says best why a server died: the last error, else the last line."""
        return cause(self.log_path)


_running: list[Server] = []
"""Servers of this process, of all its threads."""


@contextmanager
def serve(
    flags: Sequence[str],
    *,
    log: Path | None = None,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 180,
    progress: Progress | None = None,
    module: str = OURS,
) -> Iterator[Server]:
    """Start ``python -m sglang_margingate.launch_server`` and give it once it serves.

    Ready is a server whose own warm-up request was answered; SGLang sends token ids where it has no tokenizer.

    Parameters
    ----------
    flags
        Flags of ours and SGLang's, without ``--host`` and ``--port``.
    log
        File that gets the server's output; a temporary one by default, kept only where the server failed.
    port
        A free one by default.
    env
        Environment variables on top of this process's.
    timeout
        Seconds until the server must serve.
    progress
        Called about every second while waiting.
    module
        Another launcher to start, as :data:`STOCK`.

    Raises
    ------
    ServerError
        One line: the server died (with its last error), took too long, or the port is taken.
    """
    port = free_port() if port is None else check_port(port)
    keep = log is not None
    if log is None:
        handle, name = tempfile.mkstemp(prefix="margingate-server-", suffix=".log")
        os.close(handle)
        log = Path(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        module,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *flags,
    ]
    process = begin(command, log, {**os.environ, **(env or {})})
    server = Server(f"http://127.0.0.1:{port}", log, process, tuple(flags))
    failed = True
    _running.append(server)
    try:
        _wait(server, timeout, progress)
        failed = False
        yield server
    finally:
        _running.remove(server)
        run = None
        try:
            run = None if failed else _run_of(server)
        finally:
            stop(process, run)
        if run is not None and not _closed(run):
            print(
                f"margingate: {run}: not closed in {CLOSE_SECONDS:g} s; its last rows may be missing", file=sys.stderr
            )
        if not keep and not failed:
            log.unlink(missing_ok=True)


def begin(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a server's process: in a session of its own, whose process group has its id, with all it says in `log`."""
    with log.open("wb") as out, _heeding_sigint():
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def _wait(server: Server, timeout: float, progress: Progress | None) -> None:
    start = time.monotonic()
    reported = -1.0
    quiet = flag_value(server.flags, "--log-level") in QUIET
    while True:
        alive = server.alive()  # before the log: what a dying server wrote last must be read
        text = _read(server.log_path)
        if alive and (READY in text or (quiet and _healthy(server))):
            return
        waited = time.monotonic() - start
        if not alive:
            code = server.process.returncode
            raise ServerError(f"the server died (exit {code}): {cause(server.log_path)} (log: {server.log_path})")
        if waited > timeout:
            raise ServerError(
                f"the server was not ready after {timeout:.0f} s: {cause(server.log_path)} (log: {server.log_path})"
            )
        if progress is not None and waited - reported >= 1:
            reported = waited
            progress(waited, _last_line(text))
        time.sleep(POLL_SECONDS)


def _healthy(server: Server) -> bool:
    """Return whether ``/health`` says so: 503 until the warm-up is through. Each call costs the server one token."""
    try:
        return httpx.get(server.base_url + "/health", timeout=30).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def _heeding_sigint() -> Iterator[None]:
    """Let a process that is started here end on SIGINT: a background shell's ignoring it would be inherited."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run_of(server: Server) -> Path | None:
    """Return the folder of the run that a living server writes, if any."""
    if not server.alive():
        return None
    try:
        path = (Client(server.base_url, timeout=5).status().get("trace") or {}).get("path")
    except (ServerError, AttributeError):
        return None
    return Path(path) if path else None


def _closed(run: Path) -> bool:
    try:
        return bool(json.loads((run / "manifest.json").read_text()).get("closed_at"))
    except (OSError, ValueError, AttributeError):
        return False


def _close_run(children: list[Any], run: Path) -> None:
    """End the schedulers first and wait for their run to be closed: the launcher kills them as soon as it ends."""
    schedulers = []
    for child in _safe(children):
        with suppress(Exception):  # psutil.Error: gone meanwhile
            if any(SCHEDULER in word for word in child.cmdline()[:1]):
                schedulers.append(child)
                child.send_signal(signal.SIGINT)
    end = time.monotonic() + CLOSE_SECONDS
    while time.monotonic() < end and not _closed(run) and _living(schedulers):
        time.sleep(POLL_SECONDS)


def stop(process: subprocess.Popen[bytes], run: Path | None = None) -> None:
    """End a server: SIGINT to its group, then SIGKILL to whatever is left, children in other groups included.

    Parameters
    ----------
    run
        Folder of the run that it writes, which is closed before.
    """
    children = _descendants(process.pid)
    try:
        if run is not None:
            _close_run(children, run)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(STOP_SECONDS)
        _wait_gone(children, 2.0)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:  # a second Ctrl-C too, which comes in the midst of this, leaves no server behind
        _kill(process, children)


def _kill(process: subprocess.Popen[bytes], children: list[Any]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(Exception):  # psutil.Error: gone already
            child.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


def stop_all() -> None:
    """End every server that :func:`serve` has running in this process, so that threads which wait for an answer get an error.

    For a command that is interrupted: only its main thread hears of it.
    """
    for server in list(_running):
        stop(server.process, _run_of(server))


def _descendants(pid: int) -> list[Any]:
    """Return the process's descendants; psutil (a dependency of SGLang) tells a reused id from the process."""
    try:
        import psutil
    except ImportError:
        return []
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _wait_gone(children: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and _living(children):
        time.sleep(POLL_SECONDS)


def _living(children: list[Any]) -> bool:
    return any(c.is_running() and c.status() != "zombie" for c in _safe(children))


def _safe(children: list[Any]) -> Iterator[Any]:
    for child in children:
        try:
            child.status()
        except Exception:  # psutil.NoSuchProcess
            continue
        yield child


def flag_value(flags: Sequence[str], *names: str) -> str | None:
    """Return the value of a flag in a server's command line, in either of its two forms."""
    for i, word in enumerate(flags):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else flags[i + 1] if i + 1 < len(flags) else None
    return None


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> int:
    """Return the port, or raise :class:`ServerError` where something listens on it already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServerError(f"port {port} cannot be used ({reason}); name another one") from None
    return port


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return _STAMP.sub("", lines[-1].strip()) if lines else ""


def cause(path: Path) -> str:
    """Return the log's last line that names an error, else its last line, without the time stamp."""
    text = _read(path)
    lines = [line for line in text.splitlines() if not _HARMLESS.search(line)]
    errors = [line for line in lines if _CAUSE.search(_STAMP.sub("", line.strip()))]
    return (_last_line("\n".join(errors)) or _last_line("\n".join(lines)) or "nothing was logged")[:300]
