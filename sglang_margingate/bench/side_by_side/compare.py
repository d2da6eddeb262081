"""Side by side: the same prompts and arrivals on one server after another, in one session on one machine."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError, run_together
from sglang_margingate.bench.servers.gauges import BatchProof, Gauge
from sglang_margingate.bench.servers.process import GATE_ALONE
from sglang_margingate.bench.servers.timing import Arrivals, Job, run_workload, stream, summarize
from sglang_margingate.gate.stats import Rate


class Mode(NamedTuple):
    """One way to serve."""

    flags: tuple[str, ...]
    stock: bool = False
    """SGLang alone, without this package."""
    gated: bool = False
    """A request can opt out, so the share of deterministic traffic matters."""
    cuda: bool = False
    """It does not exist on a CPU."""


MODES: Mapping[str, Mode] = {
    "stock": Mode((), stock=True),
    "stock-flashinfer": Mode(
        ("--attention-backend", "flashinfer", "--cuda-graph-backend-prefill", "disabled"), stock=True, cuda=True
    ),
    "log": Mode(("--margingate-policy", "log")),
    "gate": Mode(GATE_ALONE, gated=True),
    "canonical": Mode(("--margingate-policy", "gate", "--margingate-fast-path", "canonical"), gated=True),
    "always": Mode(("--margingate-policy", "always"), gated=True),
    "deterministic": Mode(("--enable-deterministic-inference",), stock=True, cuda=True),
}
"""`stock` is SGLang with its own defaults for the machine, `stock-flashinfer` with what our servers are given on a GPU;
`canonical` is the gate on the canonical fast path; `deterministic` is SGLang's own mode and needs CUDA."""

WARM_UP_TOKENS = 8
WATCH_SECONDS = 0.25
"""Pause between looks at a stock server's gauge: each costs it a little, and only stock would pay."""

METRICS = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


@dataclass(frozen=True)
class Workload:
    """What every server gets."""

    prompts: tuple[Prompt, ...]
    arrivals: Arrivals = field(default_factory=Arrivals)
    max_tokens: int = 64
    repeats: int = 3
    shares: tuple[float, ...] = (100.0,)
    """Percent of requests that keep the server's policy; the others opt out."""
    seed: int = 0

    def jobs(self, share: float, repeat: int) -> list[Job]:
        """Return the requests of one run: the same order, ids and opt-outs on every server."""
        count = max(1, round(len(self.prompts) * share / 100))
        # The opt-outs of a share are the same in all repeats.
        kept = set(random.Random(f"{self.seed}:{share}").sample(range(len(self.prompts)), count))
        jobs = [Job(p, i in kept, f"{p.id}/{share:g}/{repeat}", repeat + 1) for i, p in enumerate(self.prompts)]
        random.Random(f"{self.seed}:order").shuffle(jobs)
        return jobs


@dataclass
class Cell:
    """One mode at one share of deterministic traffic."""

    mode: str
    share: float
    repeats: list[dict[str, float]] = field(default_factory=list)
    identical: Rate = field(default_factory=lambda: Rate(0, 0))
    """Deterministic requests whose tokens and finish reason equal the same prompt's alone."""
    triggered: Rate = field(default_factory=lambda: Rate(0, 0))
    flips: Rate = field(default_factory=lambda: Rate(0, 0))
    """Flips of verified steps."""
    proof: BatchProof = field(default_factory=BatchProof)

    def median(self, metric: str) -> float:
        """Return the median over the repeats; NaN without any."""
        return statistics.median(r[metric] for r in self.repeats) if self.repeats else float("nan")

    def spread(self, metric: str) -> tuple[float, float]:
        """Return the smallest and the largest value over the repeats."""
        values = [r[metric] for r in self.repeats] or [float("nan")]
        return min(values), max(values)


@dataclass
class Comparison:
    """Everything measured so far."""

    cells: list[Cell] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)
    """Folder of each mode's recorded run, for the dashboard."""
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """Modes that could not be measured, or not to the end, and why."""
    mode_flags: dict[str, list[str]] = field(default_factory=dict)
    """Flags that the user gave to some modes only."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know of this comparison."""

    def repeats_of(self, label: str) -> int:
        """Return how many runs of a mode were measured."""
        return sum(len(c.repeats) for c in self.cells if c.mode == label)

    def base(self) -> Cell | None:
        """Return the cell that the others are compared with: the first of stock."""
        return next((c for c in self.cells if c.mode == "stock" and c.repeats), None)

    def ratio(self, cell: Cell, metric: str) -> float:
        """Return a cell's median over stock's, in this session; NaN without stock."""
        return self._of_stock(cell.median(metric), metric)

    def ratio_spread(self, cell: Cell, metric: str) -> tuple[float, float]:
        """Return a cell's smallest and largest value over stock's median."""
        low, high = cell.spread(metric)
        return self._of_stock(low, metric), self._of_stock(high, metric)

    def _of_stock(self, value: float, metric: str) -> float:
        base = self.base()
        below = base.median(metric) if base is not None else 0.0
        return value / below if below else float("nan")


