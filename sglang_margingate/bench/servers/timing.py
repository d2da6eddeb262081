"""One workload, timed from the client's side: the same clock for every server, ours or stock."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_margingate.bench.servers.client import (
    Client,
    Completion,
    Prompt,
    ServerError,
    completion,
    error_message,
)

MOST_THREADS = 512


@dataclass(frozen=True)
class Job:
    """One request of a workload."""

    prompt: Prompt
    deterministic: bool
    """False: the request opts out of the policy (margingate_policy off)."""
    rid: str
    """Its id in the trace, the same for every server, so that runs can be compared request by request."""
    repeat: int | None = None
    """Which pass over the prompts it belongs to, for the trace; 0 is the pass alone."""


@dataclass(frozen=True)
class Timed:
    """One request's outcome."""

    job: Job
    completion: Completion
    ttft: float
    """Seconds from sending to the first token."""
    tpot: float
    """Mean seconds per token after the first chunk; NaN where that was all."""


@dataclass(frozen=True)
class Arrivals:
    """When requests are sent."""

    concurrency: int = 16
    """Closed loop: this many in flight at all times."""
    rate: float | None = None
    """Open loop instead: requests a second, Poisson."""
    seed: int = 0

    def describe(self) -> str:
        """Return the pattern in words."""
        if self.rate is None:
            return f"closed loop, {self.concurrency} requests in flight"
        return f"open loop, Poisson arrivals at {self.rate:g} requests/s, seed {self.seed}"

    def times(self, count: int) -> list[float]:
        """Return the seconds from the start at which requests are sent: the same ones for every server."""
        if self.rate is None:
            return [0.0] * count
        rng = random.Random(self.seed)
        now, out = 0.0, []
        for _ in range(count):
            out.append(now)
            now += rng.expovariate(self.rate)
        return out


def stream(client: Client, job: Job, max_tokens: int) -> Timed:
    """Complete one prompt with streaming and time its tokens."""
    custom: dict[str, Any] = {} if job.deterministic else {"margingate_policy": "off"}
    if job.repeat is not None:
        custom["margingate_repeat"] = job.repeat
    payload = client.payload(job.prompt, max_tokens, custom=custom, rid=job.rid)
    start = time.perf_counter()
    first = last = 0.0
    begin = final = b""
    for chunk in client.stream(payload, f"prompt {job.prompt.id}"):
        last = time.perf_counter()
        first, begin = first or last, begin or chunk
        final = chunk
    try:
        out = json.loads(final)
    except ValueError:
        raise ServerError(f"prompt {job.prompt.id}: the stream ended without an answer") from None
    if "error" in out:
        raise ServerError(f"prompt {job.prompt.id}: {error_message(out)}")
    done = completion(job.prompt, out, last - start)
    after = len(done.tokens) - _tokens_of(begin)
    return Timed(job, done, first - start, (last - first) / after if after > 0 else float("nan"))


def _tokens_of(chunk: bytes) -> int:
    """Return the tokens in a stream's first chunk: one, unless the server streams in larger pieces."""
    try:
        return len(json.loads(chunk)["output_ids"])
    except (ValueError, KeyError, TypeError):
        return 1


def run_workload(
    client: Client, jobs: Sequence[Job], arrivals: Arrivals, max_tokens: int, done: Callable[[], None] = lambda: None
) -> tuple[list[Timed], float]:
    """Send the jobs; return their outcomes in order and the seconds from first send to last token."""
    stop = threading.Event()
    times = arrivals.times(len(jobs))
    threads = arrivals.concurrency if arrivals.rate is None else min(MOST_THREADS, max(1, len(jobs)))
    start = time.perf_counter()

    def one(job: Job, at: float) -> Timed:
        pause = start + at - time.perf_counter()
        if pause > 0:
            stop.wait(pause)
        if stop.is_set():
            raise ServerError(f"prompt {job.prompt.id}: stopped before it was sent")
        timed = stream(client, job, max_tokens)
        done()
        return timed

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(one, job, at) for job, at in zip(jobs, times)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for failed in (f for f in futures if f.done() and f.exception()):
                failed.result()
            outcomes = [f.result() for f in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    return outcomes, time.perf_counter() - start


def summarize(outcomes: Sequence[Timed], seconds: float) -> dict[str, float]:
    """Return throughput and latencies of one run; times in ms."""
    tokens = sum(len(t.completion.tokens) for t in outcomes)
    found: dict[str, Any] = {"tokens_per_s": tokens / seconds, "requests_per_s": len(outcomes) / seconds}
    for name, values in (("ttft", [t.ttft for t in outcomes]), ("tpot", [t.tpot for t in outcomes])):
        known = np.array(values)[np.isfinite(values)] * 1e3
        for q in (50, 99):
            found[f"{name}_p{q}_ms"] = float(np.percentile(known, q)) if known.size else float("nan")
    return {**found, "seconds": seconds, "output_tokens": float(tokens)}
