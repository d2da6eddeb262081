"""The step, detail by detail: what reaches the verifier, SGLang's sampler and the record, and when what is late is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trace_rows import rows_of

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.prefill import Chunk, PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.state import RequestState
from sglang_margingate.runtime.step import Step
from sglang_margingate.runtime.verifier import KvDelta, VerifyJob, VerifyResult
from sglang_margingate.runtime.view import ForwardShape, ForwardView

VOCAB, PROMPT, ANSWER = 16, 10, 7


class LateClock(HostClock):
    """A device whose work nobody waits for."""

    late = True

    def wants_wait(self) -> bool:
        return False


class Server:
    """A step, with what it asked of its verifier and its sampler."""

    def __init__(self, clock: HostClock | None = None, audit: float = 0.0, knobs: TestKnobs | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.jobs: list[VerifyJob] = []
        self.noted: list[int] = []
        self.counted: list[tuple[int, int, float]] = []
        sink: Any = SimpleNamespace(add_steps=lambda rows: self.rows.extend(rows_of(rows)))
        metrics = Metrics(False, "m")
        metrics.verify = lambda *numbers: self.counted.append(numbers)  # type: ignore[method-assign]
        self.pool = SimpleNamespace(read=lambda slots: [slots.float()], write=self.wrote)
        self.written: list[tuple[list[int], list[float]]] = []
        self.recorder = Recorder(clock or HostClock(), sink, metrics, lambda token: f"<{token}>")
        verifier: Any = SimpleNamespace(verify=self.verify, kv=self.pool)
        self.step = Step(
            self.recorder, PrefillRules(64), verifier, AuditSampler(audit), 16, knobs or TestKnobs(), metrics, self.noted.append
        )  # fmt: skip

    def wrote(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        self.written.append((slots.tolist(), columns[0].tolist()))

    def verify(self, jobs: list[VerifyJob]) -> VerifyResult:
        self.jobs += jobs
        logits = torch.zeros(len(jobs), VOCAB)
        logits[:, ANSWER] = 9.0
        return VerifyResult(logits, [KvDelta(0.25, 0.5)] * len(jobs), 0.002, 3, sum(len(job.rows) for job in jobs))

    def prefill(self, states: Sequence[RequestState], generated: tuple[int, ...] = (), **more: Any) -> torch.Tensor:
        chunk = Chunk(0, PROMPT + len(generated), PROMPT, generated, 4)
        view = ForwardView(list(states), False, time.time() - 1.0, True, None, [chunk] * len(states))
        self.step.ended(view)
        return self.step.sample(view, Sampling([3] * len(states), 9.0, [], **more))

    def decode(
        self, states: Sequence[RequestState], position: int, margin: float = 3.0, in_class: bool = False, **more: Any
    ) -> torch.Tensor:
        rows = len(states)
        view = ForwardView(list(states), True, time.time(), True, ForwardShape(rows, rows + 1, in_class))
        self.step.ended(view)
        return self.step.sample(view, Sampling([3] * rows, margin, [position] * rows, **more))


class Sampling:
    """Rows whose best token is given, and by how much."""

    processes = False
    plain = True

    def __init__(
        self, best: list[int], margin: float, positions: list[int], drawn: list[int] | None = None, plain: bool = True,
        asks: Sequence[bool] = (), columns: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.logits = torch.zeros(len(best), VOCAB)
        for row, token in enumerate(best):
            self.logits[row, token], self.logits[row, (token + 1) % VOCAB] = 5.0, 5.0 - margin
        self.all_greedy = self.plain_argmax = plain
        self.slots = [100 + row for row in range(len(best))]
        self.columns = None if columns is None else torch.tensor(columns)
        self.asks, self._positions, self._drawn = asks, positions, drawn

    def positions(self) -> list[int]:
        return self._positions

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def choose(self) -> torch.Tensor:
        assert self._drawn is not None, "nobody needs SGLang's sampler here"
        return torch.tensor(self._drawn)

    def keep(self, rows: list[int]) -> None:
        """Keep nothing: the values are other tests' matter."""

    def score(self, tokens: torch.Tensor | None) -> None:
        """Score nothing."""


def a_state(policy: Policy = Policy.GATE, plain: bool = True, number: int = 1, threshold: float = 0.5) -> RequestState:
    params = RequestParams(policy, threshold, "", False)
    return RequestState(
        RequestLedger(f"r{number}", params, Repair.WINDOW, None if plain else "sampled", number=number), plain=plain
    )


