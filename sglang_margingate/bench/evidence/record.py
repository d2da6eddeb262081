"""Outcomes of several servers, measured one after another or side by side, and the file that keeps them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def measure_all(run: Callable[[T], Any], items: Sequence[T], jobs: int, out: Path | None) -> list[Any]:
    """Return ``run``'s outcome for every item, ``jobs`` at a time; each is on disk before the next is awaited."""
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(run, items):
            outcomes.append(outcome)
            if out is not None:
                write_record(out, outcomes)  # Ctrl-C keeps what was measured
    return outcomes


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
