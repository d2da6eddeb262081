"""The step: margin, gate, verify and repair between a forward's logits and the choice of its tokens.

One call per forward. The fast path's logits are there, its K/V columns are written, no token is chosen yet, so a
verify can still put its logits and columns in place and everything after it (penalties, grammar, logprobs, streaming)
sees only the repaired step. What a forward is arrives as a :class:`ForwardView`; how its tokens are drawn as a
:class:`Sampling`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from margingate_kernels import Top2, Workspace, top2_margin
from margingate_kernels.choice.top2_margin import top2_host
from margingate_kernels.seeded import Drawn

from sglang_margingate.config import Policy
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.gate.ledger import LedgerError
from sglang_margingate.gate.policy import decide
from sglang_margingate.runtime.faults import TestKnobs, spoil
from sglang_margingate.runtime.logprobs import keep_asking
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.observe import Landings, Numbers, Packed
from sglang_margingate.runtime.prefill import Chunk, PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.seeded.draws import Drawer, any_seeded
from sglang_margingate.runtime.state import Forward, RequestState, StepRow
from sglang_margingate.runtime.verifier import Verifier, VerifyJob, best_five, best_five_later
from sglang_margingate.runtime.view import ForwardView, Sampling
from sglang_margingate.words import Reason

log = logging.getLogger(__name__)


class Step:
    """Gates the steps of one scheduler process.

    Parameters
    ----------
    recorder
        Takes the chosen steps.
    rules
        Which prefill chunks are canonical.
    verifier
        None where the policy never verifies.
    sampler
        Draws the steps of the audit.
    window
        Most open columns of a request.
    knobs
        Faults injected on purpose.
    metrics
        Prometheus counters.
    """

    def __init__(
        self, recorder: Recorder, rules: PrefillRules, verifier: Verifier | None, sampler: AuditSampler,
        window: int, knobs: TestKnobs, metrics: Metrics, note_batch: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.recorder, self.rules, self.verifier, self.window = recorder, rules, verifier, window
        self._sampler, self._knobs, self._metrics, self._note_batch = sampler, knobs, metrics, note_batch
        self._workspace: Workspace | None = None
        self._zeros = torch.empty(0)
        self._drawer = Drawer()
        self._landings: Landings | None = None
        self._forced: tuple[list[int], torch.Tensor] = ([], torch.empty(0))

    # ---- where a forward ends -------------------------------------------------------------------------------------

    def ended(self, view: ForwardView) -> None:
        """Note what a forward did, whether or not a token is chosen from it."""
        if view.decode:
            self._note_batch(len(view.states))
            return
        for state, chunk in zip(view.states, view.chunks):
            if state is None:
                view.canonical.append(False)
                continue
            why_not = self.rules.why_not_canonical(chunk, len(view.states), view.shape)
            view.canonical.append(why_not is None)
            state.prefill_chunks += 1
            if state.ledger.gated:
                state.ledger.note_prefill(why_not)
            if chunk.last:
                self._start(state, chunk)
        if not view.chooses:
            self._hand_over(view, [])

    def _start(self, state: RequestState, chunk: Chunk) -> None:
        self.recorder.restart(state, len(chunk.generated))
        state.prompt_tokens, state.cached_tokens, state.resumed_at = chunk.prompt, chunk.cached, len(chunk.generated)
        if chunk.generated and state.penalised:
            state.ledger.note("SGLang's penalties forget after a retraction what they had counted")
        if not chunk.generated and state.first_token_time is not None:
            state.ledger.note(
                "it began anew after tokens were shown (SGLang keeps none of a retracted prompt of embeddings)"
            )
        state.last_token = chunk.generated[-1] if chunk.generated else 0
        state.ledger.start(chunk.prompt, list(chunk.generated))

    # ---- where its tokens are chosen ------------------------------------------------------------------------------

    def sample(self, view: ForwardView, sampling: Sampling) -> torch.Tensor:
        """Choose the tokens of a forward that has ended, [B]."""
        rows = self._open_decode(view, sampling) if view.decode else self._open_prefill(view, sampling)
        logits = sampling.logits
        observed = [row for row in rows if row.observed]
        if not observed:
            tokens = sampling.choose()
            self._hand_over(view, rows)
            return tokens
        if view.decode and self._knobs.changes_steps:
            spoil(
                self._knobs,
                observed,
                sampling.logits,
                sampling.columns,
                None if self.verifier is None else self.verifier.kv,
            )
        if self.recorder.clock.late and not [1 for row in observed if row.waits]:
            return self._observe(view, rows, observed, sampling)
        self.recorder.catch_up()  # steps that are still on their way come before this one
        view.waited = self.recorder.clock.late
        best, numbers = self._measure(sampling.processed(logits), observed)
        for row in observed:
            row.fast_token, row.second_token, row.margin = (
                numbers.token[row.index], numbers.second[row.index], numbers.margin[row.index]
            )  # fmt: skip
        waited_ms = self._verify(observed, sampling, view.decode)
        view.waited |= waited_ms > 0
        asked = self._asked(observed)
        if asked:
            index = torch.tensor([row.index for row in asked], device=logits.device)
            for row, best_tokens in zip(asked, best_five(sampling.processed(logits)[index])):
                row.tops = (best_tokens, None)
        keep_asking(observed, sampling, view.decode)
        tokens = self._argmax(observed, best) if self._all_ours(observed, sampling) else sampling.choose()
        chosen = self._enforce(observed, tokens, sampling)
        sampling.score(tokens)
        for row in observed:
            if row.state.ledger.gated:
                row.waited_ms = waited_ms
        numbers = numbers._replace(chosen=chosen)
        self.recorder.chosen(rows, self._forward(view), view.began, numbers, self._prefilled(view))
        return tokens

    def _hand_over(
        self, view: ForwardView, rows: list[StepRow], read: Callable[[], Numbers | None] = lambda: None
    ) -> None:
        """Give the recorder a forward that nothing waits for; ``read`` gives its numbers once they have arrived."""
        clock = self.recorder.clock
        if clock.late:
            self.recorder.chosen_late(
                rows, self._forward(view), view.began, clock.mark(), read, self._prefilled(view)
            )  # fmt: skip
        else:
            self.recorder.chosen(rows, self._forward(view), view.began, read(), self._prefilled(view))

    @staticmethod
    def _forward(view: ForwardView) -> Forward:
        shape = view.shape
        canonical = shape is not None and shape.in_class if view.decode else all(view.canonical)
        return Forward(view.decode, len(view.states), None if shape is None else shape.padded, canonical)

    @staticmethod
    def _prefilled(view: ForwardView) -> list[RequestState]:
        return [] if view.decode else [state for state in view.states if state is not None]

    # ---- opening a step -------------------------------------------------------------------------------------------

    def _open_decode(self, view: ForwardView, sampling: Sampling) -> list[StepRow]:
        """Open the rows of a decode; this loop and the recorder's are what every token of the server passes."""
        in_class = view.shape is not None and view.shape.in_class
        audits, by_share, rows = self._sampler.rate > 0, self._knobs.trigger_by_share, []
        quiet = in_class and not audits and not by_share
        for index, (state, slot, position) in enumerate(zip(view.states, sampling.slots, sampling.positions())):
            if state is None or slot is None:
                # Sampling delayed by a grammar runs after the last step's results: a request without a slot has ended
                # meanwhile and its columns are free, so its row must not be verified.
                continue
            ledger = state.ledger
            params = ledger.params
            row = StepRow(index, slot, state, position, position - state.prompt_tokens + 1, threshold=params.threshold)
            rows.append(row)
            if not state.observed:
                row.observed = False
            if quiet and ledger.passes(position, state.last_token):
                row.structural = True
            elif ledger.gated:
                if audits and params.policy is Policy.GATE:
                    row.audit = self._sampler.draw(str(ledger.number), row.step)
                # A verify may ask for the token that this step reads, known once the last step was read.
                asks = not ledger.clean or params.policy is Policy.ALWAYS or row.audit
                if asks or not in_class:
                    self.recorder.catch_up()
                try:
                    structural = ledger.read(position, state.last_token, in_class)
                except LedgerError as error:
                    self._give_up(state, str(error))
                else:
                    row.structural, row.waits = structural, asks or not structural
            if by_share:
                row.threshold = self._share_threshold(state, row.step)
        return rows

    def _open_prefill(self, view: ForwardView, sampling: Sampling) -> list[StepRow]:
        rows = []
        for index, (state, chunk, slot) in enumerate(zip(view.states, view.chunks, sampling.slots)):
            if state is None or not chunk.last:
                continue  # made before set-up; or a middle chunk: its logits choose nothing
            resumed = len(chunk.generated) > 0
            row = StepRow(
                index, slot, state, chunk.end - 1, len(chunk.generated), threshold=state.ledger.params.threshold
            )
            row.resumed, row.observed = resumed, state.observed
            # A prefill is canonical by its own rules, and not verified; what was generated before a retraction is.
            row.waits = resumed and state.ledger.gated
            rows.append(row)
        return rows

    def _share_threshold(self, state: RequestState, step: int) -> float:
        ledger = state.ledger
        return float("inf") if self._knobs.draws(ledger.request_id, step, ledger.params.threshold) else -1.0

    def _give_up(self, state: RequestState, why: str) -> None:
        log.error("margingate: %s; the request goes on without verifies, guarantee none", why)
        state.ledger.ungated = why
        self.recorder.totals.ledger_errors += 1

    def _asked(self, rows: list[StepRow]) -> list[StepRow]:
        """Return the rows whose best tokens the trace still lacks, of requests that asked for their steps."""
        return [r for r in rows if r.tops is None and r.state.steps is not None] if self.recorder.traces else []

    @staticmethod
    def _all_ours(observed: list[StepRow], sampling: Sampling) -> bool:
        """Return whether every token is known without SGLang's sampler: a greedy batch, or greedy and seeded rows alone."""
        every = sampling.plain and len(observed) == len(sampling.logits)
        return sampling.plain_argmax or (every and any_seeded(observed))

    @staticmethod
    def _is_ours(row: StepRow) -> bool:
        """Return whether a row's token is the one that was measured or verified, whatever SGLang's sampler makes of it."""
        return row.state.ledger.gated or row.state.draw is not None

    # ---- margin ---------------------------------------------------------------------------------------------------

    def _packed(self, logits: torch.Tensor, observed: list[StepRow]) -> Packed:
        """Return token, runner-up and margin of every row, of a seeded row its draw's, on the device of the logits."""
        work, rows = self._workspace, len(logits)
        if work is None or work.max_rows < rows or work.device != logits.device:
            work = self._workspace = Workspace(max(rows, 64), logits.shape[1], logits.device)
            # The gate decides on the host, from the margin: the kernel's own trigger mask is not used here.
            self._zeros = torch.zeros(work.max_rows, device=logits.device)
        if self._landings is None:
            self._landings = Landings(pinned=logits.is_cuda)
        packed = Packed(self._landings, rows, logits.device)
        found = Drawn(packed.column("token"), packed.column("second"), packed.column("margin"))
        if any_seeded(observed):
            self._drawer.into(logits, observed, work, found)
        else:
            top2_margin(logits, self._zeros[:rows], workspace=work, out=Top2(*found, work.out(rows).trigger))
        return packed

    def _measure(self, logits: torch.Tensor, observed: list[StepRow]) -> tuple[torch.Tensor, Numbers]:
        """Return the best token of every row, of a seeded row its draw, and the rows' numbers on the host: waits for them."""
        if not logits.is_cuda:
            best, second, margin = top2_host(logits)
            if any_seeded(observed):
                self._drawer.on_host(logits, observed, best, second, margin)
            return best, Numbers(best.tolist(), second, margin, ())
        packed, clock = self._packed(logits, observed), self.recorder.clock
        read = packed.send()
        clock.wait(clock.mark())
        return packed.column("token"), read()

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
        full = ledger.full(self.window)
        return decide(ledger.params.policy, row.margin, row.threshold, row.audit, row.structural, full)

    def _verify(self, rows: list[StepRow], sampling: Sampling, decode: bool) -> float:
        """Verify the rows whose margin, or another reason, asks for it; return the milliseconds that it took."""
        if self.verifier is None:
            return 0.0
        for row in rows:
            row.reason = self._reason(row, decode)
        chosen = [r for r in rows if r.reason is not Reason.NONE]
        if not chosen:
            return 0.0
        logits = sampling.logits
        jobs = [VerifyJob(int(r.slot), r.state.ledger.rows(), shadow=r.reason is Reason.AUDIT) for r in chosen]
        result = self.verifier.verify(jobs)
        index = torch.tensor([r.index for r in chosen], device=logits.device)
        fast = best_five(sampling.processed(logits)[index]) if self.recorder.traces else []
        verified = result.logits
        if sampling.processes:
            mixed = logits.clone()
            mixed[index] = result.logits
            verified = sampling.processed(mixed)[index]
        for row, job, token, margin, delta in zip(
            chosen, jobs, *self._drawer.verified(verified, chosen), result.kv_delta
        ):
            row.verify_token, row.verify_margin = token, margin
            row.window_rows, row.delta = len(job.rows), delta
        if fast:
            for row, *tops in zip(chosen, fast, best_five(verified)):
                row.tops = (tops[0], tops[1])
        repairs = [k for k, r in enumerate(chosen) if r.repairs]
        if repairs:
            logits[index[repairs]] = result.logits[repairs]
            for k in repairs:
                chosen[k].state.ledger.repaired()
        self._metrics.verify(result.passes, result.rows, result.seconds)
        return result.seconds * 1e3

    def _enforce(self, rows: list[StepRow], tokens: torch.Tensor, sampling: Sampling) -> list[int]:
        """Return every row's chosen token, making sure that gated and seeded rows got the one that was measured.

        In a batch with sampling neighbours SGLang picks greedy rows by a top-1 sort, whose order among exact ties is
        not argmax's: the tie rule must not depend on the neighbours.
        """
        if not sampling.all_greedy:
            fixed = [(r.index, r.verify_token if r.repairs else r.fast_token) for r in rows if self._is_ours(r)]
            if fixed:
                index = torch.tensor([i for i, _ in fixed], device=tokens.device)
                tokens[index] = torch.tensor([t for _, t in fixed], device=tokens.device, dtype=tokens.dtype)
        chosen: list[int] = tokens.tolist()
        return chosen

    # ---- observed without a wait ----------------------------------------------------------------------------------

    def _observe(
        self, view: ForwardView, rows: list[StepRow], observed: list[StepRow], sampling: Sampling
    ) -> torch.Tensor:
        """Measure a step that waits for no verdict (ungated, structural, a prefill) on a GPU without waiting for it.

        A wait after each prefill would keep SGLang from preparing the next one meanwhile: 17 ms of every 8,192 tokens.
        """
        logits = sampling.processed(sampling.logits)
        packed = self._packed(logits, observed)
        asked = self._asked(observed)
        best_tokens = best_five_later(logits[self._index([r.index for r in asked], logits.device)]) if asked else None
        tokens = packed.column("token")
        keep_asking(observed, sampling, view.decode)
        if self._all_ours(observed, sampling):
            read = packed.send()  # no verify, so no row differs from what was measured
        else:
            best, tokens = tokens, sampling.choose()
            gated = [r.index for r in observed if self._is_ours(r)]
            if gated and not sampling.all_greedy:  # as _enforce does, without waiting for the GPU
                index = self._index(gated, tokens.device)
                tokens[index] = best[index].to(tokens.dtype)
            read = packed.send(tokens)
        sampling.score(tokens)

        def read_all() -> Numbers:
            for row, best in zip(asked, best_tokens() if best_tokens else ()):
                row.tops = (best, None)
            return read()

        self._hand_over(view, rows, read_all if asked else read)
        return tokens

    def _index(self, rows: list[int], device: torch.device) -> torch.Tensor:
        """Return the rows as a tensor of the device; a batch keeps them for many steps."""
        known, index = self._forced
        if known != rows:
            index = torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
            self._forced = rows, index
        return index
