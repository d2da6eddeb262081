"""Everything the hooks share in one scheduler process: configuration, verifier, trace, counters."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from sglang_margingate.canonical.classes import FastPath
from sglang_margingate.canonical.selftest import SelfTestResult
from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.audit import AuditCounter, AuditSampler
from sglang_margingate.gate.ledger import Counters, RequestLedger
from sglang_margingate.gate.policy import missed
from sglang_margingate.gate.request import RequestParams, RequestRules
from sglang_margingate.gate.stats import Rate
from sglang_margingate.machine import device_name, model_name
from sglang_margingate.serving.metrics import Metrics
from sglang_margingate.serving.prefill import PrefillRules
from sglang_margingate.serving.radix_names import namespace, uses_backend
from sglang_margingate.serving.state import ATTRIBUTE, RequestState, StepRow, state_of
from sglang_margingate.serving.summary import PerRequest
from sglang_margingate.serving.testknobs import TestKnobs, column_digest
from sglang_margingate.serving.verifier import EagerVerifier, VerifyResult
from sglang_margingate.words import Guarantee, Reason

log = logging.getLogger(__name__)

HEALTH_CHECK_PREFIX = "HEALTH_CHECK"

SETTLE_ROWS, SETTLE_SECONDS = 256, 0.2
"""Committed steps are settled at that many, or when the last settling is that long ago."""


@dataclass
class Totals(Counters):
    """Counts since start, over committed steps and finished requests."""

    requests: int = 0
    ledger_errors: int = 0


class Runtime:
    """The state of margingate in one scheduler process.

    Parameters
    ----------
    config
        The server's configuration.
    scheduler
        SGLang's ``Scheduler``.
    verifier
        None where the policy never verifies.
    self_test
        Result of the start-up self-test; None where there is nothing to test.
    writer
        Trace writer, or None with the trace off.
    metrics
        Prometheus counters.
    fast
        The canonical fast path, where it is used.
    """

    def __init__(
        self,
        config: MarginGateConfig,
        scheduler: Any,
        verifier: EagerVerifier | None,
        self_test: SelfTestResult | None,
        writer: Any,
        metrics: Metrics,
        fast: FastPath | None = None,
    ) -> None:
        self.config, self.scheduler, self.verifier = config, scheduler, verifier
        self.self_test, self.writer, self.metrics, self.fast = self_test, writer, metrics, fast
        self.rules = RequestRules(config)
        self.prefill_rules = PrefillRules(config, isolated=fast is None or fast.trial.prefill != "batched")
        self.knobs = TestKnobs()
        self.totals = Totals()
        self.audit = AuditCounter()
        self.started = time.time()
        self.batch_rows: Counter[int] = Counter()
        self.batch_rows_now = 0
        self.weights = 0
        """How often the weights were changed since the start; names the columns that gated requests may share."""
        self.lowered: list[str] = []
        self._over_limit = False
        self._numbers = count(1)
        self.trace_text = config.trace and config.trace_text
        self._sampler = AuditSampler(config.audit_rate, seed=0)
        self._committed: list[StepRow] = []  # not settled yet
        self._settled = 0.0  # time of the last settling

    def lower(self, reason: str) -> None:
        """Claim no guarantee from now on, requests in flight included: what was checked at the start no longer holds."""
        if reason not in self.lowered:
            log.warning("margingate: %s; every response claims no guarantee until the server is started again", reason)
            self.lowered.append(reason)

    # ---- requests -------------------------------------------------------------------------------------------------

    def open_request(self, req: Any) -> RequestState:
        """Attach a state to a new request, and choose its name space in the radix cache."""
        params_in = req.sampling_params.custom_params
        try:
            params = self.rules.parse(params_in)
        except ValueError as error:
            # The launcher answers these with HTTP 400; only an embedding of the engine without it gets here.
            log.warning("margingate: request %s: %s; served without a guarantee", req.rid, error)
            params = RequestParams(Policy.OFF, 0.0, "", False)
        greedy = req.sampling_params.top_k <= 1
        ledger = RequestLedger(req.rid, params, self.config.repair, greedy)
        if greedy and params.policy.verifies and req.custom_logit_processor is not None:
            ledger.greedy = False
            ledger.notes.append("a custom logit processor may keep state, so its steps are not verified")
        state = RequestState(ledger, number=next(self._numbers))
        if uses_backend(self.config):
            req.extra_key = namespace(ledger.gated, req.extra_key, req.lora_id, self.weights)
        if params.return_steps:
            state.steps = {"margin": [], "verified": [], "flipped": [], "reason": []}
        setattr(req, ATTRIBUTE, state)
        return state

    def audits(self, request_id: str, step: int) -> bool:
        """Return whether this step is drawn for the audit, whoever else is in the batch."""
        return self.config.audit_rate > 0 and self._sampler.draw(request_id, step)

    # ---- committed steps ------------------------------------------------------------------------------------------

    def commit(self, state: RequestState) -> None:
        """The pending step's token is part of the output; it is counted and traced by the next :meth:`settle`."""
        if state.pending is not None:
            self._committed.append(state.pending)
        state.pending = None

    def settle_when_due(self, now: float) -> None:
        """Settle once enough steps were committed; called after every forward."""
        if len(self._committed) >= SETTLE_ROWS or now - self._settled >= SETTLE_SECONDS:
            self._settled = now
            self.settle()

    def settle(self) -> None:
        """Count the committed steps and hand their rows to the trace.

        Not step by step: between two forwards the core's caches are cold and this takes three times as long.
        """
        steps, self._committed = self._committed, []
        rows = []
        for step in steps:
            state, reason, triggered, flipped = step.state, step.reason, step.triggered, step.flipped
            state.ledger.counters.add(reason, triggered, flipped, step.waited_ms)
            self.totals.add(reason, triggered, flipped, step.waited_ms)
            verified = reason is not Reason.NONE
            if triggered or reason is Reason.RESUME:
                self.audit.add_triggered()  # verified whatever its margin: no flip of it can be missed
            else:
                self.audit.add_untriggered(audited=verified, flipped=flipped)
            if state.steps is not None:
                state.steps["margin"].append(step.margin)
                state.steps["verified"].append(verified)
                state.steps["flipped"].append(flipped)
                state.steps["reason"].append(reason.value)
            state.structural_steps += step.structural
            if self.metrics.enabled:
                self.metrics.step(triggered, flipped, missed(reason, triggered, flipped))
            if self.writer is not None:
                rows.append(step.trace(self.token_text(step.token)))
        if rows:
            self.writer.add_steps(rows)

    def finish(self, req: Any) -> None:
        """A request has finished: commit or drop its last step, write its row, attach its summary."""
        state = state_of(req)
        if state is None or state.closed:
            return
        state.closed = True
        shown = len(req.output_ids) if req.finished_len is None else req.finished_len
        if state.pending is not None and state.pending.step < shown:
            self.commit(state)
        state.pending = None
        self.settle()
        guarantee, note = self._guarantee(state)
        summary = self._summary(req, state, guarantee, note)
        req.customized_info = {**(getattr(req, "customized_info", None) or {}), "margingate": PerRequest([summary])}
        self.totals.requests += 1
        if self.writer is not None and not req.rid.startswith(HEALTH_CHECK_PREFIX):
            self.writer.add_request(self._request_row(req, state, shown, guarantee, note))

    def _guarantee(self, state: RequestState) -> tuple[Guarantee, str | None]:
        note = self._miss_note()
        notes = (*self.config.notes, *self.lowered, *(() if note is None else (note,)))
        return state.ledger.guarantee(notes, structural=self.fast is not None)

    def _miss_note(self) -> str | None:
        """Show the audit's bound, say when it crosses the limit, and return the note that costs guarantees above it."""
        rate, limit = self.missed_rate(), self.config.max_miss
        if not rate.denominator or (limit is None and not self.metrics.enabled):
            return None
        upper = rate.upper()
        self.metrics.missed_bound(upper)
        if limit is None:
            return None
        over = upper > limit
        if over is not self._over_limit:
            self._over_limit = over
            say = log.warning if over else log.info
            claim = "claim no guarantee" if over else "claim their guarantee again"
            say("margingate: %s; responses %s", self.audit.describe(limit), claim)
        return f"missed flips {rate} exceed --margingate-max-miss {limit}" if over else None

    def missed_rate(self) -> Rate:
        """Return missed flips over untriggered steps that were verified all the same (audit or always)."""
        return self.audit.rate

    def _summary(self, req: Any, state: RequestState, guarantee: Guarantee, note: str | None) -> dict[str, Any]:
        c, ledger = state.ledger.counters, state.ledger
        out: dict[str, Any] = {
            "policy": ledger.params.policy.value,
            "repair": ledger.repair.value,
            "threshold": ledger.params.threshold,
            "dataset": ledger.params.dataset,
            "steps": c.steps,
            "triggers": c.triggers,
            "verified": c.verified,
            "audited": c.audited,
            "flips": c.flips,
            "missed": c.missed,
            "verify_ms": round(c.verify_ms, 3),
            "cached_tokens": state.cached_tokens,
            "floored_tokens": state.floored_tokens,
            "prefill_chunks": state.prefill_chunks,
            "retractions": int(req.retraction_count),
            "max_batch_rows": state.max_batch_rows,
            "guarantee": guarantee.value,
            "guarantee_note": note,
        }
        if state.steps is not None:
            out["per_token"] = state.steps
        if self.knobs.kv_digest and self.verifier is not None:
            out["kv_digest"] = self._digest(req)
        return out

    def _digest(self, req: Any) -> str:
        assert self.verifier is not None
        first = len(req.origin_input_ids)
        positions = list(range(first, first + len(req.output_ids) - 1))
        return (
            column_digest(self.verifier.kv, self.verifier.slots(int(req.req_pool_idx), positions)) if positions else ""
        )

    def _request_row(
        self, req: Any, state: RequestState, shown: int, guarantee: Guarantee, note: str | None
    ) -> dict[str, Any]:
        c, ledger = state.ledger.counters, state.ledger
        end = state.last_token_time or time.time()
        first = state.first_token_time or end
        e2e_ms = max(0.0, (end - state.arrival) * 1e3)
        reason = req.finished_reason.to_json().get("type") if req.finished_reason is not None else "abort"
        return {
            "request": state.number,
            "request_id": req.rid,
            "dataset": ledger.params.dataset,
            "policy": ledger.params.policy.value,
            "repair": ledger.repair.value,
            "threshold": ledger.params.threshold,
            "time": state.arrival,
            "prompt_tokens": state.prompt_tokens,
            "cached_tokens": state.cached_tokens,
            "floored_tokens": state.floored_tokens,
            "prefill_chunks": state.prefill_chunks,
            "output_tokens": shown,
            "triggers": c.triggers,
            "verified": c.verified,
            "audited": c.audited,
            "flips": c.flips,
            "missed": c.missed,
            "structural": state.structural_steps,
            "ttft_ms": max(0.0, (first - state.arrival) * 1e3),
            "tpot_ms": (end - first) * 1e3 / (shown - 1) if shown > 1 else None,
            "e2e_ms": e2e_ms,
            "prefill_ms": state.prefill_ms,
            "verify_ms": c.verify_ms,
            "hold_ms": 0.0,
            "overhead_ms": c.verify_ms,
            "overhead_share": c.verify_ms / e2e_ms if e2e_ms else 0.0,
            "max_batch_rows": state.max_batch_rows,
            "retractions": int(req.retraction_count),
            "guarantee": guarantee.value,
            "guarantee_note": note,
            "finish_reason": reason,
            "prompt_text": self._text(list(req.origin_input_ids)),
        }

    # ---- counters -------------------------------------------------------------------------------------------------

    def note_verify(self, result: VerifyResult) -> None:
        """Count one call of the verifier."""
        self.metrics.verify(result.passes, result.rows, result.seconds)

    def note_batch(self, rows: int) -> None:
        """Record the size of a running decode batch: the gauge that proves batches formed."""
        self.batch_rows_now = rows
        self.batch_rows[rows] += 1

    def token_text(self, token: int) -> str | None:
        """Return a token decoded alone, or None when the run records no text."""
        return self._text([token])

    def _text(self, tokens: list[int]) -> str | None:
        if not self.trace_text or self.scheduler.tokenizer is None:
            return None
        return self.scheduler.tokenizer.decode(tokens)

    def status(self) -> dict[str, Any]:
        """Return what ``GET /margingate/status`` shows of this process, in plain types."""
        self.settle()
        rate = self.missed_rate()
        args, model_runner = self.scheduler.server_args, self.scheduler.tp_worker.model_runner
        out: dict[str, Any] = {
            "model": model_name(args.model_path) + (" (weights changed since the start)" if self.weights else ""),
            "weight_changes": self.weights,
            "dtype": str(model_runner.dtype).removeprefix("torch."),
            "attention_backend": args.attention_backend,
            "device": device_name(args.device),
            "policy": self.config.policy.value,
            "repair": self.config.repair.value,
            "threshold": self.rules.threshold_for(""),
            "thresholds": {}
            if self.rules.profile is None
            else {name: entry.threshold for name, entry in self.rules.profile.datasets.items()},
            "verify_rows": self.config.verify_rows,
            "radix": self.config.radix.value,
            "chunk": self.config.chunk if self.prefill_rules.isolated else 1,
            "fast_path": self.config.fast_path.value,
            "invariance": None if self.fast is None else self.fast.to_dict(),
            "audit_rate": self.config.audit_rate,
            "notes": [*self.config.notes, *self.lowered],
            "test_knobs": self.knobs.active,
            "self_test": None if self.self_test is None else self.self_test.to_dict(),
            "totals": {**asdict(self.totals), "untriggered_checked": self.audit.audited},
            "missed": {
                "missed": rate.numerator,
                "checked": rate.denominator,
                "upper_95": rate.upper() if rate.denominator else None,
            },
            "batch_rows": {
                "now": self.batch_rows_now,
                "max": max(self.batch_rows, default=0),
                "steps_by_rows": {str(k): v for k, v in sorted(self.batch_rows.items())},
            },
            "uptime_seconds": time.time() - self.started,
        }
        if self.verifier is not None:
            out["verifier"] = asdict(self.verifier.counters)
        if self.writer is not None:
            out["trace"] = {
                "path": str(self.writer.path),
                "dropped_rows": self.writer.dropped_rows,
                "write_errors": self.writer.write_errors,
            }
            self.metrics.trace(self.writer.dropped_rows, self.writer.write_errors)
        return out
