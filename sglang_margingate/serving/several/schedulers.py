"""The schedulers of a server with ``--dp-size``: that all attested, whether they live, and their states as one.

SGLang's controller starts them and keeps what they report to itself, so each leaves a file in the folder that the configuration
was handed over in. A scheduler that was killed is noticed by nobody: the controller goes on sending it requests, and at the
next message for all of them (a status, a client that hung up) waits for it for good. So the launcher looks whether they live,
and ends the server when one does not, as SGLang does with any other process of a server; the others close their traces first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sglang_margingate.config import CONFIG_ENV

log = logging.getLogger(__name__)

RUN_ENV = "MARGINGATE_RUN"
"""Time and process that the run of several schedulers is named after, as ``20261127-004500/1234``."""

LOOK_SECONDS = 1.0
"""Pause between looks whether all schedulers live."""

CLOSE_SECONDS = 15.0
"""A scheduler gets this long to write its last rows and close its part of the run."""


class Scheduler(NamedTuple):
    """One scheduler process that attested its hooks, self-test and trials."""

    dp_rank: int
    tp_rank: int
    pid: int
    decides: str = ""
    """Digest of the sizes, kernels and thresholds that it chose."""


def attest(dp_rank: int, tp_rank: int, decides: str = "") -> None:
    """Say to the launcher that this process is in order."""
    path = _folder() / _name(dp_rank, tp_rank)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(Scheduler(dp_rank, tp_rank, os.getpid(), decides)), encoding="utf-8")
    os.replace(part, path)
    # A process that ends by itself takes its word back; one that was killed cannot. A child of multiprocessing skips atexit.
    Finalize(None, path.unlink, kwargs={"missing_ok": True}, exitpriority=0)


def attested() -> list[Scheduler]:
    """Return the schedulers that have attested, in order."""
    return sorted(Scheduler(*json.loads(path.read_text())) for path in _folder().glob("scheduler-*.json"))


def missing(dp_size: int, tp_size: int, found: Sequence[Scheduler]) -> list[str]:
    """Name the processes that did not attest."""
    there = {scheduler[:2] for scheduler in found}
    wanted = [(dp, tp) for dp in range(dp_size) for tp in range(tp_size)]
    return [f"{dp}.{tp}" if tp_size > 1 else str(dp) for dp, tp in wanted if (dp, tp) not in there]


def different(found: Sequence[Scheduler]) -> int | None:
    """Return a scheduler that chose otherwise than the first: its answers would have other bits. None: all are alike."""
    return next((each.dp_rank for each in found if each.decides != found[0].decides), None)


def _name(dp_rank: int, tp_rank: int) -> str:
    return f"scheduler-{dp_rank}-{tp_rank}.json"


def _folder() -> Path:
    return Path(os.environ[CONFIG_ENV]).parent


def watch(
    found: Sequence[Scheduler], end: Callable[[], None] | None = None, seconds: float = LOOK_SECONDS
) -> threading.Thread:
    """Look whether all schedulers live, on a thread; when one was killed say so, let the others close, and end the server.

    Parameters
    ----------
    found
        All of them.
    end
        Ends the server; by default as SGLang does when a process of its own has crashed.
    seconds
        Pause between looks.
    """
    folder = _folder()

    def loop() -> None:
        while (killed := _killed(found, folder)) is None:
            time.sleep(seconds)
        log.error(
            "margingate: scheduler %d (rank %d, process %d) has ended, and its requests get no answer: the server ends",
            *killed[:3],
        )
        close([each.pid for each in found])
        (end or _end)()

    thread = threading.Thread(target=loop, name="margingate-schedulers", daemon=True)
    thread.start()
    return thread


def _killed(found: Sequence[Scheduler], folder: Path) -> Scheduler | None:
    """Return a scheduler that is gone and did not say that it ends."""
    return next((each for each in found if not _lives(each.pid) and (folder / _name(*each[:2])).exists()), None)


def close(pids: Sequence[int]) -> None:
    """Let processes end by themselves, so that traces are closed."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    until = time.monotonic() + CLOSE_SECONDS
    while any(map(_lives, pids)) and time.monotonic() < until:
        time.sleep(0.1)


def _end() -> None:
    os.kill(os.getpid(), signal.SIGQUIT)


def _lives(pid: int) -> bool:
    """Return whether a process runs: one that was killed stays a zombie until its parent asks."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the status of all schedulers as that of one server: what they counted added up, and each by itself.

    Parameters
    ----------
    states
        Their status pages (:meth:`~sglang_margingate.runtime.status.Runtime.status`).
    """
    head = dict(states[0])
    if head["scheduler"]["of"] == 1:
        return head
    head["totals"] = _sum([state["totals"] for state in states])
    if all("verifier" in state for state in states):
        head["verifier"] = _sum([state["verifier"] for state in states])
    missed = _sum([{k: v for k, v in state["missed"].items() if k != "upper_95"} for state in states])
    head["missed"] = {**missed, "upper_95": _upper(missed)}
    rows = [state["batch_rows"] for state in states]
    steps = _sum([each["steps_by_rows"] for each in rows])
    head["batch_rows"] = {
        "now": sum(each["now"] for each in rows), "max": max(each["max"] for each in rows),
        "steps_by_rows": {k: steps[k] for k in sorted(steps, key=int)},
    }  # fmt: skip
    head["notes"] = list(dict.fromkeys(note for state in states for note in state["notes"]))
    traces = [state["trace"] for state in states if "trace" in state]
    if traces:
        head["trace"] = {
            "path": traces[0]["path"],
            **_sum([{k: v for k, v in t.items() if k != "path"} for t in traces]),
        }
    own = ("scheduler", "ranks", "totals", "batch_rows", "host", "verifier", "trace", "notes", "uptime_seconds")
    head["schedulers"] = [{name: state[name] for name in own if name in state} for state in states]
    del head["scheduler"]
    head.pop("host", None)  # each has a thread of its own: no sum of theirs is anybody's time
    return head


def _sum(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def _upper(missed: dict[str, int]) -> float | None:
    from sglang_margingate.gate.stats import Rate

    return Rate(missed["missed"], missed["checked"]).upper() if missed["checked"] else None
