"""The gate's decisions and the ledger of open columns."""

from __future__ import annotations

import pytest

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.ledger import Counters, LedgerError, RequestLedger
from sglang_margingate.gate.policy import decide, missed, outcome, triggers
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.words import Reason


def ledger(policy: Policy = Policy.GATE, repair: Repair = Repair.WINDOW, ungated: str | None = None) -> RequestLedger:
    return RequestLedger("r", RequestParams(policy, 0.5, "", False), repair, ungated)


@pytest.mark.parametrize(
    ("margin", "threshold", "expected"),
    [(0.5, 0.5, True), (0.0, 0.0, True), (0.51, 0.5, False), (float("nan"), 0.5, True), (float("inf"), 0.5, False)],
)
def test_trigger_at_or_below_the_threshold(margin: float, threshold: float, expected: bool) -> None:
    assert triggers(margin, threshold) is expected


@pytest.mark.parametrize(
    ("policy", "margin", "audit", "reason"),
    [
        (Policy.ALWAYS, 9.0, False, Reason.ALWAYS),
        (Policy.GATE, 0.1, False, Reason.MARGIN),
        (Policy.GATE, 0.1, True, Reason.MARGIN),
        (Policy.GATE, 9.0, True, Reason.AUDIT),
        (Policy.GATE, 9.0, False, Reason.NONE),
        (Policy.LOG, 0.0, True, Reason.NONE),
        (Policy.OFF, 0.0, True, Reason.NONE),
    ],
)
def test_reasons(policy: Policy, margin: float, audit: bool, reason: Reason) -> None:
    assert decide(policy, margin, 0.5, audit) is reason


def test_a_full_window_is_verified_before_an_audit_and_after_a_trigger() -> None:
    assert decide(Policy.GATE, 9.0, 0.5, audit=True, full=True) is Reason.LIMIT
    assert decide(Policy.GATE, 0.1, 0.5, full=True) is Reason.MARGIN
    assert decide(Policy.LOG, 9.0, 0.5, full=True) is Reason.NONE


def test_window_holds_every_column_since_the_last_verify() -> None:
    book = ledger()
    book.start(10, [])
    for position, token in ((10, 5), (11, 6), (12, 7)):
        book.read(position, token)
    assert book.rows() == [(10, 5), (11, 6), (12, 7)]
    book.repaired()
    book.read(13, 8)
    assert book.rows() == [(13, 8)]


def test_column_repair_recomputes_the_newest_alone() -> None:
    book = ledger(repair=Repair.COLUMN)
    book.start(10, [])
    book.read(10, 5)
    book.read(11, 6)
    assert book.rows() == [(11, 6)]
    book.repaired()
    book.read(12, 7)
    assert book.rows() == [(12, 7)]


def test_resume_opens_every_generated_column() -> None:
    book = ledger()
    book.start(10, [])
    book.read(10, 5)
    book.repaired()
    book.start(10, [5, 6, 7])
    assert book.rows() == [(10, 5), (11, 6), (12, 7)]


def test_a_window_is_full_at_its_limit() -> None:
    book, column = ledger(), ledger(repair=Repair.COLUMN)
    for each in (book, column):
        each.start(10, [])
        for k in range(3):
            each.read(10 + k, 5)
    assert (book.full(3), book.full(4)) == (True, False)
    assert not column.full(3), "`column` repair never reads its window back"


@pytest.mark.parametrize(
    ("reason", "missed_flip"),
    [(Reason.RESUME, False), (Reason.LIMIT, False), (Reason.AUDIT, True), (Reason.ALWAYS, True)],
)
def test_missed_is_a_flip_that_its_margin_would_have_let_through(reason: Reason, missed_flip: bool) -> None:
    assert missed(reason, False, True) is missed_flip
    assert not missed(reason, True, True)
    assert not missed(reason, False, False)


@pytest.mark.parametrize("position", [9, 11, 30])
def test_a_position_that_does_not_follow_is_an_error(position: int) -> None:
    book = ledger()
    book.start(10, [])
    with pytest.raises(LedgerError, match="expects 10"):
        book.read(position, 1)


