"""What the server's side shows of a run, where it can be read: pool, decode steps, share of the time the GPU works.

A number that cannot be read is absent, never 0.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.bench.workload.loads import Load
from sglang_margingate.bench.workload.requests import Chain

LOADS = "/v1/loads?include=core"
SAMPLE_MS = 200
LOCAL = ("127.0.0.1", "localhost", "::1")


class Moments(NamedTuple):
    """SGLang's own sums over the decode steps since its start; its sum of times counts idle seconds before a load, too."""

    steps: float
    rows: float


class Pool(NamedTuple):
    """What a server can hold at once; None where it does not say."""

    tokens: int | None
    requests: int | None


def pool_of(client: Client) -> Pool:
    """Ask a server what it holds."""
    found = _loads(client)
    if found is None:
        return Pool(None, None)
    return Pool(_positive(found.get("max_total_num_tokens")), _positive(found.get("max_running_requests")))


def _positive(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and value > 0 else None


def _loads(client: Client) -> dict[str, Any] | None:
    try:
        (found,) = client.get(LOADS)["loads"]  # more than one: data parallel, of which no sum has a meaning here
    except (ServerError, KeyError, TypeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def check_pool(label: str, pool: Pool, load: Load, chains: list[Chain], max_tokens: int) -> None:
    """Refuse more in flight than a server holds: requests would wait or be retracted, and another load be measured.

    Raises
    ------
    UsageError
        One line that says what the server holds and how many fit.
    """
    count = min(load.in_flight or 0, len(chains))
    if pool.requests is not None and count > pool.requests:
        raise UsageError(
            f"--workload {load.name}: {count} in flight, but the server {label} runs at most {pool.requests} requests at "
            f"once; ask for {pool.requests}, or give its server --max-running-requests {count}"
        )
    needs = sorted((chain.most_tokens() or max_tokens for chain in chains), reverse=True)
    if pool.tokens is None or sum(needs[:count]) <= pool.tokens:
        return
    fit = next(n for n in range(count, -1, -1) if sum(needs[:n]) <= pool.tokens)
    raise UsageError(
        f"--workload {load.name}: {count} in flight may hold {sum(needs[:count]):,} tokens, but the pool of the server "
        f"{label} holds {pool.tokens:,}; ask for {fit} at most, for shorter requests, or give its server a larger "
        "--max-total-tokens"
    )


class Watcher:
    """Watches a run: ``with Watcher(client) as seen: ...``, then ``seen.facts(seconds)``."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._busy: list[float] = []
        self._asked: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._before: Moments | None = None
        self._after: Moments | None = None

    def __enter__(self) -> Watcher:
        self._before = self._moments()
        if urlsplit(self.client.base_url).hostname in LOCAL:
            self._asked = _ask_gpu()
        if self._asked is not None:
            self._thread = threading.Thread(target=self._read, args=(self._asked,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._asked is not None:
            self._asked.terminate()
            self._asked.wait(5)
        if self._thread is not None:
            self._thread.join(5)
        if error is None:
            self._after = self._moments()

    def _moments(self) -> Moments | None:
        found = _loads(self.client)
        if found is None or "decode_moments" not in found:
            return None
        count, rows = (found["decode_moments"] or [0.0, 0.0])[:2]
        return Moments(float(count), float(rows))

    def _read(self, asked: subprocess.Popen[str]) -> None:
        for line in asked.stdout or ():
            if line.strip().isdigit():
                self._busy.append(int(line) / 100)

    def facts(self, seconds: float) -> dict[str, float]:
        """Return what could be read, by name."""
        return server_facts(self._before, self._after, self._busy, seconds)


def server_facts(before: Moments | None, after: Moments | None, busy: list[float], seconds: float) -> dict[str, float]:
    """Return decode steps, their mean size, the time for each, the GPU's busy share, and its idle time for each step.

    The GPU's idle time for each decode step is what the host costs: while it prepares, the GPU has nothing to do.
    """
    found: dict[str, float] = {}
    steps = 0.0
    if before is not None and after is not None:
        steps = after.steps - before.steps
        if steps > 0:
            rows = after.rows - before.rows
            found |= {"decode_steps": steps, "decode_rows": rows / steps, "decode_step_ms": seconds / steps * 1e3}
    if busy:
        found["gpu_busy"] = sum(busy) / len(busy)
        if steps > 0:
            found["host_ms_per_step"] = (1 - found["gpu_busy"]) * seconds / steps * 1e3
    return found


def _ask_gpu() -> subprocess.Popen[str] | None:
    """Start what prints the busy percent of the first visible GPU again and again; None without such a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    words = ["nvidia-smi", f"--id={first}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        return subprocess.Popen(
            [*words, f"--loop-ms={SAMPLE_MS}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return None