def test_a_batch_nobody_watches_gets_what_sglang_chooses() -> None:
    server, state = Server(), a_state(Policy.OFF)
    assert server.prefill([state], drawn=[11]).tolist() == [11]
    assert server.decode([state, state], PROMPT, drawn=[12, 13]).tolist() == [12, 13]
    server.recorder.finish(state, 2)
    assert state.first_token_time is not None
    assert server.rows == []
    assert server.noted == [2], "decodes alone count as batches"


def test_what_a_prefill_leaves_with_its_request() -> None:
    server, state, beside = Server(), a_state(), a_state(number=2)
    server.prefill([state, beside])
    assert (state.prefill_chunks, state.prompt_tokens, state.cached_tokens, state.resumed_at) == (1, PROMPT, 4, 0)
    assert 900 < state.prefill_ms < 60_000
    assert beside.prefill_ms == state.prefill_ms
    assert state.last_token == 3


@pytest.mark.parametrize("clock", [HostClock, LateClock])
def test_one_token_before_a_retraction_is_enough_to_be_verified(clock: type[HostClock]) -> None:
    server, state = Server(clock()), a_state()
    assert server.prefill([state], (5,)).tolist() == [ANSWER]
    assert [job.rows for job in server.jobs] == [[(PROMPT, 5)]]
    server.recorder.finish(state, 2)
    (row,) = server.rows
    assert (row["reason"], row["position"], row["step"], row["token"]) == ("resume", PROMPT, 1, ANSWER)
    assert state.resumed_at == 1


def test_what_a_verify_is_asked_and_what_it_tells() -> None:
    server, states = Server(), [a_state(), a_state(number=2)]
    server.prefill(states)
    assert server.decode(states, PROMPT, 0.25).tolist() == [ANSWER, ANSWER]
    assert [job.pool_index for job in server.jobs] == [100, 101]
    assert server.counted == [(3, 2, 0.002)]
    for state in states:
        server.recorder.finish(state, 2)
    assert [row["waited_ms"] if "waited_ms" in row else row["verify_ms"] for row in server.rows if row["step"]] == [
        2.0,
        2.0,
    ]
    row = next(row for row in server.rows if row["step"])
    assert (row["verify_token"], row["verify_margin"], row["flipped"], row["repaired"]) == (ANSWER, 9.0, True, True)
    assert (row["token"], row["token_text"]) == (ANSWER, f"<{ANSWER}>")


def test_a_row_outside_the_class_that_was_not_verified_is_not_scored() -> None:
    for in_class, margin, scored in ((False, 3.0, 0), (False, 0.25, 1), (True, 3.0, 1)):
        server, state = Server(), a_state()
        server.prefill([state])
        server.decode([state], PROMPT, margin, in_class, asks=[True])
        server.recorder.finish(state, 2)
        assert state.ledger.counters.scored == scored, (in_class, margin)
    server, state = Server(LateClock()), a_state()
    server.prefill([state], asks=[True])
    server.decode([state], PROMPT, 3.0, True, asks=[True])
    server.recorder.finish(state, 2)
    assert state.ledger.counters.scored == 2, "a prefill's token, and a step inside the class that nothing waited for"


def test_a_step_outside_the_class_reads_the_token_that_is_late() -> None:
    server, state = Server(LateClock()), a_state()
    server.prefill([state])
    assert state.late == 1, "nothing waits for a prefill"
    server.decode([state], PROMPT, 3.0)
    assert state.ledger.window == [3], "not the dummy of a request that has no token yet"


def test_numbers_of_a_larger_batch_come_after_those_of_a_small_one() -> None:
    server, one = Server(LateClock()), a_state(Policy.LOG)
    server.decode([one], 0, 2.0)
    many = [a_state(Policy.LOG, number=n) for n in range(2, 72)]
    assert server.decode(many, 0, 1.0).tolist() == [3] * 70
    for state in (one, *many):
        server.recorder.finish(state, 2)
    assert [row["margin"] for row in server.rows] == [2.0] + [1.0] * 70


def test_beside_a_sampled_neighbour_the_record_has_what_was_chosen() -> None:
    server, gated, sampled = Server(LateClock()), a_state(), a_state(plain=False, number=2)
    server.prefill([gated, sampled], plain=False, drawn=[12, 13])
    tokens = server.decode([gated, sampled], PROMPT, 3.0, True, plain=False, drawn=[12, 13])
    assert tokens.tolist() == [3, 13]
    for state in (gated, sampled):
        server.recorder.finish(state, 2)
    assert [(row["step"], row["token"], row["fast_token"]) for row in server.rows] == [(0, 3, 3), (1, 3, 3)]


