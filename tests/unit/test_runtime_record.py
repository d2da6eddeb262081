"""The recorder: a step's way from chosen to traced, and every place where it may end early."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from trace_rows import rows_of

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.observe import Numbers
from sglang_margingate.runtime.record import SETTLE_ROWS, Recorder
from sglang_margingate.runtime.state import Forward, RequestState, StepRow, StepRows
from sglang_margingate.words import Reason


class Sink:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add_steps(self, rows: StepRows) -> None:
        self.rows += rows_of(rows)


class LateClock(HostClock):
    """Marks are numbers that the test chooses; waiting for one is noted."""

    late = True

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.tired = False

    def wants_wait(self) -> bool:
        return self.tired

    def wait(self, mark: float) -> None:
        self.waited.append(mark)


def a_recorder(clock: HostClock | None = None, settled: bool = False) -> tuple[Recorder, Sink]:
    sink = Sink()
    recorder = Recorder(clock or HostClock(), sink, Metrics(False, "m"))
    recorder._settled_at = 0.0 if settled else time.time() + 60  # not due by time
    return recorder, sink


def a_state(policy: Policy = Policy.LOG, number: int = 1) -> RequestState:
    return RequestState(RequestLedger("r", RequestParams(policy, 0.5, "arith", False), Repair.WINDOW, number=number))


def a_row(state: RequestState, step: int, **more: Any) -> StepRow:
    return StepRow(0, 0, state, 10 + step, step, threshold=0.5, **more)


def numbers(token: int = 7, margin: float = 3.0) -> Numbers:
    return Numbers([token], [token + 1], [margin], [token])


def choose(recorder: Recorder, state: RequestState, step: int, margin: float = 3.0, **more: Any) -> None:
    recorder.chosen([a_row(state, step, **more)], Forward(step > 0, 1, 4), time.time(), numbers(margin=margin))


def test_committed_steps_are_settled_together() -> None:
    """Counting and tracing wait for many steps, but not for long, and never beyond the end of a request."""
    recorder, sink = a_recorder()
    state = a_state()
    choose(recorder, state, 0, 0.25)
    choose(recorder, state, 1, 0.25)
    assert (len(sink.rows), recorder.totals.steps) == (0, 0), "nothing is settled yet"
    for step in range(2, SETTLE_ROWS + 2):
        choose(recorder, state, step)
    assert len(sink.rows) == recorder.totals.steps == SETTLE_ROWS, "the newest two are not settled and not committed"
    recorder._settled_at = 0.0
    choose(recorder, state, SETTLE_ROWS + 2)
    assert len(sink.rows) == SETTLE_ROWS + 2, "due by time: all but the pending one"
    assert [row["step"] for row in sink.rows] == list(range(SETTLE_ROWS + 2))
    recorder.finish(state, SETTLE_ROWS + 3)
    assert len(sink.rows) == state.ledger.counters.steps == recorder.totals.steps == SETTLE_ROWS + 3
    assert state.ledger.counters.triggers == 1, "the first token comes from a prefill, which never triggers"


def test_an_extra_overlapped_step_is_never_counted() -> None:
    recorder, sink = a_recorder()
    state = a_state()
    for step in range(4):
        choose(recorder, state, step)
    recorder.finish(state, 3)
    choose(recorder, state, 4)  # it ran before anybody knew of the end
    recorder.settle()
    assert [row["step"] for row in sink.rows] == [0, 1, 2]
    assert state.pending is None
    assert state.last_token_time == pytest.approx(sink.rows[-1]["time"])


def test_a_request_that_wanted_no_token_has_no_step() -> None:
    """Its prefill is sampled beside others, and overlap decodes once more: neither token is shown."""
    recorder, sink = a_recorder()
    state = a_state()
    state.most_tokens = 0
    choose(recorder, state, 0)
    choose(recorder, state, 1)
    recorder.finish(state, 0)
    assert (sink.rows, state.ledger.counters.steps, state.first_token_time) == ([], 0, None)


def test_a_retraction_drops_the_step_in_flight_and_keeps_what_was_shown() -> None:
    recorder, sink = a_recorder()
    state = a_state()
    for step in range(3):
        choose(recorder, state, step)
    recorder.restart(state, 2)  # two tokens were shown; the third is chosen again
    choose(recorder, state, 2, reason=Reason.RESUME, resumed=True, verify_token=7)
    recorder.finish(state, 3)
    assert [row["step"] for row in sink.rows] == [0, 1, 2]
    assert [row["reason"] for row in sink.rows] == ["none", "none", "resume"]


def test_a_retraction_commits_a_pending_step_that_was_shown() -> None:
    recorder, sink = a_recorder()
    state = a_state()
    choose(recorder, state, 0)
    recorder.restart(state, 1)
    recorder.finish(state, 1)
    assert [row["step"] for row in sink.rows] == [0]


def late(recorder: Recorder, state: RequestState, step: int, at: float, read: Callable[[], Numbers | None]) -> None:
    recorder.chosen_late([a_row(state, step)], Forward(True, 1, 4), at - 0.005, at, read)


def test_late_numbers_are_read_two_forwards_later_with_the_devices_times() -> None:
    """By then overlap has waited for that forward itself: reading stops nobody."""
    clock = LateClock()
    recorder, sink = a_recorder(clock)
    state = a_state()
    for step in range(4):
        late(recorder, state, step, 100.0 + step, lambda: numbers(margin=1.5))
    assert clock.waited == [100.0, 101.0], "the newest two are still on their way"
    assert state.late == 2
    recorder.finish(state, 4)
    assert clock.waited == [100.0, 101.0, 102.0, 103.0]
    assert [row["time"] for row in sink.rows] == [100.0, 101.0, 102.0, 103.0], "not the moment when the host looked"
    assert [row["step_ms"] for row in sink.rows] == pytest.approx([5.0] * 4), "one step, not two"
    assert state.first_token_time == 100.0
    assert state.last_token_time == 103.0


def test_a_clock_that_runs_away_is_tied_by_a_wait() -> None:
    clock = LateClock()
    recorder, _ = a_recorder(clock)
    state = a_state()
    late(recorder, state, 0, 1.0, numbers)
    late(recorder, state, 1, 2.0, numbers)
    assert clock.waited == []
    clock.tired = True
    late(recorder, state, 2, 3.0, numbers)
    assert clock.waited == [1.0, 2.0], "the forward before the newest: the one that the device runs now"


def test_an_end_waits_for_its_own_steps_only() -> None:
    clock = LateClock()
    recorder, sink = a_recorder(clock)
    mine, other = a_state(number=1), a_state(number=2)
    late(recorder, mine, 0, 1.0, numbers)
    late(recorder, other, 0, 2.0, numbers)
    recorder.finish(mine, 1)
    assert clock.waited == [1.0]
    assert [row["request"] for row in sink.rows] == [1]
    recorder.finish(other, 1)
    assert [row["request"] for row in sink.rows] == [1, 2]


def test_a_restart_reads_what_is_late_of_the_request_and_waits_for_nobody_else() -> None:
    clock = LateClock()
    recorder, _ = a_recorder(clock)
    mine, other = a_state(), a_state()
    late(recorder, mine, 0, 1.0, numbers)
    recorder.restart(other, 0)
    assert clock.waited == []
    recorder.restart(mine, 1)
    assert clock.waited == [1.0]
    assert mine.pending is None


def test_an_abort_without_a_token_leaves_nothing() -> None:
    recorder, sink = a_recorder()
    state = a_state()
    choose(recorder, state, 0)
    recorder.finish(state, 0)
    assert sink.rows == []
    assert (state.first_token_time, state.last_token_time) == (None, None)


def test_unobserved_requests_have_times_and_no_steps() -> None:
    """A sampled request's time to first token is not its whole time."""
    recorder, sink = a_recorder()
    state = a_state()
    for step in range(3):
        row = a_row(state, step, observed=False)
        recorder.chosen([row], Forward(step > 0, 5), float(step), None)
        time.sleep(0.002)
    recorder.finish(state, 3)
    assert sink.rows == []
    assert state.ledger.counters.steps == 0
    assert state.first_token_time is not None
    assert state.last_token_time is not None
    assert state.first_token_time < state.last_token_time
    assert state.max_batch_rows == 5


