"""Sends the requests of a load to one server, and measures what came back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.bench.servers.timing import MOST_THREADS, Job, Timed, stream, summarize
from sglang_margingate.bench.workload.loads import Limits, Load
from sglang_margingate.bench.workload.requests import Chain, follow


@dataclass(frozen=True)
class Run:
    """One load on one server, once."""

    outcomes: tuple[Timed, ...]
    seconds: float
    """From the first request sent to the last token."""
    late: float = 0.0
    """Most seconds that this client sent a request after its time."""
    client_share: float = 0.0
    """CPU time of this client over the time: near 1, the client and not the server may be what was measured."""


def drive(
    client: Client,
    load: Load,
    chains: Sequence[Chain],
    max_tokens: int,
    tag: str,
    seed: int = 0,
    closing: str = "",
    done: Callable[[], None] = lambda: None,
) -> Run:
    """Send everything; outcomes are in the order of the chains, turn by turn.

    Parameters
    ----------
    tag
        Ends the ids of the requests, which must be unique while they are in flight.
    closing
        What a model's chat format puts behind an answer.
    """
    stop = threading.Event()
    times = load.times(len(chains), seed)
    times = [at if chain.at is None else chain.at for at, chain in zip(times, chains)]
    threads = load.count if load.waits else min(MOST_THREADS, len(chains))
    late = [0.0] * len(chains)
    used = time.process_time()
    start = time.perf_counter()

    def one(number: int, chain: Chain, at: float) -> list[Timed]:
        pause = start + at - time.perf_counter()
        if pause > 0:
            stop.wait(pause)
        if not load.waits:
            late[number] = time.perf_counter() - start - at
        out: list[Timed] = []
        prompt = chain.turns[0]
        for turn in chain.turns:
            if stop.is_set():
                raise ServerError(f"prompt {turn.id}: stopped before it was sent")
            if out:
                prompt = follow(prompt, out[-1].completion, turn, closing)
            out.append(stream(client, Job(prompt, True, f"{prompt.id}/{tag}"), max_tokens))
            done()
        return out

    with ThreadPoolExecutor(max(1, threads)) as pool:
        futures = [pool.submit(one, i, chain, at) for i, (chain, at) in enumerate(zip(chains, times))]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for failed in (f for f in futures if f.done() and f.exception()):
                failed.result()
            outcomes = [timed for f in futures for timed in f.result()]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
    seconds = time.perf_counter() - start
    return Run(tuple(outcomes), seconds, max(late, default=0.0), (time.process_time() - used) / seconds)


def measure(run: Run, limits: Limits | None = None) -> dict[str, float]:
    """Return what one run shows, times in ms; what is not known is not there."""
    found = summarize(run.outcomes, run.seconds)
    prompt = sum(_count(t, "prompt_tokens") or len(t.job.prompt.ids) for t in run.outcomes)
    cached = sum(_count(t, "cached_tokens") for t in run.outcomes)
    whole = np.array([t.completion.seconds for t in run.outcomes]) * 1e3
    found |= {
        "requests": float(len(run.outcomes)),
        "prompt_tokens": float(prompt),
        "cached_tokens": float(cached),
        "e2e_p50_ms": float(np.percentile(whole, 50)),
        "e2e_p99_ms": float(np.percentile(whole, 99)),
        "client_late_ms": run.late * 1e3,
        "client_cpu_share": run.client_share,
    }
    if limits is not None:
        found["goodput"] = sum(_within(t, limits) for t in run.outcomes) / len(run.outcomes)
    return found


def _count(timed: Timed, name: str) -> int:
    return int(timed.completion.meta.get(name) or 0)


def _within(timed: Timed, limits: Limits) -> bool:
    # One token alone has no time per token, which is then no reason to count it as slow.
    slow = timed.tpot * 1e3 > limits.tpot_ms
    return timed.ttft * 1e3 <= limits.ttft_ms and not slow
