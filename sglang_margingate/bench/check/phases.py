"""The determinism check: the same prompts alone, together, staggered, among other traffic, with and without prefix hits."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from sglang_margingate.bench.check.identity import Runs
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError, run_alone, run_together
from sglang_margingate.bench.servers.gauges import BatchProof, Gauge
from sglang_margingate.bench.servers.openai_client import OpenAIClient

PHASES = {
    "alone": "one request at a time, empty prefix cache",
    "together": "all at once, in another order each time, empty prefix cache",
    "staggered": "arrivals spread over the decoding of others",
    "traffic": "among requests that sample at temperature 1",
    "cached": "together again, with the prompts still in the prefix cache",
    "prefix": "together, with only the first part of each prompt in the cache",
}
LOADED = tuple(p for p in PHASES if p != "alone")
PREFIX_SHARE = 0.6
"""Part of each prompt that the phase `prefix` puts into the cache."""


class StopCheck(Exception):
    """The first difference was found and nothing more is wanted."""


@dataclass(frozen=True)
class Plan:
    """What to run."""

    phases: tuple[str, ...] = tuple(PHASES)
    repeats: int = 2
    concurrency: int = 16
    max_tokens: int = 64
    stagger: float = 1.0
    """Seconds over which arrivals are spread."""
    background: int = 4
    """Sampling requests kept running in the phase `traffic`."""
    seed: int = 0
    fail_fast: bool = False


@dataclass
class PhaseResult:
    """What one phase showed, all repeats together."""

    name: str
    requests: int = 0
    seconds: float = 0.0
    cached_tokens: int = 0
    """Prompt tokens that the server took from its prefix cache."""
    flushed: bool | None = None
    """Whether the prefix cache was emptied first; None where that was not asked for."""
    proof: BatchProof = field(default_factory=BatchProof)


@dataclass
class CheckResult:
    """Everything that the check saw."""

    plan: Plan
    runs: Runs = field(default_factory=Runs)
    phases: dict[str, PhaseResult] = field(default_factory=dict)
    guarantees: Counter[str] = field(default_factory=Counter)
    error: str = ""
    """Why the check ended early; empty when it is complete."""
    stopped_at_first: bool = False

    @property
    def proof(self) -> BatchProof:
        """The loaded phases' batches."""
        total = BatchProof()
        for phase in self.phases.values():
            if phase.name in LOADED:
                total.add(phase.proof)
        return total

    @property
    def company(self) -> BatchProof | None:
        """What ran beside the requests of the phase `alone`, where it was not alone: they are no reference then."""
        alone = self.phases.get("alone")
        return alone.proof if alone is not None and alone.proof.largest > 1 else None

    @property
    def unproven(self) -> list[str]:
        """Loaded phases in which a gauge exists but showed no batch of two."""
        return [p.name for p in self.phases.values() if p.name in LOADED and p.proof.source and p.proof.largest < 2]


def run_check(
    client: Client | OpenAIClient,
    prompts: Sequence[Prompt],
    plan: Plan,
    gauge: Gauge,
    tell: Callable[[str, int], None] = lambda phase, total: None,
    done: Callable[[], None] = lambda: None,
    runs: Runs | None = None,
) -> CheckResult:
    """Run the phases; a dying server or Ctrl-C ends the check early and keeps what it has.

    Parameters
    ----------
    tell
        Called at each phase's start with its label and number of requests.
    done
        Called after each request.
    runs
        Answers to compare with, such as recorded ones.
    """
    result = CheckResult(plan, runs or Runs())
    try:
        for number, (name, repeat) in enumerate(product(plan.phases, range(plan.repeats))):
            tell(f"{name} #{repeat + 1}", len(prompts))
            _phase(client, prompts, plan, gauge, result, name, repeat, number, done)
    except StopCheck:
        result.stopped_at_first = True
    except ServerError as error:
        result.error = str(error)
    except KeyboardInterrupt:
        result.error = "interrupted"
    return result


def _phase(
    client: Client | OpenAIClient,
    prompts: Sequence[Prompt],
    plan: Plan,
    gauge: Gauge,
    result: CheckResult,
    name: str,
    repeat: int,
    number: int,
    done: Callable[[], None],
) -> None:
    phase = result.phases.setdefault(name, PhaseResult(name))
    run = f"{name} #{repeat + 1}"

    def keep(completion: Completion) -> None:
        phase.requests += 1
        phase.cached_tokens += int(completion.meta.get("cached_tokens") or 0)
        if name == "alone" and phase.requests == 1 and not gauge.exact:
            proof.by_rows.clear()  # a sampled gauge may lag, and show what ran before
        if completion.margingate:
            result.guarantees[str(completion.margingate.get("guarantee"))] += 1
        same = result.runs.add(run, completion)
        if not same and plan.fail_fast:
            raise StopCheck

    _prepare(client, prompts, plan, phase)
    start = time.perf_counter()
    options: dict[str, Any] = {"max_new_tokens": plan.max_tokens, "done": done, "on_result": keep}
    options["custom"] = {"margingate_repeat": number}
    watch = gauge.watch()
    try:
        with watch as proof:
            if name == "alone":
                run_alone(client, prompts, **options)
            else:
                order = list(prompts)
                random.Random(f"{plan.seed}:{name}:{repeat}").shuffle(order)
                run_together(
                    client,
                    order,
                    plan.concurrency,
                    stagger_seconds=plan.stagger if name == "staggered" else 0.0,
                    background=_background(prompts, plan) if name == "traffic" else (),
                    seed=plan.seed + repeat,
                    **options,
                )
    finally:
        phase.seconds += time.perf_counter() - start
        phase.proof.add(proof)


def _prepare(client: Client | OpenAIClient, prompts: Sequence[Prompt], plan: Plan, phase: PhaseResult) -> None:
    if phase.name == "cached":
        return
    phase.flushed = client.flush_cache()
    if phase.name == "prefix":
        heads = [_head(p) for p in prompts]
        run_together(client, heads, plan.concurrency, max_new_tokens=1)


def _head(prompt: Prompt) -> Prompt:
    if prompt.ids:
        cut = int(len(prompt.ids) * PREFIX_SHARE)
        return replace(prompt, ids=prompt.ids[: max(1, cut)], max_tokens=1)
    cut = int(len(prompt.text) * PREFIX_SHARE)
    space = prompt.text.rfind(" ", 0, cut)
    return replace(prompt, text=prompt.text[: space if space > 0 else max(1, cut)])


def _background(prompts: Sequence[Prompt], plan: Plan) -> list[Prompt]:
    chosen = random.Random(plan.seed).sample(list(prompts), min(plan.background, len(prompts)))
    return [replace(prompt, draw=()) for prompt in chosen]  # they have no seed
