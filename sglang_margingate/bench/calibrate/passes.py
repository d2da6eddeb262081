"""Calibration against a running server: shadow verifies at one threshold, the next threshold, and a confirming pass.

At threshold T the server repairs the steps that trigger and shadow-verifies all others (``--margingate-audit-rate 1.0``),
so the (margin, flipped) pairs are exactly what the gate at T meets: the columns that a step reads were left as the gate
leaves them. A smaller threshold repairs less, so the numbers recorded at T hold for it only approximately. Therefore the
chosen threshold is put to the test in a pass of its own, and the final numbers are that pass's.

Flips depend on the batch: a step whose batch happens to have the canonical shape cannot flip at all. (On a CPU, oneDNN's
bf16 products differ between one row and several, not between 4 and 16, and 16 is the default verify shape: a sample at
16 requests in flight alone would show no flip.) So the prompts are dealt over several concurrency levels, 1 included.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_margingate.bench.calibrate.samples import SampleStore, covering
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError, run_together
from sglang_margingate.bench.servers.process import GATE_ALONE
from sglang_margingate.gate.calibration import Calibration, threshold_for
from sglang_margingate.gate.profile import enough_evidence
from sglang_margingate.gate.stats import Rate

SERVER_FLAGS = (*GATE_ALONE, "--margingate-audit-rate", "1.0")
"""What a server needs to be calibrated: every step is verified, those that do not trigger for the record only."""

MAX_PASSES = 4


@dataclass(frozen=True)
class Goal:
    """What the thresholds must reach, and how the sample is made."""

    target_miss: float = 0.0
    confidence: float = 0.95
    use_tail: bool = False
    """Take the threshold of the tail fit where it is the larger one."""
    refine: bool = True
    """Confirm the chosen threshold in a pass of its own."""
    max_tokens: int = 64
    levels: tuple[int, ...] = (1, 4, 16)
    """Requests in flight; each dataset's prompts are dealt over them in turn."""
    seed: int = 0


@dataclass(frozen=True)
class Pass:
    """One dataset's sample at one threshold."""

    recorded_at: float
    """Threshold in force while the sample was recorded."""
    triggered: Rate
    flips: Rate
    missed: Rate
    """Flips above that threshold."""
    calibration: Calibration
    """The choice that the sample suggests."""
    chosen: float
    """Its threshold, or the tail fit's where that was asked for and is larger."""


@dataclass
class DatasetResult:
    """One dataset's way to its threshold."""

    dataset: str
    prompts: int
    passes: list[Pass] = field(default_factory=list)
    transferred: bool = False
    """The threshold came from other datasets; the pass only measures it here."""

    @property
    def threshold(self) -> float:
        """The final threshold in logits."""
        return self.last.recorded_at if self.confirmed else self.last.chosen

    @property
    def last(self) -> Pass:
        """The pass that the final numbers come from."""
        return self.passes[-1]

    @property
    def enough(self) -> bool:
        """Whether the last pass holds the evidence that a threshold needs, whatever it showed."""
        return enough_evidence(self.last.flips.denominator, self.last.flips.numerator)

    @property
    def confirmed(self) -> bool:
        """Whether the last pass ran at the final threshold and met the target there."""
        if not self.passes:
            return False
        if self.transferred:
            return True
        ran_at = self.last.recorded_at
        return self.last.calibration.threshold <= ran_at and (len(self.passes) > 1 or self.last.chosen == ran_at)


class NeedsServer(Exception):
    """Something is left to measure, and there is no server to measure it on."""


class NoServer:
    """Stands for a server that is not needed: every sample is on disk."""

    base_url = ""

    def generate(self, *_: Any, **__: Any) -> Completion:
        """Refuse: only a server can."""
        raise NeedsServer

    def flush_cache(self) -> bool:
        """Return False: there is no cache."""
        return False


class _ShadowClient:
    """Sends each prompt at its dataset's threshold and asks for the steps."""

    def __init__(self, client: Client | NoServer, thresholds: dict[str, float]) -> None:
        self.client, self.base_url, self.thresholds = client, client.base_url, thresholds

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
    ) -> Completion:
        wishes = {
            "margingate_policy": "gate",
            "margingate_threshold": self.thresholds[prompt.dataset],
            "margingate_return_steps": True,
        }
        return self.client.generate(prompt, max_new_tokens, sampling, {**wishes, **(custom or {})})

    def flush_cache(self) -> bool:
        return self.client.flush_cache()


def check_server(client: Client) -> dict[str, Any]:
    """Return the server's status, or say in one line why it cannot be calibrated.

    Raises
    ------
    ServerError
        Unreachable, not margingate's, or started with other flags than calibration needs.
    """
    need = f"start it with {' '.join(SERVER_FLAGS)}"
    try:
        status = client.status()
    except ServerError as error:
        if "HTTP" in str(error):
            raise ServerError(f"{client.base_url} is not a margingate server (no /margingate/status); {need}") from None
        raise
    if status.get("policy") not in ("gate", "always"):
        raise ServerError(f"the server runs policy {status.get('policy')!r}, which verifies nothing; {need}")
    if status.get("fast_path") == "canonical":
        raise ServerError(
            f"the server runs the canonical fast path, where nearly no step flips and none is tuned; {need}"
        )
    if status.get("audit_rate") != 1.0:
        rate = status.get("audit_rate")
        raise ServerError(f"the server audits a share of {rate} of untriggered steps, calibration needs all; {need}")
    return status