StartServer = Callable[[str, str], AbstractContextManager[Client]]
"""Starts the server of one mode; gets the label and the mode's name."""


def compare(
    modes: Sequence[str],
    workload: Workload,
    start: StartServer,
    result: Comparison,
    tell: Callable[[str, int], None] = lambda label, total: None,
    done: Callable[[], None] = lambda: None,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Measure the modes one after another into ``result``; a server that fails is noted, and the next one starts.

    Parameters
    ----------
    saved
        Called whenever ``result`` has grown, to keep what is there.
    """
    for label, mode in labels_of(modes, [*result.servers]):
        try:
            with start(label, mode) as client:
                _measure(client, label, mode, workload, result, tell, done, saved)
        except ServerError as error:
            result.failures[label] = str(error)
        saved()


def labels_of(modes: Sequence[str], taken: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Name each mode, and number one that comes again: measuring stock first and last shows the machine's drift."""
    seen: dict[str, int] = {}
    for label in taken:
        name = label.partition(" (")[0]
        seen[name] = seen.get(name, 0) + 1
    out = []
    for mode in modes:
        seen[mode] = seen.get(mode, 0) + 1
        out.append((mode if seen[mode] == 1 else f"{mode} ({seen[mode]})", mode))
    return out


def _measure(
    client: Client,
    label: str,
    mode: str,
    workload: Workload,
    result: Comparison,
    tell: Callable[[str, int], None],
    done: Callable[[], None],
    saved: Callable[[], None],
) -> None:
    status = _status(client)
    result.servers[label] = status
    if path := (status.get("trace") or {}).get("path"):
        result.runs[label] = path
    tell(f"{label}: alone", len(workload.prompts))
    alone = _alone(client, workload, done)
    _warm_up(client, workload)
    gauge = Gauge(client.base_url, pause=WATCH_SECONDS)
    for share in workload.shares if MODES[mode].gated else (100.0,):
        cell = Cell(label, share)
        result.cells.append(cell)
        for repeat in range(workload.repeats):
            which = f"{share:g}% deterministic, " if MODES[mode].gated else ""
            tell(f"{label}: {which}run {repeat + 1} of {workload.repeats}", len(workload.prompts))
            client.flush_cache()
            with gauge.watch() as proof:
                outcomes, seconds = run_workload(
                    client, workload.jobs(share, repeat), workload.arrivals, workload.max_tokens, done
                )
            cell.proof.add(proof)
            cell.repeats.append(summarize(outcomes, seconds))
            _count(cell, [t.completion for t in outcomes if t.job.deterministic], alone)
            saved()


def _alone(client: Client, workload: Workload, done: Callable[[], None]) -> dict[str, Completion]:
    """Complete each prompt alone: the reference of identity."""
    out = {}
    for prompt in workload.prompts:
        out[prompt.id] = stream(client, Job(prompt, True, f"{prompt.id}/alone", 0), workload.max_tokens).completion
        done()
    return out


def _warm_up(client: Client, workload: Workload) -> None:
    """Form a batch that is not counted: what a server compiles or allocates on its first one is no cost of a mode."""
    count = workload.arrivals.concurrency
    few = [replace(p, max_tokens=WARM_UP_TOKENS) for p in workload.prompts[:count]]
    client.flush_cache()  # a hit on a prompt that was run alone would leave nothing to prefill
    run_together(client, few, count)


def _status(client: Client) -> dict[str, Any]:
    """Return the server's status; SGLang's own server has none, and takes no parameters of ours."""
    try:
        return client.status()
    except ServerError as error:
        if "HTTP 404" not in str(error):
            raise
    client.tagged = False
    return {"policy": "off"}


def _count(cell: Cell, completions: Sequence[Completion], alone: Mapping[str, Completion]) -> None:
    def plus(rate: Rate, part: int, whole: int) -> Rate:
        return Rate(rate.numerator + part, rate.denominator + whole)

    same = sum(c.same_as(alone[c.prompt_id]) for c in completions)
    cell.identical = plus(cell.identical, same, len(completions))
    gates = [c.margingate for c in completions if c.margingate]
    cell.triggered = plus(cell.triggered, sum(g["triggers"] for g in gates), sum(g["steps"] for g in gates))
    cell.flips = plus(cell.flips, sum(g["flips"] for g in gates), sum(g["verified"] for g in gates))
