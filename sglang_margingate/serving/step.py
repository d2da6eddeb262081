"""The step hook: margin, gate, verify, repair, record, around SGLang's ``ModelRunner.sample``.

One call per forward. The fast path's logits are there, its K/V columns are written, no token is chosen yet, so a
verify can still put its logits and columns in place and everything after it (penalties, grammar, logprobs, streaming)
sees only the repaired step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from margingate_kernels import Top2, Top2Workspace, top2_margin
from margingate_kernels.top2_margin import top2_host

from sglang_margingate.config import Policy
from sglang_margingate.gate.ledger import LedgerError
from sglang_margingate.gate.policy import decide
from sglang_margingate.runtime.shape import SHAPE
from sglang_margingate.serving.state import Forward, RequestState, StepRow, state_of
from sglang_margingate.serving.testknobs import shift_column, swap_best_two
from sglang_margingate.serving.verifier import VerifyJob
from sglang_margingate.words import Reason

if TYPE_CHECKING:
    from sglang_margingate.serving.runtime import Runtime

log = logging.getLogger(__name__)

BATCH_REQS = "margingate_reqs"
BATCH_START = "margingate_start"


def _is_plain_argmax(model_runner: Any, batch: Any) -> bool:
    """Return whether SGLang's sampler would do nothing but take the argmax of the logits as they are."""
    info = batch.sampling_info
    return (
        info.is_all_greedy
        and not StepHook.needs_processing(info)
        and not info.has_custom_logit_processor
        and not batch.return_logprob
        and not any(info.return_sampling_masks or [])
        and batch.ngram_embedding_info is None
        and type(model_runner.sampler).__module__ == "sglang.srt.layers.sampler"  # no sampler backend of the user's
    )


class _Late(NamedTuple):
    """A step whose numbers are on their way from the GPU."""

    rows: list[StepRow]
    host: torch.Tensor
    """int64 [4, B]: token, runner-up, bits of the margin, chosen token."""
    arrived: torch.cuda.Event
    batch: Any


