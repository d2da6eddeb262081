"""Labels: a response claims what was observed, never more, and always says why."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.claims import Claims, label, logprobs
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.words import Guarantee, Reason

CANONICAL = Claims(prefill="grid", decode=True)
BATCHED = Claims(prefill="batched", decode=True)
PLAIN = Claims(prefill="grid")
NO_CLASS = Claims(prefill="grid", decode=False)


def a_ledger(policy: Policy = Policy.GATE, repair: Repair = Repair.WINDOW, **more: Any) -> RequestLedger:
    book = RequestLedger("r", RequestParams(policy, 0.5, "", False), repair, **more)
    book.note_prefill(None)
    book.start(10, [])
    return book


def count(book: RequestLedger, *reasons: Reason, structural: bool = False) -> RequestLedger:
    for reason in reasons:
        book.counters.add(reason, reason is Reason.MARGIN, False, structural=structural)
    return book


def decoded(steps: int, in_class: bool, reason: Reason = Reason.NONE, **more: Any) -> RequestLedger:
    """Return the record of a request whose decode steps all ran the same way."""
    book = count(a_ledger(**more), Reason.NONE)  # the prefill's token
    for k in range(steps):
        structural = book.read(10 + k, 5, in_class)
        count(book, reason, structural=structural)
        if reason is not Reason.NONE:
            book.repaired()
    return book


def test_structural_needs_every_step_inside_and_a_trial_that_held() -> None:
    assert label(decoded(4, True), CANONICAL, 5) == (
        Guarantee.STRUCTURAL, "the prefill and all of 4 decode steps ran inside the probed class",
    )  # fmt: skip
    assert label(decoded(4, True), PLAIN, 5)[0] is Guarantee.GATED
    assert label(decoded(4, False), CANONICAL, 5)[0] is Guarantee.GATED


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        (CANONICAL, Guarantee.STRUCTURAL),
        (BATCHED, Guarantee.STRUCTURAL),
        (Claims(prefill="batched"), Guarantee.STRUCTURAL),
        (PLAIN, Guarantee.GATED),
        (NO_CLASS, Guarantee.GATED),
    ],
)
@pytest.mark.parametrize("policy", [Policy.GATE, Policy.ALWAYS])
def test_a_one_token_answer_stands_on_its_prefill_alone_and_says_so(
    claims: Claims, expected: Guarantee, policy: Policy
) -> None:
    found, why = label(count(a_ledger(policy), Reason.NONE), claims, 1)
    assert found is expected
    assert "one token" in why


def test_verified_counts_verifies_that_were_put_in_place() -> None:
    always = decoded(4, False, Reason.ALWAYS, policy=Policy.ALWAYS)
    assert label(always, PLAIN, 5)[0] is Guarantee.VERIFIED
    audited = count(a_ledger(), Reason.NONE, Reason.AUDIT, Reason.AUDIT)
    assert label(audited, PLAIN, 3)[0] is Guarantee.GATED


def test_stale_columns_are_not_verified() -> None:
    """After a retraction, `column` repair leaves the re-prefilled columns as they are."""
    book = count(a_ledger(Policy.ALWAYS, Repair.COLUMN), Reason.NONE)
    book.start(10, [5, 6, 7])
    book.repaired()
    count(book, Reason.RESUME, Reason.ALWAYS, Reason.ALWAYS)
    found, why = label(book, PLAIN, 4)
    assert found is Guarantee.GATED
    assert "column" in why


def test_a_resumed_request_on_the_canonical_path_keeps_its_label() -> None:
    book = decoded(2, True)
    book.start(10, [5, 6])
    book.repaired()
    count(book, Reason.RESUME)
    found, why = label(book, CANONICAL, 4)
    assert found is Guarantee.STRUCTURAL
    assert "the verify of the rest" in why


@pytest.mark.parametrize(
    ("book", "shown", "says"),
    [
        (a_ledger(Policy.OFF), 3, "policy is off"),
        (a_ledger(Policy.LOG), 3, "policy is log"),
        (a_ledger(ungated="sampled at temperature 1"), 3, "sampled"),
        (a_ledger(), 0, "no token"),
        (a_ledger(), 3, "only 0 of 3 steps"),
        (RequestLedger("r", RequestParams(Policy.GATE, 0.5, "", False), Repair.WINDOW), 1, "no prefill"),
    ],
)
@pytest.mark.parametrize("claims", [CANONICAL, PLAIN])
def test_no_evidence_claims_nothing_and_says_why(book: RequestLedger, shown: int, says: str, claims: Claims) -> None:
    found, why = label(book, claims, shown)
    assert found is Guarantee.NONE
    assert says in why


def test_a_chunk_off_the_grid_an_abort_and_a_lowered_server_cost_the_label() -> None:
    book = decoded(2, True)
    assert label(book, CANONICAL, 3, aborted=True)[0] is Guarantee.NONE
    assert label(book, Claims(("weights changed",), "grid", True), 3) == (Guarantee.NONE, "weights changed")
    book.note_prefill("prompt chunk [0, 5) left the grid of 64")
    assert label(book, CANONICAL, 3) == (Guarantee.NONE, "prompt chunk [0, 5) left the grid of 64")


@pytest.mark.parametrize("policy", list(Policy))
def test_a_fault_that_is_injected_stands_in_every_summary(policy: Policy) -> None:
    knobs = Claims(("test knobs are set (flip_rate)",), "grid", True)
    found, why = label(count(a_ledger(policy), Reason.NONE), knobs, 1)
    assert found is Guarantee.NONE
    assert "flip_rate" in why


def test_an_audit_that_has_not_shown_its_bound_costs_unverified_steps_only() -> None:
    claims = Claims(prefill="grid", decode=True, gated_note="too little audited")
    assert label(decoded(2, False), claims, 3) == (Guarantee.NONE, "too little audited")
    assert label(decoded(2, True), claims, 3)[0] is Guarantee.STRUCTURAL
    assert label(decoded(2, False, Reason.ALWAYS), claims, 3)[0] is Guarantee.VERIFIED


SCORES = {"output_scores": True, "prompt_scores": True}


@pytest.mark.parametrize(
    ("claims", "expected"),
    [(CANONICAL, Guarantee.STRUCTURAL), (BATCHED, Guarantee.STRUCTURAL), (PLAIN, Guarantee.GATED)],
)
def test_a_request_that_asks_for_no_token_stands_on_its_prefill(claims: Claims, expected: Guarantee) -> None:
    found, why = label(a_ledger(), claims, 0, scoring=True)
    assert found is expected
    assert "no token was asked for" in why
    assert label(a_ledger(), claims, 0)[0] is Guarantee.NONE, "one that got none although it asked claims nothing"


def test_a_scoring_request_claims_nothing_that_was_not_seen() -> None:
    unseen = RequestLedger("r", RequestParams(Policy.GATE, 0.5, "", False), Repair.WINDOW)
    assert label(unseen, CANONICAL, 0, scoring=True)[0] is Guarantee.NONE
    outside = a_ledger()
    outside.note_prefill("left the class")
    assert label(outside, CANONICAL, 0, scoring=True) == (Guarantee.NONE, "left the class")
    assert label(a_ledger(policy=Policy.LOG), CANONICAL, 0, scoring=True)[0] is Guarantee.NONE
    assert label(a_ledger(), CANONICAL, 0, aborted=True, scoring=True)[0] is Guarantee.NONE
    over = Claims(prefill="grid", gated_note="the audit is over its limit")
    assert label(a_ledger(), over, 0, scoring=True) == (Guarantee.NONE, "the audit is over its limit")


def scored(book: RequestLedger, steps: int) -> RequestLedger:
    book.counters.scored = steps
    return book


@pytest.mark.parametrize(
    ("guarantee", "steps", "asked", "claims", "expected"),
    [
        (Guarantee.STRUCTURAL, 5, "prompt", SCORES, "exact"),
        (Guarantee.VERIFIED, 5, "output", SCORES, "exact"),
        (Guarantee.GATED, 5, "output", SCORES, "batch"),
        (Guarantee.NONE, 5, "output", SCORES, "batch"),
        (Guarantee.STRUCTURAL, 4, "output", SCORES, "batch"),
        (Guarantee.STRUCTURAL, 5, "output", {"output_scores": True}, "exact"),
        (Guarantee.STRUCTURAL, 5, "prompt", {"output_scores": True}, "batch"),
        (Guarantee.STRUCTURAL, 5, "prompt", {"prompt_scores": True}, "batch"),
        (Guarantee.STRUCTURAL, 5, None, SCORES, None),
    ],
    ids=["structural", "verified", "gated", "none", "a step unseen", "output tried", "prompt not tried", "rows not tried",
         "not asked"],
)  # fmt: skip
def test_log_probabilities_are_exact_where_every_one_was_seen_to_be(
    guarantee: Guarantee, steps: int, asked: Any, claims: dict[str, Any], expected: str | None
) -> None:
    book = scored(a_ledger(), steps)
    assert logprobs(book, Claims(prefill="grid", decode=True, **claims), guarantee, 5, asked) == expected


def test_log_probabilities_of_a_scoring_request_stand_on_its_prefill() -> None:
    claims = Claims(prefill="grid", **SCORES)
    assert logprobs(scored(a_ledger(), 1), claims, Guarantee.GATED, 0, "prompt", scoring=True) == "exact"
    assert logprobs(scored(a_ledger(), 0), claims, Guarantee.GATED, 0, "prompt", scoring=True) == "batch"
    assert logprobs(scored(a_ledger(), 1), claims, Guarantee.NONE, 0, "prompt", scoring=True) == "batch"


def test_every_sentence_reads_as_it_should() -> None:
    one = count(a_ledger(), Reason.NONE)
    said = {label(one, claims, 1)[1] for claims in (CANONICAL, BATCHED)}
    assert said == {"one token: it stands on its prefill alone, which ran inside the probed class"}
    alone = "one token: its prefill ran alone on the canonical grid, and there was no step to verify"
    assert label(one, PLAIN, 1) == (Guarantee.GATED, alone)
    assert (
        label(decoded(1, True), CANONICAL, 2)[1] == "the prefill and all of 1 decode step ran inside the probed class"
    )
    assert (
        label(decoded(2, False, Reason.ALWAYS), PLAIN, 3)[1]
        == "all of 2 decode steps were verified, on canonical columns"
    )
    plain = "of 3 decode steps 0 were verified, the others had a margin above the threshold"
    assert label(decoded(3, False), PLAIN, 4) == (Guarantee.GATED, plain)
    mixed = decoded(2, True)
    count(mixed, Reason.NONE, structural=mixed.read(12, 5, False))
    assert label(mixed, CANONICAL, 4)[1] == (
        "of 3 decode steps 0 were verified, 2 ran inside the probed class, the others had a margin above the threshold"
    )
    stale = count(a_ledger(repair=Repair.COLUMN), Reason.NONE)
    for position in (10, 11):
        stale.read(position, 5)
    stale.repaired()
    count(stale, Reason.NONE, Reason.MARGIN)
    assert label(stale, PLAIN, 3)[1] == (
        "of 2 decode steps 1 were verified, the others had a margin above the threshold; "
        "repair `column` left earlier columns batch-shaped"
    )


def test_a_class_whose_decode_was_not_tried_answers_for_no_step() -> None:
    assert label(decoded(4, True), Claims(prefill="batched"), 5)[0] is Guarantee.GATED


@pytest.mark.parametrize(
    ("book", "why"),
    [
        (a_ledger(Policy.OFF), "its policy is off: stock decoding, nothing was observed"),
        (a_ledger(Policy.LOG), "its policy is log: margins are recorded, nothing is verified"),
        (a_ledger(ungated="it was given up"), "it was given up"),
    ],
)
def test_the_requests_own_reason_comes_before_the_servers(book: RequestLedger, why: str) -> None:
    assert label(book, Claims(("one", "two", "one")), 1) == (Guarantee.NONE, f"{why}; one; two")


def test_what_was_not_seen_is_said_in_full() -> None:
    assert label(decoded(2, True), CANONICAL, 3, aborted=True)[1] == "the answer was cut off (aborted)"
    assert label(a_ledger(), CANONICAL, 0)[1] == "no token was chosen, so there is no step to claim anything for"
    unseen = RequestLedger("r", RequestParams(Policy.GATE, 0.5, "", False), Repair.WINDOW)
    assert label(unseen, CANONICAL, 1)[1] == "no prefill forward of this request was seen to end"


def test_a_scoring_request_stands_on_its_prefill() -> None:
    inside = "no token was asked for: it stands on its prefill alone, which ran inside the probed class"
    assert label(a_ledger(), CANONICAL, 0, scoring=True) == (Guarantee.STRUCTURAL, inside)
    alone = "no token was asked for: its prefill ran alone on the canonical grid"
    assert label(a_ledger(), PLAIN, 0, scoring=True) == (Guarantee.GATED, alone)
    assert label(a_ledger(), Claims(prefill="grid", gated_note="too little"), 0, scoring=True)[1] == "too little"
