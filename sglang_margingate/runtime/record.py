"""The recorder: the one owner of a step from "chosen" to "traced".

A step passes four places, in this order and never back::

    late        chosen on the device, its numbers still on their way to the host (GPU only)
    pending     its numbers are known; its token may never be shown, as overlap runs one step too many
    committed   its token is part of the output
    settled     counted and handed to the trace

A retraction drops the pending step of a request and whatever is late of it; an end commits or drops it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from sglang_margingate.columns import LateColumns
from sglang_margingate.gate.audit import AuditCounter
from sglang_margingate.gate.ledger import Counters
from sglang_margingate.gate.policy import NEVER_MISSED, missed
from sglang_margingate.runtime.clock import Clock
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.observe import Numbers
from sglang_margingate.runtime.state import Forward, RequestState, StepRow, StepRows
from sglang_margingate.words import Reason

SETTLE_ROWS, SETTLE_SECONDS = 256, 0.2
"""Committed steps are settled at that many, or when the last settling is that long ago."""


UNREAD = 2
"""Forwards whose numbers may be on their way while the scheduler goes on."""


class Sink(Protocol):
    """Takes the trace's rows: :class:`~sglang_margingate.trace.TraceWriter`."""

    def add_steps(self, rows: LateColumns) -> None:
        """Take step rows."""
        ...


@dataclass
class Totals(Counters):
    """Counts since start, over committed steps and finished requests."""

    requests: int = 0
    ledger_errors: int = 0


NOTHING: tuple[Sequence[int], Sequence[int], Sequence[float], Sequence[int]] = ((), (), (), ())


class _Late(NamedTuple):
    rows: list[StepRow]
    forward: Forward
    began: Any
    ended: Any
    read: Callable[[], Numbers | None]
    """Reads the numbers once ``ended`` has passed; None where no row is observed."""
    prefilled: list[RequestState]