def test_rows_say_what_the_forward_ran_at() -> None:
    recorder, sink = a_recorder()
    state = a_state()
    recorder.chosen([a_row(state, 1, structural=True)], Forward(True, 3, 17, True), 0.0, numbers(margin=0.1))
    recorder.finish(state, 2)
    row = sink.rows[0]
    assert (row["batch_rows"], row["padded_rows"], row["canonical"], row["structural"]) == (3, 17, True, True)
    assert (row["triggered"], row["threshold"], row["prefill"]) == (False, 0.5, False)


@pytest.mark.parametrize(
    ("reason", "structural", "audited", "missed"),
    [
        (Reason.AUDIT, True, 1, 1),
        (Reason.AUDIT, False, 1, 1),
        (Reason.ALWAYS, False, 0, 0),
        (Reason.RESUME, False, 0, 0),
        (Reason.LIMIT, False, 0, 0),
    ],
)
def test_the_audits_bound_is_made_of_drawn_steps_alone(
    reason: Reason, structural: bool, audited: int, missed: int
) -> None:
    """Under ``always`` a flip is repaired: it is no miss of the gate's."""
    recorder, _ = a_recorder()
    state = a_state(Policy.GATE)
    choose(recorder, state, 1, reason=reason, structural=structural, verify_token=99)
    recorder.finish(state, 2)
    assert (recorder.audit.audited, recorder.audit.missed) == (audited, missed)
    assert recorder.structural_flips == int(structural)


@pytest.mark.parametrize("end", ["dropped", "finished"])
def test_a_request_that_is_dropped_leaves_nothing_though_nobody_collects_rows(end: str) -> None:
    """SGLang drops a retracted request that is aborted while it waits without a word."""
    recorder, _ = a_recorder()
    state = a_state()
    for step in range(3):
        choose(recorder, state, step)
    if end == "finished":
        recorder.finish(state, 3)
    recorder.settle()
    gone = weakref.ref(state)
    gc.disable()
    try:
        del state
        assert gone() is None, "the last reference was ours: no circle holds it"
    finally:
        gc.enable()


def test_rows_are_none_of_the_collectors_business() -> None:
    """Thousands a second: each full collection would look at those that wait for the trace."""
    assert not gc.is_tracked(a_row(a_state(), 1))
