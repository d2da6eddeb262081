"""Proof that batches formed, from the server's own gauges: a client that sends 16 requests at once proves nothing."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sglang_margingate.bench.servers.client import Client, ServerError

SAMPLE_SECONDS = 0.05
LONGEST_PAUSE = 0.5

_PROMETHEUS = re.compile(
    r"^(?:sglang:num_running_reqs|vllm:num_requests_running|tgi_batch_current_size|llamacpp:requests_processing)"
    r"(?:\{[^}]*\})?\s+([-+.eE\d]+)",
    re.MULTILINE,
)


@dataclass
class BatchProof:
    """How many requests ran together in one phase."""

    source: str = ""
    """The gauge's name; empty where the server has none."""
    unit: str = "steps"
    """What was counted: every decode step, or samples of a gauge."""
    by_rows: Counter[int] = field(default_factory=Counter)
    """Count by number of running requests, at least 1."""

    @property
    def largest(self) -> int:
        """Most requests seen running together."""
        return max(self.by_rows, default=0)

    @property
    def total(self) -> int:
        """Steps or samples with any request running."""
        return sum(self.by_rows.values())

    @property
    def batched(self) -> int:
        """Steps or samples with two or more."""
        return sum(n for rows, n in self.by_rows.items() if rows > 1)

    def add(self, other: BatchProof) -> None:
        """Add another phase's counts."""
        self.source, self.unit = other.source or self.source, other.unit
        self.by_rows.update(other.by_rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON; ``largest`` is null where no running request was seen."""
        rows = {str(k): v for k, v in sorted(self.by_rows.items())}
        return {"source": self.source, "unit": self.unit, "largest": self.largest or None, "by_rows": rows}


class Gauge:
    """Watches one server over a phase: ``with gauge.watch() as proof: ...``.

    The counter of ``/margingate/status`` is exact: it counts every decode step. Without it the number of running
    requests is sampled by a thread from ``/metrics`` (SGLang with --enable-metrics, vLLM, TGI, llama.cpp) or SGLang's
    ``/v1/loads``. Without those either, nothing can be proven, and ``source`` is empty.

    Parameters
    ----------
    base_url
        The server's.
    pause
        Seconds between two samples, where samples must do.
    """

    def __init__(self, base_url: str, api_key: str = "", pause: float = SAMPLE_SECONDS) -> None:
        self.pause = pause
        self.client = Client(base_url, timeout=10, api_key=api_key)
        self.source, self._read = self._choose()

    @property
    def exact(self) -> bool:
        """Whether every step is counted, not sampled."""
        return self._read is None and bool(self.source)

    def _choose(self) -> tuple[str, Callable[[], int] | None]:
        try:
            if "steps_by_rows" in self.client.status().get("batch_rows", {}):
                return "/margingate/status batch_rows", None
        except (ServerError, AttributeError):
            pass
        readers: tuple[tuple[str, Callable[[], int]], ...] = (("/metrics", self._metrics), ("/v1/loads", self._loads))
        for name, read in readers:
            try:
                read()
            except (ServerError, ValueError, KeyError, TypeError):
                continue
            return name, read
        return "", None

    def _metrics(self) -> int:
        found = _PROMETHEUS.findall(self.client.text("/metrics"))
        if not found:
            raise ValueError("no such gauge")
        return int(sum(float(v) for v in found))

    def _loads(self) -> int:
        loads = self.client.get("/v1/loads?include=core")["loads"]
        return max(int(load["num_running_reqs"]) for load in loads)

    def _counts(self) -> Counter[int]:
        return Counter({int(k): v for k, v in self.client.status()["batch_rows"]["steps_by_rows"].items()})

    def watch(self) -> Watch:
        """Return a context manager whose ``proof`` is filled when it ends."""
        return Watch(self)


class Watch:
    """One phase under observation."""

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.proof = BatchProof(gauge.source, "steps" if gauge.exact else "samples")
        self._before: Counter[int] = Counter()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> BatchProof:
        if self.gauge.exact:
            self._before = self.gauge._counts()
        elif self.gauge._read is not None:
            self._thread = threading.Thread(target=self._sample, args=(self.gauge._read,), daemon=True)
            self._thread.start()
        return self.proof

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        elif self.gauge.exact and exc[0] is None:
            after = self.gauge._counts()
            after.subtract(self._before)
            self.proof.by_rows.update({rows: n for rows, n in after.items() if n > 0 and rows > 0})

    def _sample(self, read: Callable[[], int]) -> None:
        while not self._stop.is_set():
            start = time.perf_counter()
            try:
                rows = read()
            except Exception:  # a gauge that fails now and then must not end the check
                rows = 0
            if rows > 0:
                self.proof.by_rows[rows] += 1
            # A slow gauge costs the server time: sample it less often.
            cost = time.perf_counter() - start
            self._stop.wait(min(LONGEST_PAUSE, max(self.gauge.pause, 4 * cost)))
