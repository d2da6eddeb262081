"""Outcomes of several servers, measured one after another or side by side, and the file that keeps them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sglang_margingate.bench.servers.process import stop_all

T = TypeVar("T")


def measure_all(run: Callable[[T], Any], items: Sequence[T], jobs: int, out: Path | None) -> list[Any]:
    """Return ``run``'s outcome for every item, ``jobs`` at a time; each is on disk before the next is awaited.

    Ctrl-C keeps what was measured, and ends the servers that were being measured.
    """
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        running: list[Future[Any]] = []
        try:
            running += [pool.submit(run, item) for item in items]
            for one in running:
                outcomes.append(one.result())
                _keep(out, outcomes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()  # else the pool waits until the last request is answered
            _keep(out, [one.result() for one in running if one.done() and not one.cancelled() and not one.exception()])
            raise
    return outcomes


def _keep(path: Path | None, outcomes: list[Any]) -> None:
    if path is not None and outcomes:
        write_record(path, outcomes)


def write_record(path: Path, outcomes: list[Any]) -> None:
    """Write outcomes with what they were measured on."""
    from sglang_margingate.machine import device_name, versions

    record = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name("cpu"),
        "versions": versions(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "outcomes": [asdict(o) for o in outcomes],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
