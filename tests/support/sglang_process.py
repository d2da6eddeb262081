"""A process that has imported SGLang once; each piece of code runs in a fork of it.

Importing SGLang takes seconds and leaves its stand-ins to the process, so no test imports it in pytest's own. A fork starts
with everything imported and nothing set up, and what it does dies with it.

::

    process = SGLangProcess()
    process.run("print(1)").stdout      what `python -c` would say, in milliseconds
    process.value("print(json.dumps(2))")
    process.close()
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SGLangProcess:
    """Starts the process with its first piece of code."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="margingate-sglang-")
        self._runs = 0

    def run(self, code: str, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run code as ``python -c CODE ARGV...`` would, ``env`` added to the environment of now."""
        if self._process is None:
            command = [sys.executable, "-u", str(Path(__file__).resolve())]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._runs += 1
        out, err = (Path(self._folder.name) / f"{self._runs}.{name}" for name in ("out", "err"))
        job = {"code": code, "argv": argv, "env": {**os.environ, **(env or {})}, "out": str(out), "err": str(err)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that holds SGLang has ended; its error stands above"
        return subprocess.CompletedProcess(["-c", *argv], json.loads(answer), out.read_text(), err.read_text())

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
    from sglang_margingate.serving.cpu import install_stand_ins

    install_stand_ins()
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler
    import sglang.srt.plugins  # noqa: F401

    kept = {name: value for name, value in os.environ.items() if before.get(name) != value}
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            code = 1
            try:
                code = _in_fork(json.loads(line), kept)
            finally:
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers, flush=True)


if __name__ == "__main__":
    _main()
