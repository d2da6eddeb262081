"""Requests: what is known when one is opened, and what is told of it when it has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from margingate_kernels.seeded import Draw

from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.claims import Asked
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams, RequestRules, digest
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.seeded.draws import reach
from sglang_margingate.runtime.state import UNLIMITED, RequestState

log = logging.getLogger(__name__)

HEALTH_CHECK_PREFIX = "HEALTH_CHECK"


@dataclass(frozen=True)
class Opened:
    """What SGLang tells of a new request."""

    request_id: str
    custom_params: object
    greedy: bool
    temperature: float = 0.0
    seed: int | None = None
    top_k: int = 0
    """0: no filter."""
    top_p: float = 1.0
    min_p: float = 0.0
    custom_processor: bool = False
    """It brings a custom logit processor."""
    penalised: bool = False
    """It asks for frequency, presence or repetition penalties, or for a least number of tokens."""
    most_tokens: int | None = None
    """Tokens that it asks for at most."""


@dataclass(frozen=True)
class Ended:
    """What SGLang tells of a request that has ended."""

    shown: int
    """Tokens of the answer."""
    finish: str
    """stop, length or abort."""
    retractions: int = 0
    prompt: Callable[[], list[int]] = field(default=list)
    """Returns the prompt's tokens."""
    output: Callable[[], list[int]] = field(default=list)
    """Returns the answer's tokens."""
    digest: Callable[[], str] | None = None
    """Returns the digest of the generated K/V columns; None where nobody asked."""
    asked: Asked | None = None
    """Log-probabilities that it asks for."""