class Calibrator:
    """Runs passes over prompts and keeps what they showed.

    Parameters
    ----------
    client
        Of a server that :func:`check_server` accepts.
    prompts
        Rendered prompts of all datasets.
    store
        Where samples go, opened.
    tell, done
        Progress: called at each pass's start with a label and the number of prompts, and after each prompt.
    """

    def __init__(
        self,
        client: Client | NoServer,
        prompts: Sequence[Prompt],
        goal: Goal,
        store: SampleStore,
        tell: Callable[[str, int], None] = lambda label, total: None,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self.client, self.goal, self.store, self.tell, self.done = client, goal, store, tell, done
        self.prompts: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self.prompts.setdefault(prompt.dataset, []).append(prompt)
        levels = goal.levels
        self._level = {p.id: levels[i % len(levels)] for ps in self.prompts.values() for i, p in enumerate(ps)}
        self.results: dict[str, DatasetResult] = {}

    def flips_by_level(self) -> dict[int, Rate]:
        """Return the flips of each concurrency level, over the datasets' last passes."""
        found: dict[int, Rate] = {}
        for level in self.goal.levels:
            flips = steps = 0
            for name, result in self.results.items():
                ids = [p.id for p in self.prompts[name] if self._level[p.id] == level]
                _, flipped = self.store.sample(name, result.last.recorded_at, ids)
                flips, steps = flips + int(flipped.sum()), steps + int(flipped.size)
            found[level] = Rate(flips, steps)
        return found

    def run(self, datasets: Sequence[str], start: float) -> dict[str, DatasetResult]:
        """Calibrate the datasets, in mixed traffic, from the threshold ``start``."""
        thresholds = dict.fromkeys(datasets, start)
        open_ = list(datasets)
        for number in range(MAX_PASSES if self.goal.refine else 1):
            label = f"pass {number + 1}" if number == 0 else f"pass {number + 1} (confirming)"
            self._record({d: thresholds[d] for d in open_}, label)
            for name in list(open_):
                result = self._result(name)
                result.passes.append(self._judge(name, thresholds[name]))
                if result.confirmed:
                    open_.remove(name)
                thresholds[name] = result.threshold
            if not open_:
                break
        return self.results

    def carry(self, datasets: Sequence[str], threshold: float) -> None:
        """Measure a threshold that other datasets gave on these."""
        self._record(dict.fromkeys(datasets, threshold), f"transfer at {threshold:g}")
        for name in datasets:
            result = self._result(name)
            result.transferred = True
            result.passes.append(self._judge(name, threshold))

    def sample(self, name: str) -> Any:
        """Return a dataset's sample of its last pass."""
        return self.store.sample(name, self.results[name].last.recorded_at, [p.id for p in self.prompts[name]])

    def _result(self, name: str) -> DatasetResult:
        return self.results.setdefault(name, DatasetResult(name, len(self.prompts[name])))

    def _record(self, thresholds: dict[str, float], label: str) -> None:
        todo = [p for name, tau in thresholds.items() for p in self._missing(name, tau)]
        total = sum(len(self.prompts[name]) for name in thresholds)
        self.tell(label, total)
        for _ in range(total - len(todo)):
            self.done()
        if todo and isinstance(self.client, NoServer):
            raise NeedsServer
        random.Random(f"{self.goal.seed}:{label}").shuffle(todo)
        dataset_of = {p.id: p.dataset for p in todo}
        shadow = _ShadowClient(self.client, thresholds)
        for level in self.goal.levels:

            def keep(completion: Completion, level: int = level) -> None:
                name = dataset_of[completion.prompt_id]
                self.store.add(name, thresholds[name], completion, level)

            batch = [p for p in todo if self._level[p.id] == level]
            options: dict[str, Any] = {"done": self.done, "on_result": keep, "max_new_tokens": self.goal.max_tokens}
            run_together(shadow, batch, level, **options)

    def _missing(self, name: str, threshold: float) -> list[Prompt]:
        done = self.store.done(name, threshold)
        return [p for p in self.prompts[name] if p.id not in done]

    def _judge(self, name: str, threshold: float) -> Pass:
        margins, flipped = self.store.sample(name, threshold, [p.id for p in self.prompts[name]])
        found = threshold_for(margins, flipped, self.goal.target_miss, self.goal.confidence)
        found = replace(found, threshold=covering(found.threshold))
        tau = found.threshold
        if self.goal.use_tail and found.best_tail is not None:
            tau = max(tau, found.best_tail.threshold)
        steps = int(margins.size)
        return Pass(
            recorded_at=threshold,
            triggered=Rate(int((margins <= threshold).sum()), steps),
            flips=Rate(int(flipped.sum()), steps),
            missed=Rate(int((flipped & (margins > threshold)).sum()), steps),
            calibration=found,
            chosen=tau,
        )
