"""Loads on several servers in rounds: each round visits every server, so that what drifts meets all of them alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sglang_margingate.bench.servers.client import Client, Prompt, ServerError, run_together
from sglang_margingate.bench.servers.gauges import BatchProof, Gauge
from sglang_margingate.bench.servers.timing import Timed
from sglang_margingate.bench.workload.alone import Identity, References
from sglang_margingate.bench.workload.drive import drive, measure
from sglang_margingate.bench.workload.loads import Limits, Load
from sglang_margingate.bench.workload.requests import Chain
from sglang_margingate.bench.workload.watch import Watcher, check_pool, pool_of

WARM_UP_TOKENS = 8
WATCH_SECONDS = 0.25
"""Pause between looks at a stock server's gauge: each costs it a little, and only stock would pay."""


@dataclass(frozen=True)
class Work:
    """What every server gets."""

    loads: Mapping[Load, tuple[Chain, ...]]
    max_tokens: int = 64
    rounds: int = 3
    limits: Limits | None = None
    identity: str = "all"
    """Whose sequences are compared with their runs alone: all, promised (servers that claim identity), none."""
    closing: str = ""
    seed: int = 0


@dataclass
class Cell:
    """One load on one server."""

    label: str
    load: Load
    rounds: list[dict[str, float]] = field(default_factory=list)
    identity: Identity | None = None
    """None: not looked at."""
    proof: BatchProof = field(default_factory=BatchProof)
    kept: list[tuple[Timed, ...]] = field(default_factory=list, repr=False)
    """Outcomes that are not compared yet."""

    def median(self, metric: str) -> float:
        """Return the median over the rounds; NaN where no round has the number."""
        values = [r[metric] for r in self.rounds if not math.isnan(r.get(metric, math.nan))]
        return statistics.median(values) if values else math.nan


@dataclass
class Served:
    """A running server under its label."""

    label: str
    client: Client
    promises: bool = False
    """It says that all its answers are deterministic: SGLang's own mode."""
    references: References | None = None


@dataclass
class Results:
    """Everything measured so far."""

    cells: list[Cell] = field(default_factory=list)
    servers: dict[str, dict[str, Any]] = field(default_factory=dict)
    alone: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mode_flags: dict[str, list[str]] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)
    """In the order asked for; the first is what the others are compared with."""

    def cell(self, label: str, load: Load) -> Cell:
        """Return one cell, a new one where there is none."""
        for found in self.cells:
            if (found.label, found.load) == (label, load):
                return found
        self.cells.append(Cell(label, load))
        return self.cells[-1]

    def ratios(self, cell: Cell, metric: str) -> list[float]:
        """Return a cell's numbers over the first server's, round by round; empty without both."""
        first = next((c for c in self.cells if c.label == self.labels[0] and c.load == cell.load), None)
        pairs = zip(cell.rounds, first.rounds) if first is not None else ()
        found = [(a.get(metric, math.nan), b.get(metric, math.nan)) for a, b in pairs]
        return [a / b for a, b in found if b and not math.isnan(a) and not math.isnan(b)]

    def broken(self) -> list[Cell]:
        """Return the cells in which a sequence that claimed identity has it not."""
        return [c for c in self.cells if c.identity is not None and c.identity.broken]


class Teller(Protocol):
    """Shows what is being done."""

    def phase(self, label: str, total: int) -> None:
        """Begin with something that has ``total`` requests."""
        ...

    def done(self) -> None:
        """One request is done."""
        ...


def connect(label: str, client: Client, work: Work, results: Results) -> Served:
    """Get to know a server, and refuse a load that it cannot hold."""
    info = _get(client, "/server_info") or {}
    status = _get(client, "/margingate/status")
    client.tagged = status is not None  # SGLang's own server takes no parameters of ours
    pool = pool_of(client)
    for load, chains in work.loads.items():
        check_pool(label, pool, load, list(chains), work.max_tokens)
    results.servers[label] = {
        "policy": "off" if status is None else status.get("policy"),
        "pool_tokens": pool.tokens,
        "max_running_requests": pool.requests,
        "attention_backend": info.get("attention_backend"),
        "status": status,
    }
    return Served(label, client, promises=bool(info.get("enable_deterministic_inference")))