def test_counts() -> None:
    book = ledger()
    book.counters.add(Reason.NONE, False, False, 0.0)
    book.counters.add(Reason.MARGIN, True, True, 1.0)
    book.counters.add(Reason.AUDIT, False, True, 2.0)
    c = book.counters
    assert (c.steps, c.triggers, c.verified, c.audited, c.flips, c.missed, c.verify_ms) == (3, 1, 2, 1, 2, 1, 3.0)
    assert c.repaired == 1, "an audit is for the record only"


def test_a_flip_at_a_resumed_step_is_repaired_and_not_missed() -> None:
    book = ledger()
    book.counters.add(Reason.RESUME, False, True, 1.0)
    assert (book.counters.flips, book.counters.missed) == (1, 0)


@pytest.mark.parametrize("book", [ledger(Policy.LOG), ledger(ungated="sampled")])
def test_ungated_requests_are_not_gated(book: RequestLedger) -> None:
    assert not book.gated


def test_a_step_inside_the_class_needs_no_window() -> None:
    book = ledger()
    book.start(10, [])
    assert book.read(10, 5, in_class=True)
    assert book.read(11, 6, in_class=True)
    assert book.rows() == [(11, 6)]
    assert (book.outside, book.clean) == (0, True)


def test_a_step_outside_opens_the_window_until_a_verify() -> None:
    book = ledger()
    book.start(10, [])
    assert book.read(10, 5, in_class=True)
    assert not book.read(11, 6, in_class=False)
    assert not book.read(12, 7, in_class=True)  # it reads column 11
    assert book.rows() == [(11, 6), (12, 7)]
    book.repaired()
    assert book.read(13, 8, in_class=True)
    assert book.outside == 2


def test_column_repair_leaves_columns_that_spoil_later_steps() -> None:
    book = ledger(repair=Repair.COLUMN)
    book.start(10, [])
    book.read(10, 5, in_class=False)
    book.read(11, 6, in_class=False)
    assert book.rows() == [(11, 6)]
    book.repaired()
    assert not book.read(12, 7, in_class=True)
    assert not book.clean
    assert book.stale


def test_column_repair_of_a_resumed_request_starts_at_its_newest_token() -> None:
    book = ledger(repair=Repair.COLUMN)
    book.start(10, [5, 6])
    assert book.rows() == [(11, 6)]


def test_what_a_decision_assumes_where_nothing_is_said() -> None:
    assert decide(Policy.GATE, 9.0, 0.5) is Reason.NONE
    assert decide(Policy.GATE, 0.1, 0.5) is Reason.MARGIN, "not structural"


def test_counters_add_up() -> None:
    c = Counters()
    c.add(Reason.NONE, False, False)
    assert c == Counters(steps=1), "nothing is counted that was not said"
    for _ in range(2):
        c.add(Reason.AUDIT, False, True, 1.5, True, True)
    assert (c.steps, c.audited, c.structural, c.scored, c.verify_ms) == (3, 2, 2, 2, 3.0)


def test_every_prefill_is_counted_and_a_reason_noted_once() -> None:
    book = ledger()
    for why in (None, "left the grid", "left the grid"):
        book.note_prefill(why)
    assert (book.prefills, book.notes) == (3, ["left the grid"])


def test_decisions_are_what_ranks_must_agree_on() -> None:
    found = Counters(steps=3, verify_ms=1.5).decisions()
    assert found["steps"] == 3
    assert "verify_ms" not in found, "every rank has its own time"
    assert len(found) == len(vars(Counters())) - 1


@pytest.mark.parametrize(
    ("reason", "triggered", "flipped", "repaired", "word"),
    [
        (Reason.MARGIN, True, True, True, "repaired"),
        (Reason.ALWAYS, False, True, True, "repaired"),
        (Reason.AUDIT, False, True, False, "missed"),
        (Reason.RESUME, False, True, False, "flipped"),
        (Reason.AUDIT, True, True, False, "flipped"),
        (Reason.MARGIN, True, False, True, "triggered"),
        (Reason.NONE, True, False, False, "would trigger"),
        (Reason.AUDIT, False, False, False, "stable"),
    ],
)
def test_what_became_of_a_step(reason: Reason, triggered: bool, flipped: bool, repaired: bool, word: str) -> None:
    assert outcome(reason, triggered, flipped, repaired) == word
