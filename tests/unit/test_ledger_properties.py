"""The ledger and the recorder against naive models, over drawn histories."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trace_rows import rows_of

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.observe import Numbers
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.state import Forward, RequestState, StepRow, StepRows

PARAMS = RequestParams(Policy.GATE, 0.5, "", False)


class LedgerMachine(RuleBasedStateMachine):
    """The ledger against a plain list that holds of every column its token and whether it is canonical."""

    @initialize(prompt=st.integers(1, 5), repair=st.sampled_from(Repair))
    def begin(self, prompt: int, repair: Repair) -> None:
        self.repair, self.prompt = repair, prompt
        self.book = RequestLedger("r", PARAMS, repair)
        self.book.start(prompt, [])
        self.columns: list[tuple[int, bool]] = [(-1, True)] * prompt
        self.recomputed = 0

    @rule(token=st.integers(0, 9), in_class=st.booleans())
    def decode(self, token: int, in_class: bool) -> None:
        structural = self.book.read(len(self.columns), token, in_class)
        assert structural is (in_class and all(canonical for _, canonical in self.columns))
        self.columns.append((token, structural))

    @precondition(lambda self: len(self.columns) > self.prompt)
    @rule()
    def verify(self) -> None:
        rows = self.book.rows()
        assert rows[-1][0] == len(self.columns) - 1, "the newest column's logits are the answer"
        assert rows == [(p, self.columns[p][0]) for p, _ in rows], "every row reads the token that stands there"
        if self.repair is Repair.WINDOW:
            open_columns = [p for p, (_, canonical) in enumerate(self.columns) if not canonical]
            assert set(open_columns) <= {p for p, _ in rows}, "no batch-shaped column is left behind"
        for position, token in rows:
            self.columns[position] = (token, True)
        self.book.repaired()

    @precondition(lambda self: len(self.columns) > self.prompt)
    @rule()
    def retract(self) -> None:
        """Generated columns are prefilled again, at another shape."""
        self.columns = [(t, p < self.prompt) for p, (t, _) in enumerate(self.columns)]
        self.book.start(self.prompt, [token for token, _ in self.columns[self.prompt :]])

    @invariant()
    def clean_is_never_said_of_open_columns(self) -> None:
        if self.book.clean:
            assert all(canonical for _, canonical in self.columns)


LedgerMachine.TestCase.settings = settings(deadline=None, max_examples=60)
TestLedger = LedgerMachine.TestCase


class Late(HostClock):
    late = True


@given(
    late=st.booleans(),
    events=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["step", "step", "step", "retract", "end"])), max_size=60
    ),
)
def test_every_shown_token_is_traced_once_and_in_order(late: bool, events: list[tuple[int, str]]) -> None:
    """Whatever ends or is retracted in between: rows in = tokens shown, none twice, none of a dropped step."""
    rows: list[dict[str, Any]] = []

    class Sink:
        def add_steps(self, more: StepRows) -> None:
            rows.extend(rows_of(more))

    recorder = Recorder(Late() if late else HostClock(), Sink(), Metrics(False, "m"))
    states = [RequestState(RequestLedger(str(k), PARAMS, Repair.WINDOW, number=k)) for k in range(3)]
    shown: list[list[int]] = [[], [], []]
    flight: list[list[int]] = [[], [], []]  # chosen, not shown yet: overlap is one step ahead
    ended: set[int] = set()
    clock = 0.0

    def choose(k: int, token: int) -> None:
        nonlocal clock
        clock += 1.0
        step = len(shown[k]) + len(flight[k])
        row = StepRow(0, 0, states[k], 10 + step, step)
        forward, numbers = Forward(step > 0, 1, 1), Numbers([token], [0], [1.0], [token])
        if late:
            recorder.chosen_late([row], forward, clock, clock, lambda: numbers)
        else:
            recorder.chosen([row], forward, clock, numbers)
        flight[k].append(token)

    for n, (k, event) in enumerate(events):
        if k in ended:
            continue
        if event == "step":
            choose(k, n)
            if len(flight[k]) == 2:  # the results of a forward are shown once the next was launched
                shown[k].append(flight[k].pop(0))
        elif event == "retract":
            flight[k].clear()
            recorder.restart(states[k], len(shown[k]))
        else:
            if flight[k]:
                shown[k].append(flight[k].pop(0))
            recorder.finish(states[k], len(shown[k]))
            ended.add(k)
    for k in set(range(3)) - ended:
        recorder.finish(states[k], len(shown[k]))
    for k in range(3):
        mine = [row for row in rows if row["request"] == k]
        assert [row["token"] for row in mine] == shown[k]
        assert [row["step"] for row in mine] == list(range(len(shown[k])))
        assert states[k].ledger.counters.steps == len(shown[k])
