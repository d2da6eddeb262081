"""What a torch profiler's trace says of a GPU's time: how long it worked, on what, and how long it waited for the host."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

KINDS = {
    "choice": r"ArgMax|top2_kernel",
    "attention": r"flash|attention|attn|decode|prefill|plan_kernel|mergestate",
    "gemm": r"nvjet|gemm|gemv|cutlass|cublas|splitK",
    "small": r"norm|rotary|rope|silu|act_and_mul",
    "copies": r"memcpy|memset|copy|fill|index|cat|elementwise|scatter|gather|store",
}
"""What a kernel does, by its name; the first that fits."""
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
CHOICE = re.compile(KINDS["choice"])


class Work(NamedTuple):
    """One kernel or copy; times in microseconds."""

    begin: float
    end: float
    name: str


def read(path: Path) -> list[Work]:
    """Return the GPU's work of one trace file, in order."""
    data = path.read_bytes()
    return work_of(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"])


def work_of(events: Iterable[dict[str, Any]]) -> list[Work]:
    """Return the GPU's work among a trace's events, in order."""
    return sorted(
        Work(float(e["ts"]), float(e["ts"]) + float(e["dur"]), str(e["name"]))
        for e in events
        if e.get("cat") in GPU_EVENTS and "dur" in e
    )


def kind_of(name: str) -> str:
    """Return what a kernel does."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


@dataclass
class Forward:
    """The GPU's work from behind one choice of tokens to the end of the next."""

    span_us: float
    busy_us: float
    by_kind: dict[str, float] = field(default_factory=dict)
    longest_wait_us: float = 0.0
    kernels: int = 0

    @property
    def waits_us(self) -> float:
        """While it ran nothing was on the GPU."""
        return self.span_us - self.busy_us


def forwards(work: Sequence[Work]) -> list[Forward]:
    """Cut the work into forwards, each from the end of the choice before it; what lies before the first is left out."""
    out: list[Forward] = []
    ends = [i for i, one in enumerate(work) if CHOICE.search(one.name)]
    for before, last in pairwise(ends):
        begin = at = work[before].end
        found = Forward(0.0, 0.0)
        for one in work[before + 1 : last + 1]:
            kind = kind_of(one.name)
            found.by_kind[kind] = found.by_kind.get(kind, 0.0) + one.end - one.begin
            found.longest_wait_us = max(found.longest_wait_us, one.begin - at)
            found.busy_us += max(0.0, one.end - max(at, one.begin))
            at = max(at, one.end)
            found.kernels += 1
        found.span_us = at - begin
        out.append(found)
    return out


def summary(found: Sequence[Forward]) -> dict[str, float]:
    """Return the middle of the forwards, in milliseconds, and the share of all time in which the GPU worked."""
    if not found:
        return {}
    middle: dict[str, float] = {
        "forwards": len(found),
        "span_ms": median(f.span_us for f in found) / 1e3,
        "mean_ms": sum(f.span_us for f in found) / len(found) / 1e3,
        "wait_ms": median(f.waits_us for f in found) / 1e3,
        "mean_wait_ms": sum(f.waits_us for f in found) / len(found) / 1e3,
        "longest_wait_ms": max(f.longest_wait_us for f in found) / 1e3,
        "busy": sum(f.busy_us for f in found) / sum(f.span_us for f in found),
        "kernels": median(f.kernels for f in found),
    }
    for kind in (*KINDS, "other"):
        middle[f"{kind}_ms"] = sum(f.by_kind.get(kind, 0.0) for f in found) / len(found) / 1e3
    return middle


def top(work: Sequence[Work], count: int) -> list[tuple[str, int, float]]:
    """Return the kernels that took longest in sum: name, launches, milliseconds."""
    sums: dict[str, tuple[int, float]] = {}
    for one in work:
        launches, ms = sums.get(one.name, (0, 0.0))
        sums[one.name] = launches + 1, ms + (one.end - one.begin) / 1e3
    ranked = sorted(sums.items(), key=lambda item: -item[1][1])
    return [(name[:120], launches, ms) for name, (launches, ms) in ranked[:count]]