class Requests:
    """Opens and closes requests.

    Parameters
    ----------
    config
        The server's configuration.
    recorder
        Takes the steps of the requests.
    labels
        What the server may claim.
    sink
        Takes request rows (``add_request``), or None.
    text
        Returns the text of tokens, or None where the run records none.
    schedulers
        Which scheduler of the server this is, counted from 0, and of how many.
    """

    def __init__(
        self, config: MarginGateConfig, recorder: Recorder, labels: Labels, sink: Any,
        text: Callable[[list[int]], str | None] = lambda _: None, schedulers: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.rules = RequestRules(config)
        self._config, self._recorder, self._labels, self._sink, self._text = config, recorder, labels, sink, text
        self._opened, (self._first, self._schedulers) = 0, schedulers

    def _number(self) -> int:
        """Return the number of the request that was opened last, which no scheduler of the run gives to another."""
        return (self._opened - 1) * self._schedulers + self._first + 1 if self._opened else 0

    def open(self, new: Opened) -> RequestState:
        """Return the state of a new request."""
        try:
            params = self.rules.parse(new.custom_params)
        except ValueError as error:
            # The launcher answers these with HTTP 400; only an embedding of the engine without it gets here.
            log.warning("margingate: request %s: %s; served without a guarantee", new.request_id, error)
            params = RequestParams(Policy.OFF, 0.0, "", False)
        hidden = new.request_id.startswith(HEALTH_CHECK_PREFIX)
        if hidden:
            params = RequestParams(Policy.OFF, 0.0, "", False)
        else:
            self._opened += 1
        ledger = RequestLedger(new.request_id, params, self._config.repair, _why_ungated(new), self._number())
        scoring = new.most_tokens == 0
        draw = None if scoring or params.policy is Policy.OFF else _draw(new, params.threshold)
        chosen = new.greedy or scoring or draw is not None
        state = RequestState(ledger, hidden=hidden, plain=chosen and not new.custom_processor, draw=draw)
        state.temperature = 0.0 if new.greedy else new.temperature
        state.penalised = new.penalised
        if new.most_tokens is not None:
            state.most_tokens = new.most_tokens
        if params.return_steps:
            state.steps = {"margin": [], "verified": [], "flipped": [], "reason": []}
        return state

    def finish(self, state: RequestState, ended: Ended) -> dict[str, Any] | None:
        """Close a request's record and return its summary; None where it was closed before or is none of ours."""
        if state.closed:
            return None
        self._recorder.finish(state, ended.shown)
        if state.hidden:
            return None
        self._recorder.totals.requests += 1
        guarantee, note = self._labels.label(state, ended.shown, ended.finish == "abort")
        scores = self._labels.logprobs(state, guarantee, ended.shown, ended.asked)
        about = self._about(state, ended)
        label = {"guarantee": guarantee.value, "guarantee_note": note, "logprobs": scores}
        fingerprint = {"system_fingerprint": self._labels.fingerprint}
        if self._sink is not None:
            row = {**about, **self._times(state, ended.shown), **label, **self._identity(state, ended)}
            self._sink.add_request({**row, "finish_reason": ended.finish, "prompt_text": self._text(ended.prompt())})
        summary = {**about, "steps": state.ledger.counters.steps, "repaired": state.ledger.counters.repaired, **label,
                   **fingerprint}  # fmt: skip
        for name in ("prompt_tokens", "output_tokens"):
            del summary[name]  # SGLang tells them itself
        summary["verify_ms"] = round(summary["verify_ms"], 3)
        if state.steps is not None:
            summary["per_token"] = state.steps
        if ended.digest is not None:
            summary["kv_digest"] = ended.digest()
        return summary

    @staticmethod
    def _about(state: RequestState, ended: Ended) -> dict[str, Any]:
        """Return what summary and trace row share."""
        c, ledger = state.ledger.counters, state.ledger
        return {
            "request": ledger.number,
            "policy": ledger.params.policy.value,
            "repair": ledger.repair.value,
            "threshold": ledger.params.threshold,
            "dataset": ledger.params.dataset,
            "temperature": state.temperature,
            "seed": None if state.draw is None else state.draw.seed,
            "prompt_tokens": state.prompt_tokens,
            "output_tokens": ended.shown,
            "triggers": c.triggers,
            "structural": c.structural,
            "verified": c.verified,
            "audited": c.audited,
            "flips": c.flips,
            "missed": c.missed,
            "verify_ms": c.verify_ms,
            "cached_tokens": state.cached_tokens,
            "floored_tokens": state.floored_tokens,
            "prefill_chunks": state.prefill_chunks,
            "retractions": ended.retractions,
            "max_batch_rows": state.max_batch_rows,
        }

    @staticmethod
    def _identity(state: RequestState, ended: Ended) -> dict[str, Any]:
        """Return what tells equal prompts and equal answers, within a run and across runs."""
        return {
            "request_id": state.ledger.request_id,
            "prompt_digest": digest(ended.prompt()),
            "output_digest": digest(ended.output()),
            "greedy": state.temperature == 0.0,
            "steps": state.ledger.counters.steps,
            "max_tokens": None if state.most_tokens == UNLIMITED else state.most_tokens,
            "repeat": state.ledger.params.repeat,
        }

    @staticmethod
    def _times(state: RequestState, shown: int) -> dict[str, Any]:
        first, last = state.first_token_time, state.last_token_time
        e2e_ms = max(0.0, ((time.time() if last is None else last) - state.arrival) * 1e3)
        verify_ms = state.ledger.counters.verify_ms
        return {
            "time": state.arrival,
            "ttft_ms": None if first is None else max(0.0, (first - state.arrival) * 1e3),
            "tpot_ms": None if first is None or last is None or shown < 2 else (last - first) * 1e3 / (shown - 1),
            "e2e_ms": e2e_ms,
            "prefill_ms": state.prefill_ms,
            "hold_ms": 0.0,
            "overhead_ms": verify_ms,
            "overhead_share": verify_ms / e2e_ms if e2e_ms else 0.0,
        }


def _why_ungated(new: Opened) -> str | None:
    """Return why a request's steps cannot be verified, or None where they can."""
    if new.custom_processor:
        return "a custom logit processor may keep state, so its steps are not verified"
    if not new.greedy and new.most_tokens != 0 and new.seed is None:
        return f"sampled at temperature {new.temperature:g} without a seed: a sampling_seed (OpenAI: seed) makes it repeatable"
    return None


def _draw(new: Opened, threshold: float) -> Draw | None:
    """Return how a request's tokens are drawn, None where they are not drawn by us."""
    if new.greedy or new.seed is None or new.custom_processor:
        return None
    return Draw(new.seed, new.temperature, new.top_k, new.top_p, new.min_p, reach(threshold))