def test_a_share_of_steps_may_stand_for_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINGATE_TEST_SHARE", "1")
    knobs = TestKnobs()
    for in_class in (False, True):
        server, state = Server(knobs=knobs), a_state(threshold=0.3)
        server.prefill([state])
        for step in range(1, 60):
            server.decode([state], PROMPT + step - 1, 3.0, in_class)
        server.recorder.finish(state, 60)
        drawn = [step for step in range(1, 60) if knobs.draws("r1", step, 0.3)]
        assert 5 < len(drawn) < 40
        found = [row["step"] for row in server.rows if row["triggered"]]
        assert found == ([] if in_class else drawn), "a step inside the class never triggers"


def test_a_fault_reaches_logits_and_column_of_its_row() -> None:
    server, state, other = Server(knobs=TestKnobs(poison_every=2)), a_state(), a_state(number=2)
    server.prefill([state, other])
    assert server.decode([state, other], PROMPT, 3.0, True, columns=[40, 41]).tolist() == [3, 3]
    assert server.written == []
    assert server.decode([state, other], PROMPT + 1, 3.0, True, columns=[42, 43]).tolist() == [4, 4]
    assert server.written == [([42], [42.25]), ([43], [43.25])]


def test_audits_are_drawn_by_request_and_step() -> None:
    sampler = AuditSampler(0.3)
    server, state = Server(audit=0.3), a_state(number=5)
    server.prefill([state])
    for step in range(1, 40):
        server.decode([state], PROMPT + step - 1, 3.0, True)
    server.recorder.finish(state, 40)
    assert [row["step"] for row in server.rows if row["reason"] == "audit"] == [
        s for s in range(1, 40) if sampler.draw("5", s)
    ]
    always = a_state(Policy.ALWAYS, number=5)
    server.prefill([always])
    server.decode([always], PROMPT, 3.0)
    server.recorder.finish(always, 2)
    assert server.rows[-1]["reason"] == "always", "what is verified anyway is not audited"


def test_per_token_detail_of_a_request_that_asked_for_it() -> None:
    server, state = Server(), a_state()
    state.steps = {"margin": [], "verified": [], "flipped": [], "reason": []}
    server.prefill([state])
    server.decode([state], PROMPT, 3.0)
    server.decode([state], PROMPT + 1, 0.25)
    server.recorder.finish(state, 3)
    assert state.steps == {
        "margin": [5.0, 3.0, 0.25], "verified": [False, False, True], "flipped": [False, False, True],
        "reason": ["none", "none", "margin"],
    }  # fmt: skip


@pytest.mark.parametrize("clock", [HostClock, LateClock])
def test_every_step_of_a_request_that_asked_for_it_tells_its_best_five(clock: type[HostClock]) -> None:
    """Also where nothing waits for the forward: the best tokens come with its other numbers. Of its neighbour, where verified."""
    server, asked, other = Server(clock()), a_state(number=1), a_state(number=2)
    asked.steps = {"margin": [], "verified": [], "flipped": [], "reason": []}
    server.prefill([other, asked])
    for step, (margin, in_class) in enumerate(((3.0, True), (2.0, True), (0.25, False))):
        server.decode([other, asked], PROMPT + step, margin, in_class)
    for state in (asked, other):
        server.recorder.finish(state, 4)
    mine = [row for row in server.rows if row["request"] == 1]
    assert [row["fast_top_tokens"][:2] for row in mine] == [[row["fast_token"], row["second_token"]] for row in mine]
    gaps = [row["fast_top_logprobs"][0] - row["fast_top_logprobs"][1] for row in mine]
    assert gaps == pytest.approx([row["margin"] for row in mine], abs=1e-5)
    assert [row["reason"] for row in mine] == ["none", "none", "none", "margin"]
    assert [row["verify_top_tokens"] is None for row in mine] == [True, True, True, False]
    assert mine[-1]["verify_top_tokens"][0] == mine[-1]["verify_token"] == ANSWER
    theirs = [row for row in server.rows if row["request"] == 2]
    assert [row["fast_top_tokens"] is None for row in theirs] == [True, True, True, False]


def test_totals_are_those_of_all_requests() -> None:
    server, states = Server(), [a_state(number=n) for n in (1, 2, 3)]
    server.prefill(states)
    server.decode(states, PROMPT, 3.0, True, asks=[True, True, False])
    server.decode(states, PROMPT + 1, 0.25)
    for state in states:
        server.recorder.finish(state, 3)
    totals = server.recorder.totals
    assert (totals.steps, totals.structural, totals.scored, totals.triggers, totals.flips, totals.repaired) == (
        9,
        3,
        2,
        3,
        3,
        3,
    )
    assert (server.recorder.audit.untriggered, server.recorder.audit.triggered) == (6, 3)
    one = states[0].ledger.counters
    assert (one.steps, one.structural, one.scored, one.triggers, one.flips, one.verify_ms) == (3, 1, 1, 1, 1, 2.0)
