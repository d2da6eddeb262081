"""The schedulers of a server with ``--dp-size``: that all attested, which still live, and their states as one.

SGLang's controller starts them and keeps what they report to itself, so each leaves a file in the folder that the configuration
was handed over in. A scheduler that was killed is noticed by nobody: the controller goes on sending it requests, and a status
request waits for its answer for good. So the launcher looks whether they live, tells the controller, and asks only the living.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from sglang_margingate.config import CONFIG_ENV

log = logging.getLogger(__name__)

RUN_ENV = "MARGINGATE_RUN"
"""Time and process that the run of several schedulers is named after, as ``20261127-004500/1234``."""

LOOK_SECONDS = 1.0
"""Pause between looks whether all schedulers live."""


class Scheduler(NamedTuple):
    """One scheduler process that attested its hooks, self-test and trials."""

    dp_rank: int
    tp_rank: int
    pid: int
    decides: str = ""
    """Digest of the sizes, kernels and thresholds that it chose."""


def attest(dp_rank: int, tp_rank: int, decides: str = "") -> None:
    """Say to the launcher that this process is in order."""
    path = _folder() / f"scheduler-{dp_rank}-{tp_rank}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(Scheduler(dp_rank, tp_rank, os.getpid(), decides)), encoding="utf-8")
    os.replace(part, path)


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


def _folder() -> Path:
    return Path(os.environ[CONFIG_ENV]).parent


class Living:
    """Which schedulers live, as the launcher sees it; cheap enough to be asked at every request.

    Parameters
    ----------
    schedulers
        All that attested.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self.schedulers = list(schedulers)
        self.size = 1 + max((s.dp_rank for s in schedulers), default=0)
        self.ended: dict[int, str] = {}
        """What ended, by scheduler."""
        self._looked = time.monotonic()

    def look(self, seconds: float = LOOK_SECONDS) -> list[int]:
        """Return the schedulers that ended since the last look; looks again only after ``seconds``."""
        now = time.monotonic()
        if self.size == 1 or now - self._looked < seconds:
            return []
        self._looked = now
        new = []
        for dp_rank, tp_rank, pid, _ in self.schedulers:
            if dp_rank not in self.ended and not _lives(pid):
                self.ended[dp_rank] = f"scheduler {dp_rank} (rank {tp_rank}, process {pid}) has ended"
                log.error("margingate: %s: its requests get no answer; new ones go to the others", self.ended[dp_rank])
                new.append(dp_rank)
        return new

    def status(self) -> list[bool]:
        """Return for every scheduler whether it lives."""
        return [rank not in self.ended for rank in range(self.size)]

    def tell(self, manager: Any) -> None:
        """Leave ended schedulers out: of the controller's turns, and of what the launcher waits for.

        Parameters
        ----------
        manager
            SGLang's ``TokenizerManager``.
        """
        from sglang.srt.managers.io_struct import ActiveRanksOutput

        living = self.status()
        manager.update_active_ranks(ActiveRanksOutput(status=living))
        manager.get_internal_state_communicator.set_fan_out(sum(living))


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
    own = ("scheduler", "ranks", "totals", "batch_rows", "verifier", "trace", "notes", "uptime_seconds")
    head["schedulers"] = [{name: state[name] for name in own if name in state} for state in states]
    del head["scheduler"]
    return head


def _sum(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for each in counts for name in each)
    return {name: sum(each.get(name, 0) for each in counts) for name in names}


def _upper(missed: dict[str, int]) -> float | None:
    from sglang_margingate.gate.stats import Rate

    return Rate(missed["missed"], missed["checked"]).upper() if missed["checked"] else None
