"""A process that has imported SGLang once; each piece of code, and each server, is a fork of it.

Importing SGLang takes seconds and leaves its stand-ins to the process, so no test imports it in pytest's own. A fork starts
with everything imported and nothing set up, and what it does dies with it.

::

    process = SGLangProcess()
    process.run("print(1)").stdout      what `python -c` would say, in milliseconds
    process.value("print(json.dumps(2))")
    process.begin(["python", "-m", "sglang_margingate.launch_server"], log, env)      a server (forked_servers.py)
    process.close()
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import forked_servers


class SGLangProcess:
    """Starts the process with its first piece of code."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="margingate-sglang-")
        self._files = 0
        self._lock = threading.Lock()

    def run(self, code: str, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run code as ``python -c CODE ARGV...`` would, ``env`` added to the environment of now."""
        out, err = self._file("out"), self._file("err")
        job = {"code": code, "argv": argv, "env": {**os.environ, **(env or {})}, "out": str(out), "err": str(err)}
        return subprocess.CompletedProcess(["-c", *argv], self._ask(job), out.read_text(), err.read_text())

    def begin(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> ForkedServer:
        """Start a server, as :func:`sglang_margingate.bench.servers.process.begin` does."""
        code = self._file("code")
        log.write_bytes(b"")  # whoever waits for a line of it must not find one of an earlier server
        job = {
            "command": [*command],
            "log": str(log.absolute()),
            "env": dict(env),
            "folder": os.getcwd(),
            "code": str(code),
        }
        return ForkedServer(self._ask(job), code, [*command])

    def _file(self, name: str) -> Path:
        self._files += 1
        return Path(self._folder.name) / f"{self._files}.{name}"

    def _ask(self, job: dict[str, Any]) -> int:
        with self._lock:
            if self._process is None:
                command = [sys.executable, "-u", str(Path(__file__).resolve())]
                # The front door's own default, which comes too late for a fork that has torch: two spinning threads collapse.
                env = {"OMP_NUM_THREADS": "1", **os.environ}
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
                )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the process that holds SGLang has ended; its error stands above"
        return int(json.loads(answer))

    def value(self, code: str, *argv: str) -> Any:
        """Run code that has to succeed; return the JSON that it prints last."""
        done = self.run("import json, sys\n" + code, *argv)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()  # it waits for the next piece and has nothing to put in order
            self._process.communicate()
        self._folder.cleanup()


class ForkedServer:
    """A server's launcher, with what is asked of a :class:`subprocess.Popen`."""

    def __init__(self, pid: int, code: Path, args: list[str]) -> None:
        self.pid = pid
        self.args = args
        self.returncode: int | None = None
        self._code = code

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""
        if self.returncode is None and self._code.exists():
            self.returncode = int(self._code.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return code


def _begin(job: dict[str, Any], answers: TextIO) -> None:
    """Answer with the id of a fork that is a server from now on; a fork between it and us waits for it."""
    holder = os.getpid()
    if os.fork():
        return
    forked_servers.end_with(holder, signal.SIGKILL)
    waiting = os.getpid()
    server = os.fork()
    if server == 0:
        forked_servers.end_with(waiting, signal.SIGINT)
        answers.close()
        forked_servers.become(job["command"], job["log"], job["env"], job["folder"])
        sys.exit(0)
    print(json.dumps(server), file=answers, flush=True)
    answers.close()
    _, status = os.waitpid(server, 0)
    part = Path(job["code"] + ".part")
    part.write_text(str(os.waitstatus_to_exitcode(status)))
    part.rename(job["code"])
    os._exit(0)


def _in_fork(job: dict[str, Any], kept: dict[str, str]) -> int:
    """Run one piece of code in this process, a fork; return its exit status."""
    for name, descriptor in (("out", 1), ("err", 2)):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update({**kept, **job["env"]})
    sys.argv = ["-c", *job["argv"]]
    sys.stdin = open(os.devnull)  # noqa: SIM115
    try:
        exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _main() -> None:
    """Import, then fork for every line of the input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed while importing is no answer
    before = dict(os.environ)
    from setproctitle import getproctitle

    from sglang_margingate.serving.cpu import install_stand_ins

    getproctitle()  # finds the place of the title, which it no longer can in a fork with another environment
    install_stand_ins()
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.plugins  # noqa: F401

    gc.collect()
    gc.freeze()  # a collection would write to each page, and so copy it

    kept = {name: value for name, value in os.environ.items() if before.get(name) != value}
    for line in sys.stdin:
        job = json.loads(line)
        if "command" in job:
            _begin({**job, "env": {**kept, **job["env"]}}, answers)
            continue
        child = os.fork()
        if child == 0:
            answers.close()
            code = 1
            try:
                code = _in_fork(job, kept)
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