def _get(client: Client, path: str) -> dict[str, Any] | None:
    try:
        found = client.get(path)
    except ServerError as error:
        if "HTTP 404" not in str(error):
            raise
        return None
    return found if isinstance(found, dict) else None


def warm_up(server: Served, work: Work) -> None:
    """Form batches that are not counted: what a server compiles or allocates on its first ones is no cost of a mode."""
    for load, chains in work.loads.items():
        count = min(load.in_flight or WARM_UP_TOKENS, len(chains))
        few = [replace(c.turns[0], max_tokens=WARM_UP_TOKENS) for c in chains[:count]]
        server.client.flush_cache()
        run_together(server.client, few, count)


def run_rounds(
    servers: Sequence[Served], work: Work, results: Results, tell: Teller, saved: Callable[[], None] = lambda: None
) -> None:
    """Run every load in every round on every server; a server that fails is noted and left out from then on.

    The order of the servers turns round from one round to the next.
    """
    living = list(servers)
    for number in range(work.rounds):
        for load in work.loads:
            for server in living[:: 1 if number % 2 == 0 else -1]:
                tell.phase(f"{server.label}: {load.name}, round {number + 1} of {work.rounds}", _requests(work, load))
                try:
                    run_once(server, load, number, work, results, tell)
                except ServerError as error:
                    results.failures[server.label] = str(error)
                    living.remove(server)
                saved()


def run_once(server: Served, load: Load, number: int, work: Work, results: Results, tell: Teller) -> None:
    """Run one load on one server, once, and keep what came back."""
    client, cell = server.client, results.cell(server.label, load)
    client.flush_cache()
    gauge = Gauge(client.base_url, client.api_key, WATCH_SECONDS)
    with gauge.watch() as proof, Watcher(client) as seen:
        run = drive(
            client, load, work.loads[load], work.max_tokens, f"{load.name}/{number}", work.seed, work.closing, tell.done
        )
    cell.proof.add(proof)
    cell.rounds.append({**measure(run, work.limits), **seen.facts(run.seconds)})
    if work.identity != "none":
        cell.kept.append(run.outcomes)


def compare_alone(
    server: Served, work: Work, results: Results, tell: Teller, saved: Callable[[], None] = lambda: None
) -> None:
    """Run each sequence of what a server was given alone, and count how many are the same."""
    cells = [c for c in results.cells if c.label == server.label and c.kept]
    if work.identity == "promised" and not server.promises:
        policy = results.servers[server.label]["policy"]
        cells = cells if policy in ("gate", "always") else []
    for cell in cells:
        prompts = [timed.job.prompt for outcomes in cell.kept for timed in outcomes]
        try:
            fill_alone(server, prompts, work, tell, results)
        except ServerError as error:
            results.failures[server.label] = str(error)
            return
        assert server.references is not None
        cell.identity = cell.identity or Identity()
        for outcomes in cell.kept:
            server.references.compare(outcomes, work.max_tokens, cell.identity)
        cell.kept.clear()
        saved()


def fill_alone(server: Served, prompts: Sequence[Prompt], work: Work, tell: Teller, results: Results) -> None:
    """Run these alone, where they have not run so yet."""
    if server.references is None:
        server.references = References(server.client, server.promises)
    missing = server.references.missing(prompts, work.max_tokens)
    if missing:
        tell.phase(f"{server.label}: alone", len(missing))
    try:
        server.references.fill(missing, work.max_tokens, tell.done)
    finally:
        results.alone[server.label] = server.references.to_dict()


def _requests(work: Work, load: Load) -> int:
    return sum(len(c.turns) for c in work.loads[load])