class Recorder:
    """Takes chosen steps, and counts and traces those whose tokens are shown.

    Parameters
    ----------
    clock
        When things happened on the device.
    sink
        The trace, or None.
    metrics
        Prometheus counters.
    text
        Returns a token's text, or None where the run records none.
    """

    def __init__(
        self, clock: Clock, sink: Sink | None, metrics: Metrics, text: Callable[[int], str | None] | None = None
    ) -> None:
        self.clock, self._sink, self._metrics, self._text = clock, sink, metrics, text
        self.totals = Totals()
        self.audit = AuditCounter()
        """Drawn steps only: what bounds the missed flips of traffic that was not verified."""
        self.structural_flips = 0
        """Flips at structural steps: each one disproves the class."""
        self._late: deque[_Late] = deque()
        self._committed: list[StepRow] = []
        self._settled_at = 0.0
        self._forwards = 0

    @property
    def traces(self) -> bool:
        """Whether rows go to a trace: what only a reader of it wants is computed for nobody else."""
        return self._sink is not None

    # ---- chosen ---------------------------------------------------------------------------------------------------

    def chosen(
        self, rows: list[StepRow], forward: Forward, began: Any, numbers: Numbers | None,
        prefilled: Sequence[RequestState] = (),
    ) -> None:  # fmt: skip
        """Take a forward whose numbers the host already has."""
        self.catch_up()
        self._take(rows, forward, began, self.clock.mark(), numbers, prefilled)

    def chosen_late(
        self, rows: list[StepRow], forward: Forward, began: Any, ended: Any, read: Callable[[], Numbers | None],
        prefilled: Sequence[RequestState] = (),
    ) -> None:  # fmt: skip
        """Take a forward whose numbers are on their way; those of the forward before the one before are read now.

        Overlap launches a forward, then waits for the one before it to show its tokens. So the newest two may still run,
        and the third has been waited for: nothing here stops the scheduler, but for the clock's sake now and then.
        """
        for row in rows:
            row.state.late += 1
        self._late.append(_Late(rows, forward, began, ended, read, list(prefilled)))
        most = 1 if self.clock.wants_wait() else UNREAD
        while len(self._late) > most:
            self._read_oldest()

    def _read_oldest(self) -> None:
        late = self._late.popleft()
        self.clock.wait(late.ended)
        for row in late.rows:
            row.state.late -= 1
        self._take(late.rows, late.forward, late.began, late.ended, late.read(), late.prefilled)

    def _take(
        self, rows: list[StepRow], forward: Forward, began: Any, ended: Any, numbers: Numbers | None,
        prefilled: Sequence[RequestState],
    ) -> None:  # fmt: skip
        forward.time, forward.ms = self.clock.wall(ended), self.clock.span_ms(began, ended)
        self._forwards += 1
        forward.number = self._forwards
        for state in prefilled:
            state.prefill_ms += forward.ms
        token, second, margin, chosen = numbers[:4] if numbers is not None else NOTHING
        for row in rows:
            state = row.state
            row.forward = forward
            if numbers is not None:
                at = row.index
                row.fast_token, row.second_token, row.margin = token[at], second[at], margin[at]
                row.token = state.last_token = chosen[at]
            if state.closed or row.step >= state.most_tokens:
                continue  # overlap ran one step too many
            if state.pending is not None:
                self._commit(state, state.pending)
            # No circle, which nobody would collect: a request may be dropped by SGLang without an end.
            row.state = None  # type: ignore[assignment]
            state.pending = row
        self._settle_when_due(time.time())

    # ---- pending --------------------------------------------------------------------------------------------------

    def catch_up(self, state: RequestState | None = None, tokens: int = 0) -> None:
        """Read what is late: all of it, or as much as the first ``tokens`` tokens of one request need."""
        while self._late and (state is None or (state.late and self._known(state) < tokens)):
            self._read_oldest()

    @staticmethod
    def _known(state: RequestState) -> int:
        """Return how many tokens of a request have been read."""
        return 0 if state.pending is None else state.pending.step + 1

    def _commit(self, state: RequestState, row: StepRow) -> None:
        """A request's pending step is shown."""
        row.state, forward = state, row.forward
        assert forward is not None
        if state.first_token_time is None:
            state.first_token_time = forward.time
        state.last_token_time = forward.time
        if forward.decode and forward.requests > state.max_batch_rows:
            state.max_batch_rows = forward.requests
        if row.observed:
            self._committed.append(row)

    def restart(self, state: RequestState, done: int) -> None:
        """A prefill begins a request anew, behind ``done`` tokens of output: none, or those before a retraction."""
        if state.late:
            self.catch_up()
        if state.pending is not None and state.pending.step < done:
            self._commit(state, state.pending)
        state.pending = None

    def finish(self, state: RequestState, shown: int) -> None:
        """A request has ended with ``shown`` tokens: commit or drop its last step, and count all of them."""
        self.catch_up(state, shown)
        state.closed = True
        if state.pending is not None and state.pending.step < shown:
            self._commit(state, state.pending)
        state.pending = None
        self.settle()

    # ---- settled --------------------------------------------------------------------------------------------------

    def _settle_when_due(self, now: float) -> None:
        if len(self._committed) >= SETTLE_ROWS or now - self._settled_at >= SETTLE_SECONDS:
            self._settled_at = now
            self.settle()

    def settle(self) -> None:
        """Count the committed steps and hand their rows to the trace.

        Not step by step: between two forwards the core's caches are cold and this takes three times as long.
        """
        steps, self._committed = self._committed, []
        if not steps:
            return
        self._count(steps)
        if self._sink is not None:
            texts = None if self._text is None else [self._text(row.token) for row in steps]
            self._sink.add_steps(StepRows(steps, texts))

    def _count(self, steps: Sequence[StepRow]) -> None:
        """Count committed steps. Nearly every one is quiet, and there are thousands a second: those come together."""
        quiet = structural = scored = 0
        for row in steps:
            state = row.state
            if row.reason is not Reason.NONE or state.steps is not None or (not row.structural and row.triggered):
                self._count_one(row)
                continue
            mine = state.ledger.counters
            mine.steps += 1
            quiet += 1
            if row.structural:
                mine.structural += 1
                structural += 1
            if row.scored:
                mine.scored += 1
                scored += 1
        totals = self.totals
        totals.steps += quiet
        totals.structural += structural
        totals.scored += scored
        self.audit.untriggered += quiet
        self._metrics.quiet_steps(quiet)

    def _count_one(self, row: StepRow) -> None:
        state, reason, triggered, flipped = row.state, row.reason, row.triggered, row.flipped
        for counters in (state.ledger.counters, self.totals):
            counters.add(reason, triggered, flipped, row.waited_ms, row.structural, row.scored)
        if triggered or reason in NEVER_MISSED:
            self.audit.add_triggered()
        elif reason is not Reason.ALWAYS:  # verified and repaired: no part of the population that the audit samples
            self.audit.add_untriggered(audited=reason is Reason.AUDIT, flipped=flipped)
        self.structural_flips += row.structural and flipped
        if state.steps is not None:
            state.steps["margin"].append(row.margin)
            state.steps["verified"].append(reason is not Reason.NONE)
            state.steps["flipped"].append(flipped)
            state.steps["reason"].append(reason.value)
        self._metrics.step(triggered, flipped, missed(reason, triggered, flipped))