class StepHook:
    """Gates the steps of one scheduler process.

    Parameters
    ----------
    runtime
        Configuration, verifier, trace and counters of this process.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._late: deque[_Late] = deque()
        self._workspace: Top2Workspace | None = None
        self._zeros = torch.empty(0)

    def sample(self, original: Any, model_runner: Any, logits_output: Any, batch: Any) -> Any:
        """Choose the batch's next tokens; called in place of ``ModelRunner.sample``."""
        reqs = getattr(batch, BATCH_REQS, None)
        if reqs is None or logits_output.next_token_logits is None or len(reqs) != len(logits_output.next_token_logits):
            return original(model_runner, logits_output, batch)
        decode = batch.forward_mode.is_decode()
        rows = self._open_decode(reqs, batch) if decode else self._open_prefill(reqs, batch)
        if not rows:
            tokens = original(model_runner, logits_output, batch)
            self._add_prefill_time(reqs, batch, decode)
            return tokens

        logits, info = logits_output.next_token_logits, batch.sampling_info
        self._inject_faults(rows, logits, batch, decode)
        if logits.is_cuda and not any(self._waits(r, decode) for r in rows):
            return self._observe(rows, original, model_runner, logits_output, batch)
        self.drain()  # steps that are still on their way come before this one
        best = self._measure(rows, self._processed(logits, info))
        verify_ms = self._verify(rows, logits, info, decode) if self.runtime.verifier is not None else 0.0
        if _is_plain_argmax(model_runner, batch):
            tokens = self._argmax(rows, best)
        else:
            tokens = original(model_runner, logits_output, batch)
        chosen = self._enforce(rows, tokens, info)
        self._add_prefill_time(reqs, batch, decode)
        self._record(rows, chosen, len(reqs), decode, batch, verify_ms)
        return tokens

    # ---- opening a step -------------------------------------------------------------------------------------------

    def _open_decode(self, reqs: list[Any], batch: Any) -> list[StepRow]:
        # The CPU mirror costs no wait for the GPU.
        cpu = batch.seq_lens_cpu
        positions = batch.positions.tolist() if cpu is None else [n - 1 for n in cpu.tolist()]
        fast = self.runtime.fast
        in_class = fast is not None and fast.decode_shape(len(reqs), getattr(batch, SHAPE, None)).in_class
        rows = []
        for index, (req, position) in enumerate(zip(reqs, positions)):
            state = state_of(req)
            if state is None or not self._observed(state):
                continue
            slot = req.req_pool_idx
            if slot is None:
                # Sampling delayed by a grammar runs after the last step's results: this request has ended meanwhile and
                # its slots are free, so its row must not be verified.
                continue
            state.max_batch_rows = max(state.max_batch_rows, len(reqs))
            row = StepRow(index, slot, state, position)
            if state.ledger.gated:
                if not in_class or self._needs_tokens(state):
                    self.drain()  # the token that this step reads is known once the last step was recorded
                try:
                    row.structural = state.ledger.read(position, state.last_token, in_class)
                except LedgerError as error:
                    self._give_up(state, str(error))
            row.threshold = self._threshold(state)
            rows.append(row)
        return rows

    def _needs_tokens(self, state: RequestState) -> bool:
        """Return whether a verify may ask for the token that this step reads."""
        ledger = state.ledger
        return not ledger.clean or ledger.params.policy is Policy.ALWAYS or self.runtime.config.audit_rate > 0

    def _waits(self, row: StepRow, decode: bool) -> bool:
        """Return whether this row's margin decides something before the next forward."""
        if not decode:
            return row.state.ledger.gated and row.resumed  # a prefill is canonical by its own rules, and not verified
        return row.state.ledger.gated and (not row.structural or self._needs_tokens(row.state))

    def _open_prefill(self, reqs: list[Any], batch: Any) -> list[StepRow]:
        # A retracted request comes back: its last step is recorded first. Others need not wait for the forward before.
        back = {id(state_of(req)) for req in reqs}
        if any(id(row.state) in back for late in self._late for row in late.rows):
            self.drain()
        ends = batch.seq_lens_cpu.tolist() if batch.seq_lens_cpu is not None else batch.seq_lens.tolist()
        rows = []
        for index, (req, end) in enumerate(zip(reqs, ends)):
            state = state_of(req)
            if state is None:
                continue  # made before set-up
            state.prefill_chunks += 1
            self.runtime.prefill_rules.note_chunk(req, state, batch, index)
            if end < len(req.origin_input_ids) + len(req.output_ids):
                continue  # a middle chunk: its logits choose nothing
            resumed = len(req.output_ids) > 0
            row = StepRow(index, req.req_pool_idx, state, end - 1, resumed, state.ledger.params.threshold)
            self._start(req, state, resumed)
            if self._observed(state):
                rows.append(row)
        return rows

    def _start(self, req: Any, state: RequestState, resumed: bool) -> None:
        done = len(req.output_ids)
        # Retraction dropped the step in flight; whatever was committed stays.
        if state.pending is not None and state.pending.step < done:
            self.runtime.commit(state)
        state.pending = None
        state.next_step = done
        state.prompt_tokens = len(req.origin_input_ids)
        state.cached_tokens = int(getattr(req, "cached_tokens", 0) or 0)
        state.ledger.start(state.prompt_tokens, list(req.output_ids))

    @staticmethod
    def _observed(state: RequestState) -> bool:
        return state.ledger.greedy and state.ledger.params.policy is not Policy.OFF

    def _threshold(self, state: RequestState) -> float:
        params = state.ledger.params
        if not self.runtime.knobs.trigger_by_share:
            return params.threshold
        return float("inf") if self.runtime.knobs.draws(state, params.threshold) else -1.0

    def _give_up(self, state: RequestState, why: str) -> None:
        log.error("margingate: %s; the request goes on without verifies, guarantee none", why)
        state.ledger.greedy = False
        state.ledger.notes.append(why)
        self.runtime.totals.ledger_errors += 1

    # ---- margin ---------------------------------------------------------------------------------------------------

    @staticmethod
    def needs_processing(info: Any) -> bool:
        """Return whether penalties, bias or a grammar change the logits before the argmax."""
        return bool(
            info.grammars
            or info.logit_bias is not None
            or info.acc_additive_penalties is not None
            or info.acc_scaling_penalties is not None
            or (info.penalizer_orchestrator is not None and info.penalizer_orchestrator.is_required)
        )

    def _processed(self, raw: torch.Tensor, info: Any) -> torch.Tensor:
        """Return the logits that argmax is taken from, [B, V], leaving ``raw`` untouched.

        Penalties, bias and grammar masks are functions of the committed tokens, so applying them to a copy here and to
        the original later gives the same result twice. Custom logit processors may keep state: requests that bring one
        are not gated (:meth:`Runtime.open_request`).
        """
        if not self.needs_processing(info):
            return raw
        copy = raw.clone()
        info.update_regex_vocab_mask()
        info.apply_logits_bias(copy)
        info.grammar_mask = None
        return copy

    def _top2(self, logits: torch.Tensor) -> Top2:
        """Return token, runner-up and margin of every row on the GPU; valid until the next call."""
        work = self._workspace
        if work is None or work.max_rows < len(logits) or work.device != logits.device:
            work = self._workspace = Top2Workspace(max(len(logits), 64), logits.shape[1], logits.device)
            # The gate decides on the host, from the margin: the kernel's own trigger mask is not used here.
            self._zeros = torch.zeros(work.max_rows, device=logits.device)
        return top2_margin(logits, self._zeros[: len(logits)], workspace=work)

    def _measure(self, rows: list[StepRow], logits: torch.Tensor) -> torch.Tensor:
        """Note each row's token, runner-up and margin; return the argmax of every row of the logits."""
        if logits.is_cuda:
            top = self._top2(logits)
            best, second, margin = top.token.clone(), top.second.tolist(), top.margin.tolist()
        else:
            best, second, margin = top2_host(logits)
        token = best.tolist()
        for row in rows:
            row.fast_token, row.second_token, row.margin = token[row.index], second[row.index], margin[row.index]
        return best

    @staticmethod
    def _argmax(rows: list[StepRow], best: torch.Tensor) -> torch.Tensor:
        """Return the tokens of a greedy batch; SGLang would take the argmax of the same logits in a pass of its own."""
        for row in rows:
            if row.repairs and row.verify_token is not None:
                best[row.index] = row.verify_token
        return best

    # ---- verify and repair ----------------------------------------------------------------------------------------

    def _reason(self, row: StepRow, decode: bool) -> Reason:
        ledger = row.state.ledger
        if not ledger.gated:
            return Reason.NONE
        if row.resumed:
            return Reason.RESUME
        if not decode:
            return Reason.NONE  # the prefill is canonical by its own rules
        audit = self.runtime.audits(ledger.request_id, row.state.next_step)
        return decide(ledger.params.policy, row.margin, row.threshold, audit, row.structural)

    def _verify(self, rows: list[StepRow], logits: torch.Tensor, info: Any, decode: bool) -> float:
        for row in rows:
            row.reason = self._reason(row, decode)
        chosen = [r for r in rows if r.reason is not Reason.NONE]
        if not chosen:
            return 0.0
        runtime = self.runtime
        assert runtime.verifier is not None
        jobs = [VerifyJob(int(r.slot), r.state.ledger.rows(), shadow=r.reason is Reason.AUDIT) for r in chosen]
        result = runtime.verifier.verify(jobs)
        index = torch.tensor([r.index for r in chosen], device=logits.device)
        thresholds = torch.zeros(len(chosen), device=logits.device)
        if self.needs_processing(info):
            mixed = logits.clone()
            mixed[index] = result.logits
            top = top2_margin(self._processed(mixed, info)[index], thresholds)
        else:
            top = top2_margin(result.logits, thresholds)
        for row, job, token, margin, delta in zip(
            chosen, jobs, top.token.tolist(), top.margin.tolist(), result.kv_delta
        ):
            row.verify_token, row.verify_margin = token, margin
            row.window_rows, row.delta = len(job.rows), delta
        repairs = [k for k, r in enumerate(chosen) if r.repairs]
        if repairs:
            logits[index[repairs]] = result.logits[repairs]
            for k in repairs:
                chosen[k].state.ledger.repaired()
        runtime.note_verify(result)
        return result.seconds * 1e3

    def _enforce(self, rows: list[StepRow], tokens: torch.Tensor, info: Any) -> list[int]:
        """Return each row's committed token, making sure that gated rows got the argmax that was measured.

        In a batch with sampling neighbours SGLang picks greedy rows by a top-1 sort, whose order among exact ties is
        not argmax's: the tie rule must not depend on the neighbours.
        """
        if not info.is_all_greedy:
            fixed = [(r.index, r.verify_token if r.repairs else r.fast_token) for r in rows if r.state.ledger.gated]
            if fixed:
                index = torch.tensor([i for i, _ in fixed], device=tokens.device)
                tokens[index] = torch.tensor([t for _, t in fixed], device=tokens.device, dtype=tokens.dtype)
        host = tokens.tolist()
        return [host[r.index] for r in rows]

    @staticmethod
    def _enforce_argmax(rows: list[StepRow], top: Top2, tokens: torch.Tensor, info: Any) -> None:
        """Do the same for structural steps, without waiting for the GPU."""
        gated = [r.index for r in rows if r.state.ledger.gated]
        if gated and not info.is_all_greedy:
            index = torch.tensor(gated).pin_memory().to(tokens.device, non_blocking=True)
            tokens[index] = top.token[index].to(tokens.dtype)

    # ---- observed without a wait ----------------------------------------------------------------------------------

    def _observe(self, rows: list[StepRow], original: Any, model_runner: Any, logits_output: Any, batch: Any) -> Any:
        """Measure a step that waits for no verdict (ungated, structural, a prefill) on a GPU without waiting for it.

        A wait after each prefill would keep SGLang from preparing the next one meanwhile: 17 ms of every 8,192 tokens.
        """
        logits = logits_output.next_token_logits
        top = self._top2(self._processed(logits, batch.sampling_info))
        if _is_plain_argmax(model_runner, batch):
            tokens = top.token.clone()  # no verify, so no row differs from what was measured
        else:
            tokens = original(model_runner, logits_output, batch)
            self._enforce_argmax(rows, top, tokens, batch.sampling_info)
        self._read_later(rows, top, tokens, batch)
        return tokens

    def _read_later(self, rows: list[StepRow], top: Top2, tokens: torch.Tensor, batch: Any) -> None:
        """Copy a step's numbers off the GPU without waiting, and record the steps whose copies have arrived.

        Steps are read one forward late: by then the copy is done, so the scheduler never waits for our sake.
        """
        packed = torch.stack([top.token, top.second, top.margin.view(torch.int32).long(), tokens.long()])
        host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        host.copy_(packed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._late.append(_Late(rows, host, arrived, batch))
        while len(self._late) > 1:
            self._record_late()

    def _record_late(self) -> None:
        rows, host, arrived, batch = self._late.popleft()
        arrived.synchronize()
        margins = host[2].int().view(torch.float32).tolist()
        token, second, _, chosen = host.tolist()
        for row in rows:
            row.fast_token, row.second_token, row.margin = token[row.index], second[row.index], margins[row.index]
        reqs, decode = getattr(batch, BATCH_REQS), batch.forward_mode.is_decode()
        self._add_prefill_time(reqs, batch, decode)
        self._record(rows, [chosen[row.index] for row in rows], len(reqs), decode, batch, 0.0)

    def drain(self, state: RequestState | None = None, tokens: int = 0) -> None:
        """Record the steps that are still on their way, or only as many as the first ``tokens`` of one request need."""
        while self._late and (state is None or state.next_step < tokens):
            self._record_late()

    # ---- record ---------------------------------------------------------------------------------------------------

    def _add_prefill_time(self, reqs: list[Any], batch: Any, decode: bool) -> None:
        if decode:
            return
        elapsed = (time.perf_counter() - getattr(batch, BATCH_START)) * 1e3
        for req in reqs:
            state = state_of(req)
            if state is not None:
                state.prefill_ms += elapsed

    def _record(
        self, rows: list[StepRow], chosen: list[int], batch_rows: int, decode: bool, batch: Any, verify_ms: float
    ) -> None:
        runtime = self.runtime
        now = time.time()
        step_ms = (time.perf_counter() - getattr(batch, BATCH_START)) * 1e3
        forward = Forward(now, step_ms, batch_rows, decode, canonical=not decode and runtime.config.policy.verifies)
        if decode:
            runtime.note_batch(batch_rows)
        for row, token in zip(rows, chosen):
            state = row.state
            if state.pending is not None:
                runtime.commit(state)
            row.forward, row.step, row.token = forward, state.next_step, token
            if verify_ms and state.ledger.gated:
                row.waited_ms = verify_ms
            state.pending = row
            state.next_step += 1
            state.last_token = token
            state.last_token_time = now
            if state.first_token_time is None:
                state.first_token_time = now
        runtime.settle_when_due(now)

    # ---- test faults ----------------------------------------------------------------------------------------------

    def _inject_faults(self, rows: list[StepRow], logits: torch.Tensor, batch: Any, decode: bool) -> None:
        knobs = self.runtime.knobs
        if not decode or not (knobs.poison_every or knobs.flip_rate):
            return
        for row in rows:
            if knobs.corrupts(row.state.next_step, len(logits)):
                swap_best_two(logits[row.index])
                if self.runtime.verifier is not None:
                    shift_column(self.runtime.verifier.kv, batch.out_cache_loc[row.index : row.index + 1])
