"""The list of runs: what each one counted, kept as long as its folder does not change.

A thousand runs are listed from what was read before; of the others only so many are read at a time that the page stays
quick, and the next look reads more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import pandas as pd

from margingate_dashboard.facts.policies import leading, present
from margingate_dashboard.rates import at_most
from margingate_dashboard.summary import REQUEST_COLUMNS, Headline, from_requests, overhead, tags

FRESH_NS = 2_000_000_000
"""A folder changed less than this long ago may change again within the same tick of its clock."""

T = TypeVar("T")
Stamp = tuple[int, int]

COLUMNS = (*REQUEST_COLUMNS, "threshold")
"""Request columns that :func:`count` reads."""


def stamps(folder: Path) -> dict[str, Stamp]:
    """Return what tells that a run's folder changed, by name: its time and its inode. Links are left out."""
    found: dict[str, Stamp] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found[entry.name] = (status.st_mtime_ns, status.st_ino)
    except OSError:
        pass
    return found


def stamp(run: Path) -> Stamp:
    """Return the stamp of one run's folder; zeros where it is gone."""
    try:
        status = run.stat()
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_ino)


class Kept(Generic[T]):
    """Results by folder, each as long as the folder's stamp stays the same; safe from several threads."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[Stamp, T]] = {}
        self._lock = threading.Lock()

    def get(self, path: Path, stamp: Stamp) -> T | None:
        """Return what is known of the folder as it is now, or None."""
        with self._lock:
            known = self._found.get(path)
        return known[1] if known is not None and known[0] == stamp else None

    def put(self, path: Path, stamp: Stamp, value: T) -> None:
        """Keep a result, unless the folder is about to change."""
        if time.time_ns() - stamp[0] > FRESH_NS:
            with self._lock:
                self._found[path] = (stamp, value)

    def only(self, paths: Iterable[Path]) -> None:
        """Forget all other folders."""
        alive = set(paths)
        with self._lock:
            self._found = {p: v for p, v in self._found.items() if p in alive}


def within(seconds: float, paths: Iterable[Path], make: Callable[[Path], T]) -> dict[Path, T]:
    """Return what ``make`` gives for as many paths as fit into the time; at least one."""
    end, found = time.perf_counter() + seconds, {}
    for path in paths:
        found[path] = make(path)
        if time.perf_counter() > end:
            break
    return found


def count(requests: pd.DataFrame) -> dict[str, object]:
    """Return a run's counts from its finished requests, with :data:`COLUMNS`; rates are of its leading policy's traffic."""
    policy = leading(requests["policy"])
    mine = requests[(requests["policy"] == policy).to_numpy()]
    total = from_requests(mine)
    every = total if len(mine) == len(requests) else from_requests(requests)
    added, whole = overhead(mine)
    gated = bool(mine["threshold"].notna().any())  # without a threshold there is nothing to trigger
    return {
        "policies": ", ".join(present(requests["policy"])) or "–",
        "rates of": policy if len(requests) else "–",
        "datasets": ", ".join(tags(requests["dataset"])) if len(requests) else "–",
        "decode steps": total.steps,
        "triggers": total.low,
        "trigger rate": 100 * total.low / total.steps if total.steps and gated else None,
        "verified": total.verified,
        "flips": total.flips,
        "all flips": every.flips,
        "all verified": every.verified,
        "missed (95% bound)": missed_words(total, policy),
        "overhead": 100 * added / whole if whole else None,
        "structural": int((requests["guarantee"].astype(str) == "structural").sum()),
    }


def missed_words(total: Headline, policy: str) -> str:
    """Return missed flips of one policy's traffic in a few words."""
    if policy == "always":
        return f"{total.missed:,} ({total.above:,} above tau)"
    if policy != "gate" or not total.examined:
        return "not audited"
    return f"{total.missed:,} of {total.examined:,} audited, ≤ {at_most(total.miss_upper)}"
