"""The list of runs: what each one counted, kept as long as its folder does not change.

A thousand runs are listed from what was read before; of the others only so many are read at a time that the page stays
quick, and the next look reads more.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from margingate_dashboard.facts.policies import may_verify, ranked, with_policy
from margingate_dashboard.rates import at_most
from margingate_dashboard.summary import REQUEST_COLUMNS, Headline, contributions, from_sums, tag, tags
from sglang_margingate.trace.frames import to_frame

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


TOGETHER = 25
"""Runs that are read and counted at once: a frame costs more than a run's few rows."""


def within(seconds: float, paths: Sequence[Path], make: Callable[[Sequence[Path]], dict[Path, T]]) -> dict[Path, T]:
    """Return what ``make`` gives for as many paths as fit into the time, :data:`TOGETHER` at once; at least for those of one."""
    end, found = time.perf_counter() + seconds, dict[Path, T]()
    for start in range(0, len(paths), TOGETHER):
        found |= make(paths[start : start + TOGETHER])
        if time.perf_counter() > end:
            break
    return found


def count_together(tables: Mapping[T, pa.Table]) -> dict[T, dict[str, object]]:
    """Return the counts of some runs from their finished requests, with :data:`COLUMNS`, made in one go."""
    if not tables:
        return {}
    requests = with_policy(to_frame(pa.concat_tables(tables.values())))
    owner = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables.values()])
    return dict(zip(tables, count(requests, owner, len(tables))))


def count(requests: pd.DataFrame, owner: np.ndarray, runs: int) -> list[dict[str, object]]:
    """Return each run's counts; rates are of its leading policy's traffic.

    Parameters
    ----------
    requests
        Finished requests of all runs, with :data:`COLUMNS` and the policy as shown.
    owner
        Index of each request's run.
    runs
        Number of runs.
    """
    names = ranked(requests["policy"].astype(str).unique())
    place = pd.Categorical(requests["policy"].astype(str), names).codes.astype(np.int64)
    has = np.zeros((runs, max(1, len(names))), dtype=bool)
    has[owner, place] = True
    first = has.argmax(axis=1)
    mine = place == first[owner]
    shown = tags(requests["dataset"])
    tagged = np.zeros((runs, max(1, len(shown))), dtype=bool)
    tagged[owner, pd.Categorical([tag(v) for v in requests["dataset"].astype(object)], shown).codes] = True

    def summed(values: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        kept = slice(None) if keep is None else keep
        return np.bincount(owner[kept], weights=values[kept], minlength=runs)

    each = contributions(requests)
    own = {name: summed(values, mine) for name, values in each.items()}
    every = {name: summed(each[name]) for name in ("flips", "verified")}
    added, whole = (summed(requests[n].fillna(0).to_numpy(dtype=np.float64), mine) for n in ("overhead_ms", "e2e_ms"))
    # Without a threshold there is nothing to trigger.
    gated = summed(requests["threshold"].notna().to_numpy(dtype=np.float64), mine) > 0
    structural = summed((requests["guarantee"].astype(str) == "structural").to_numpy(dtype=np.float64))
    found: list[dict[str, object]] = []
    for run in range(runs):
        total = from_sums({name: float(values[run]) for name, values in own.items()})
        policy = names[first[run]] if has[run].any() else ""
        found.append(
            {
                "policies": ", ".join(n for n, there in zip(names, has[run]) if there) or "–",
                "rates of": policy or "–",
                "datasets": ", ".join(n for n, there in zip(shown, tagged[run]) if there) or "–",
                "decode steps": total.steps,
                "triggers": total.low,
                "trigger rate": 100 * total.low / total.steps if total.steps and gated[run] else None,
                "verified": total.verified,
                "flips": total.flips if may_verify(policy) else None,  # elsewhere none can be seen
                "all flips": int(every["flips"][run]),
                "all verified": int(every["verified"][run]),
                "missed (95% bound)": missed_words(total, policy),
                "overhead": float(100 * added[run] / whole[run]) if whole[run] else None,
                "structural": int(structural[run]),
            }
        )
    return found


def missed_words(total: Headline, policy: str) -> str:
    """Return missed flips of one policy's traffic in a few words."""
    if policy == "always":
        return f"{total.missed:,} ({total.above:,} above tau)"
    if policy != "gate" or not total.examined:
        return "not audited"
    return f"{total.missed:,} of {total.examined:,} audited, ≤ {at_most(total.miss_upper)}"
