"""The step without SGLang: what is verified, what is put in place, and what is noted where a forward ends."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trace_rows import rows_of

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.gate.claims import Claims, label
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

VOCAB = 16
PROMPT = 10


class Verifier:
    """Answers every job with the token that the test wants."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.jobs: list[VerifyJob] = []

    def verify(self, jobs: list[VerifyJob]) -> VerifyResult:
        self.jobs += jobs
        logits = torch.zeros(len(jobs), VOCAB)
        logits[:, self.answer] = 9.0
        return VerifyResult(logits, [KvDelta(0.0, 0.5)] * len(jobs), 0.001, 1, sum(len(j.rows) for j in jobs))


class FakeSampling:
    """A forward whose row r has the best token ``best[r]`` and the given margin."""

    processes = False
    columns = None
    asks: Sequence[bool] = ()

    def __init__(
        self, best: Sequence[int], margin: float, positions: Sequence[int], all_greedy: bool = True,
        drawn: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.logits = torch.zeros(len(best), VOCAB)
        for row, token in enumerate(best):
            self.logits[row, token] = 5.0
            self.logits[row, (token + 1) % VOCAB] = 5.0 - margin
        self.all_greedy = self.plain_argmax = all_greedy
        self.plain = True
        self.slots: list[Any] = list(range(len(best)))
        self._positions, self._drawn = positions, list(drawn if drawn is not None else best)

    def positions(self) -> Sequence[int]:
        return self._positions

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def choose(self) -> torch.Tensor:
        return torch.tensor(self._drawn)

    def keep(self, rows: list[int]) -> None:
        self.kept = list(rows)

    def score(self, tokens: torch.Tensor | None) -> None:
        self.scored = None if tokens is None else tokens.tolist()


class Bench:
    """A step with one verifier, and the rows that it traced."""

    def __init__(self, answer: int = 3, isolated: bool = True, audit: float = 0.0, window: int = 16) -> None:
        self.rows: list[dict[str, Any]] = []
        sink: Any = SimpleNamespace(add_steps=lambda rows: self.rows.extend(rows_of(rows)))
        self.recorder = Recorder(HostClock(), sink, Metrics(False, "m"))
        self.verifier = Verifier(answer)
        verifier: Any = self.verifier
        self.step = Step(
            self.recorder, PrefillRules(64, isolated), verifier, AuditSampler(audit), window, TestKnobs(), Metrics(False, "m")
        )  # fmt: skip

    def prefill(
        self, state: RequestState, generated: tuple[int, ...] = (), shape: ForwardShape | None = None, chooses: bool = True,
        token: int = 3, start: int = 0,
    ) -> torch.Tensor | None:  # fmt: skip
        chunk = Chunk(start, PROMPT + len(generated), PROMPT, generated)
        view = ForwardView([state], False, time.time(), chooses, shape, [chunk])
        self.step.ended(view)
        return self.step.sample(view, FakeSampling([token], 9.0, [])) if chooses else None

    def decode(
        self, states: list[RequestState | None], margin: float, position: int, in_class: bool = False, token: int = 3,
        **sampling: Any,
    ) -> torch.Tensor:  # fmt: skip
        rows = len(states)
        view = ForwardView(states, True, time.time(), True, ForwardShape(rows, rows + 1, in_class))
        self.step.ended(view)
        return self.step.sample(view, FakeSampling([token] * rows, margin, [position] * rows, **sampling))


def a_state(
    policy: Policy = Policy.GATE, repair: Repair = Repair.WINDOW, plain: bool = True, **more: Any
) -> RequestState:
    ungated = None if plain else "sampled"
    params = RequestParams(policy, 0.5, "", False)
    return RequestState(RequestLedger("r", params, repair, ungated, number=1), plain=plain, **more)


def test_a_low_margin_is_verified_and_put_in_place() -> None:
    bench, state = Bench(answer=7), a_state()
    bench.prefill(state)
    assert bench.decode([state], 3.0, PROMPT).tolist() == [3]
    assert bench.decode([state], 0.25, PROMPT + 1).tolist() == [7]
    assert [job.rows for job in bench.verifier.jobs] == [[(PROMPT, 3), (PROMPT + 1, 3)]]
    bench.recorder.finish(state, 3)
    assert [row["reason"] for row in bench.rows] == ["none", "none", "margin"]
    assert (bench.rows[-1]["flipped"], bench.rows[-1]["repaired"], bench.rows[-1]["token"]) == (True, True, 7)


def test_a_verified_step_tells_the_best_five_of_both_paths() -> None:
    bench, state = Bench(answer=7), a_state()
    bench.prefill(state)
    bench.decode([state], 3.0, PROMPT)
    bench.decode([state], 0.25, PROMPT + 1)
    bench.recorder.finish(state, 3)
    assert [row["forward"] for row in bench.rows] == [1, 2, 3]
    assert [row["fast_top_tokens"] is None for row in bench.rows] == [True, True, False]
    row = bench.rows[-1]
    assert row["fast_top_tokens"][:2] == [row["fast_token"], row["second_token"]] == [3, 4]
    assert row["verify_top_tokens"][0] == row["verify_token"] == 7
    gap = row["fast_top_logprobs"][0] - row["fast_top_logprobs"][1]
    assert gap == pytest.approx(row["margin"]), "taken before the repair was written into the same logits"
    assert row["verify_top_logprobs"][0] == pytest.approx(9.0 - math.log(math.exp(9.0) + VOCAB - 1), abs=1e-5)


def test_an_audited_step_is_for_the_record_only() -> None:
    bench, state = Bench(answer=7, audit=1.0), a_state()
    bench.prefill(state)
    assert bench.decode([state], 3.0, PROMPT).tolist() == [3], "an audit must not change the answer"
    assert bench.verifier.jobs[0].shadow
    bench.decode([state], 3.0, PROMPT + 1)
    assert len(bench.verifier.jobs[1].rows) == 2, "its columns stay open"
    bench.recorder.finish(state, 3)
    assert [row["repaired"] for row in bench.rows] == [False, False, False]
    assert state.ledger.counters.missed == 2


def test_a_resumed_step_is_verified_whatever_its_margin() -> None:
    bench, state = Bench(answer=7), a_state()
    bench.prefill(state)
    bench.decode([state], 9.0, PROMPT)
    tokens = bench.prefill(state, generated=(3, 3))
    assert tokens is not None
    assert tokens.tolist() == [7]
    assert bench.verifier.jobs[0].rows == [(PROMPT, 3), (PROMPT + 1, 3)]
    bench.recorder.finish(state, 3)
    assert bench.rows[-1]["reason"] == "resume"


def test_the_argmax_is_enforced_beside_sampled_rows() -> None:
    """SGLang's sampler takes greedy rows by another tie rule where a neighbour samples."""
    bench, gated, sampled = Bench(), a_state(), a_state(plain=False)
    bench.prefill(gated)
    bench.prefill(sampled)
    tokens = bench.decode([gated, sampled], 3.0, PROMPT, all_greedy=False, drawn=[12, 12])
    assert tokens.tolist() == [3, 12]
    assert gated.last_token == 3


@pytest.mark.parametrize(("audit", "margin", "token"), [(0.0, 0.25, 7), (1.0, 3.0, 3)], ids=["repaired", "audited"])
def test_beside_sampled_rows_a_repair_is_enforced_and_an_audit_is_not(audit: float, margin: float, token: int) -> None:
    bench, gated, sampled = Bench(answer=7, audit=audit), a_state(), a_state(plain=False)
    bench.prefill(gated)
    bench.prefill(sampled)
    tokens = bench.decode([gated, sampled], margin, PROMPT, all_greedy=False, drawn=[12, 12])
    assert len(bench.verifier.jobs) == 1
    assert tokens.tolist() == [token, 12]
    assert gated.last_token == token


def test_a_window_is_closed_at_its_limit() -> None:
    """Thousands of open columns would be recomputed in one silence."""
    bench, state = Bench(window=4), a_state()
    bench.prefill(state)
    for k in range(9):
        bench.decode([state], 9.0, PROMPT + k)
    assert [len(job.rows) for job in bench.verifier.jobs] == [4, 4]
    bench.recorder.finish(state, 10)
    assert [row["reason"] for row in bench.rows].count("limit") == 2
    assert state.ledger.counters.missed == 0


def test_column_repair_has_no_window_to_close() -> None:
    bench, state = Bench(window=2), a_state(repair=Repair.COLUMN)
    bench.prefill(state)
    for k in range(6):
        bench.decode([state], 9.0, PROMPT + k)
    assert bench.verifier.jobs == []


def test_steps_inside_the_class_need_no_verify_and_are_noted_as_structural() -> None:
    bench, state = Bench(isolated=False), a_state()
    bench.prefill(state, shape=ForwardShape(PROMPT, 64, True))
    bench.decode([state], 0.0, PROMPT, in_class=True)
    bench.recorder.finish(state, 2)
    assert bench.verifier.jobs == []
    assert [row["structural"] for row in bench.rows] == [False, True]
    assert [row["canonical"] for row in bench.rows] == [True, True]
    assert [row["padded_rows"] for row in bench.rows] == [64, 2], "rows the kernels saw, not the requests"
    assert not state.ledger.notes


@pytest.mark.parametrize("inside", [True, False])
def test_a_forward_is_canonical_only_where_it_was_seen_to_be(inside: bool) -> None:
    bench, state = Bench(isolated=False), a_state()
    bench.prefill(state, shape=ForwardShape(PROMPT, 64, inside))
    bench.decode([state], 9.0, PROMPT, in_class=inside)
    bench.recorder.finish(state, 2)
    assert [row["canonical"] for row in bench.rows] == [inside, inside]
    assert [row["structural"] for row in bench.rows] == [False, inside]


def test_a_prefill_of_two_is_canonical_only_if_both_are() -> None:
    bench, one, other = Bench(), a_state(), a_state()
    chunks = [Chunk(0, PROMPT, PROMPT), Chunk(0, PROMPT, PROMPT)]
    view = ForwardView([one, other], False, time.time(), chunks=chunks)
    bench.step.ended(view)
    bench.step.sample(view, FakeSampling([3, 4], 9.0, []))
    for state in (one, other):
        bench.recorder.finish(state, 1)
    assert [row["canonical"] for row in bench.rows] == [False, False]


@pytest.mark.parametrize("chooses", [True, False])
def test_a_prefill_outside_its_class_is_noted_though_no_token_is_chosen_from_it(chooses: bool) -> None:
    """SGLang prefills a prompt without sampling before every n > 1: the n answers read its columns."""
    bench, state = Bench(isolated=False), a_state()
    bench.prefill(state, shape=ForwardShape(PROMPT, PROMPT, False), chooses=chooses)
    assert state.ledger.notes == ["a prefill forward ran outside the canonical class"]
    assert state.ledger.prefills == 1


@pytest.mark.parametrize(
    ("start", "end", "says"), [(0, 70, "left the grid"), (5, 64, "left the grid"), (0, 64, None), (64, 100, None)]
)
def test_a_chunk_off_the_grid_is_noted(start: int, end: int, says: str | None) -> None:
    bench, state = Bench(), a_state()
    view = ForwardView([state], False, time.time(), chunks=[Chunk(start, end, 100)])
    bench.step.ended(view)
    assert (state.ledger.notes == []) is (says is None)
    assert says is None or says in state.ledger.notes[0]
    assert view.canonical == [says is None]


def test_a_chunk_that_shared_its_forward_is_noted() -> None:
    bench, one, other = Bench(), a_state(), a_state(Policy.OFF)
    view = ForwardView([one, other], False, time.time(), chunks=[Chunk(0, 10, 10), Chunk(0, 9, 9)])
    bench.step.ended(view)
    assert one.ledger.notes == ["a prompt chunk shared its forward with another request"]


def test_a_decode_after_a_prefill_that_chose_nothing_is_no_error() -> None:
    """SGLang overlaps one decode of a request that wanted no token."""
    bench, state, other = Bench(), a_state(), a_state()
    bench.prefill(state, chooses=False)
    bench.prefill(other)
    bench.decode([state, other], 0.1, PROMPT)
    assert state.ledger.ungated is None
    assert bench.recorder.totals.ledger_errors == 0
    assert all(token >= 0 for job in bench.verifier.jobs for _, token in job.rows), "no embedding has row -1"
    bench.recorder.finish(state, 0)
    assert state.ledger.counters.steps == 0


def test_a_position_that_does_not_follow_gives_up_and_says_so() -> None:
    bench, state = Bench(), a_state()
    bench.prefill(state)
    bench.decode([state], 0.1, PROMPT + 5)
    assert state.ledger.ungated is not None
    assert "expects 10" in state.ledger.ungated
    assert bench.verifier.jobs == []


@pytest.mark.parametrize("slot", [None])
def test_a_request_that_has_ended_is_not_verified(slot: None) -> None:
    bench, state = Bench(), a_state()
    bench.prefill(state)
    view = ForwardView([state], True, time.time(), shape=ForwardShape(1, 1, False))
    sampling = FakeSampling([3], 0.1, [PROMPT])
    sampling.slots = [slot]
    bench.step.sample(view, sampling)
    assert bench.verifier.jobs == []


def test_which_steps_are_drawn_is_known_before_their_margin() -> None:
    """An audit must not make the steps wait that it did not draw."""
    bench, state = Bench(audit=0.25, isolated=False), a_state()
    bench.prefill(state, shape=ForwardShape(PROMPT, 64, True))
    drawn: list[bool] = []
    for k in range(40):
        view = ForwardView([state], True, time.time(), True, ForwardShape(1, 17, True))
        rows = bench.step._open_decode(view, FakeSampling([3], 9.0, [PROMPT + k]))
        assert rows[0].waits is rows[0].audit
        drawn.append(rows[0].audit)
    assert 0 < sum(drawn) < 40


def test_penalties_that_were_forgotten_cost_the_label() -> None:
    bench, state = Bench(), a_state()
    state.penalised = True
    bench.prefill(state)
    assert state.ledger.notes == []
    bench.prefill(state, generated=(3,))
    assert state.resumed_at == 1
    assert any("penalties" in note for note in state.ledger.notes)


def test_steps_of_an_answer_that_began_anew_stand_for_nothing() -> None:
    """SGLang discards the output of a retracted prompt of embeddings: what its first steps were says nothing of the second ones."""
    bench, state = Bench(answer=7), a_state()
    for _ in range(2):
        bench.prefill(state)
        assert state.ledger.notes == [], "nothing was shown before"
    for k in range(3):
        bench.decode([state], 0.25, PROMPT + k)
    bench.prefill(state)
    bench.decode([state], 3.0, PROMPT)
    bench.decode([state], 3.0, PROMPT + 1)
    bench.recorder.finish(state, 3)
    guarantee, note = label(state.ledger, Claims(prefill="grid", decode=True), 3)
    assert (guarantee.value, "began anew" in note) == ("none", True)


# ---- observed without a wait: a GPU's path, on tensors of the host -------------------------------------------------------


@pytest.fixture
def unwaited(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A step whose clock passes late, as a GPU's does: forwards that wait for no verdict are not waited for."""
    bench = Bench(isolated=False)
    monkeypatch.setattr(bench.recorder.clock, "late", True, raising=False)
    return bench


def observe(bench: Bench, states: list[RequestState], position: int, sampling: FakeSampling) -> list[int]:
    rows = len(states)
    view = ForwardView(list(states), True, time.time(), True, ForwardShape(rows, rows, True))
    opened = bench.step._open_decode(view, sampling)
    tokens = bench.step._observe(view, opened, [row for row in opened if row.observed], sampling)
    return tokens.tolist()


def test_without_a_wait_the_same_numbers_are_recorded(unwaited: Bench) -> None:
    state = a_state()
    unwaited.prefill(state, shape=ForwardShape(PROMPT, 64, True))
    for k, token in enumerate((5, 6, 7)):
        assert observe(unwaited, [state], PROMPT + k, FakeSampling([token], 0.25, [PROMPT + k])) == [token]
    assert state.late == 2, "the newest steps' numbers are read when overlap has waited for them"
    unwaited.recorder.finish(state, 4)
    assert [row["token"] for row in unwaited.rows] == [3, 5, 6, 7]
    assert [row["second_token"] for row in unwaited.rows[1:]] == [6, 7, 8]
    assert [row["margin"] for row in unwaited.rows[1:]] == [0.25] * 3
    assert [row["structural"] for row in unwaited.rows] == [False, True, True, True]
    assert state.ledger.counters.steps == 4


@pytest.mark.parametrize("all_greedy", [True, False])
def test_without_a_wait_the_argmax_is_enforced_beside_sampled_rows(unwaited: Bench, all_greedy: bool) -> None:
    gated, sampled = a_state(), a_state(plain=False)
    for state in (gated, sampled):
        unwaited.prefill(state, shape=ForwardShape(PROMPT, 64, True))
    sampling = FakeSampling([3, 3], 3.0, [PROMPT] * 2, all_greedy=all_greedy, drawn=[12, 12])
    assert observe(unwaited, [gated, sampled], PROMPT, sampling) == ([3, 3] if all_greedy else [3, 12])


def test_with_an_audit_only_the_forwards_wait_in_which_a_step_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, state = Bench(audit=0.25, isolated=False), a_state()
    monkeypatch.setattr(bench.recorder.clock, "late", True, raising=False)
    bench.prefill(state, shape=ForwardShape(PROMPT, 64, True))
    waited, late = [], []
    for k in range(40):
        view = ForwardView([state], True, time.time(), True, ForwardShape(1, 17, True))
        bench.step.sample(view, FakeSampling([3], 9.0, [PROMPT + k]))
        waited.append(view.waited)
        late.append(state.late)
    draws = AuditSampler(0.25)
    assert waited == [draws.draw("1", k + 1) for k in range(40)]
    assert 0 < sum(waited) < 40
    assert len(bench.verifier.jobs) == sum(waited)
    assert all(on_their_way == 0 for on_their_way, did in zip(late, waited) if did), "a verify knows what came before"
    assert 2 in late, "the others' numbers are still on their way when the next forward begins"


def test_what_waits_for_its_margin() -> None:
    """On a GPU these steps stop the host; nothing else does."""
    bench, state = Bench(isolated=False), a_state()
    bench.prefill(state, shape=ForwardShape(PROMPT, 64, True))

    def opened(position: int, in_class: bool) -> Any:
        view = ForwardView([state], True, time.time(), True, ForwardShape(1, 1, in_class))
        return bench.step._open_decode(view, FakeSampling([3], 9.0, [position]))[0]

    assert not opened(PROMPT, True).waits, "structural, and nothing is open"
    assert opened(PROMPT + 1, False).waits, "its margin decides"
    assert opened(PROMPT + 2, True).waits, "it read a column that is open"
    resumed = bench.step._open_prefill(
        ForwardView([state], False, time.time(), chunks=[Chunk(0, PROMPT + 2, PROMPT, (3, 3))]),
        FakeSampling([3], 9.0, []),
    )
    assert resumed[0].waits, "a resumed step is verified before its token is shown"
    first = bench.step._open_prefill(
        ForwardView([state], False, time.time(), chunks=[Chunk(0, PROMPT, PROMPT)]), FakeSampling([3], 9.0, [])
    )
    assert not first[0].waits
