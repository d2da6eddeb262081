"""The truth sweep's own parts: its plan, its comparison, and what it holds against a summary and a trace."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pandas as pd
import pytest

from sglang_margingate.bench.evidence.truth_checks import Problems, check_answers, compare, row_problems
from sglang_margingate.bench.evidence.truth_client import Answer, Reply, alone, key, openai_replies
from sglang_margingate.bench.evidence.truth_plan import CHAT, FAST_KEY, Case, EmbeddedWords, Planner, RandomWords
from sglang_margingate.bench.evidence.truth_sweep import Result, main, plan_for

GOOD = {"guarantee": "structural", "guarantee_note": "every forward ran in the class", "steps": 3, "triggers": 0,
        "verified": 0, "flips": 0, "structural": 2, "request": 7}  # fmt: skip


def case(**body: Any) -> Case:
    sampling = {"temperature": 0, "max_new_tokens": 3, **body.pop("sampling", {})}
    return Case("0001", "plain", {"input_ids": [5, 6], "sampling_params": sampling, **body})


def answer(
    tokens: tuple[int, ...] = (1, 2, 3), finish: str = "length", of: Case | None = None, **summary: Any
) -> Answer:
    c = of or case()
    return Answer(c, c.body, 200, [Reply(tokens, "", finish, {**GOOD, **summary})])


def problems_of(*answers: Answer) -> list[str]:
    found = Problems()
    check_answers(answers, found)
    return list(found.by_text)


def result(findings: list[Any], policy: str = "gate", **more: Any) -> Result:
    facts: dict[str, Any] = {"largest": 9, "largest_alone": 1, "retracted": 0, "cached": 0, "seconds": 1.0, **more}
    return Result("mixed", policy, [], findings, Problems(), **facts)


# ---- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_depends_on_its_seed_alone() -> None:
    first, again, other = (plan_for("mixed", "gate", 200, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_a_plan_has_every_kind_and_no_name_twice() -> None:
    cases = [c for chain in plan_for("mixed", "gate", 500, 0) for c in chain.cases]
    kinds = Counter(c.kind for c in cases)
    assert len(cases) in (500, 501)
    assert len({c.id for c in cases}) == len(cases)
    assert {"plain", "parallel", "scoring", "prefill-only 1", "prefill-only 2", "one-token", "session 2", "abort",
            "session ungated 2", "disconnect", "reused-id", "client-key 2", "sampled", "policy", "processed", "stream",
            "openai"} == set(kinds) - {"session 1", "session ungated 1", "client-key 1"}  # fmt: skip
    assert {c.asked_policy for c in cases} == {None, "off", "log", "gate", "always"}
    assert any(c.key == FAST_KEY for c in cases)
    assert any(c.sampling.get("max_new_tokens") == 0 for c in cases)
    assert max(len(c.body.get("input_ids", ())) for c in cases) > 1000, "no long prompt to score"


def test_a_server_without_a_gate_is_not_asked_for_one() -> None:
    cases = [c for chain in plan_for("mixed", "log", 300, 0) for c in chain.cases]
    assert not {c.asked_policy for c in cases} & {"gate", "always"}


def test_random_ids_need_no_tokenizer_and_leave_out_what_needs_text() -> None:
    chains = Planner(RandomWords(1000)).plan(200)
    assert "openai" not in {c.kind for chain in chains for c in chain.cases}
    assert all(0 <= token < 1000 for chain in chains for c in chain.cases for token in c.body["input_ids"])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="'regexp' is no kind of request; kinds are plain, "):
        Planner(RandomWords(9), without=("regexp",))


def test_prompts_share_beginnings() -> None:
    planner = Planner(EmbeddedWords())
    heads = Counter(tuple(planner.plain().cases[0].body["input_ids"][:20]) for _ in range(60))
    assert max(heads.values()) > 10


# ---- the run alone ------------------------------------------------------------------------------------------------------


def test_the_run_alone_is_one_whole_answer_without_an_id() -> None:
    body = case(rid="a", stream=True, extra_key="k", sampling={"n": 3}).body
    again = alone(body, "/generate")
    assert again == {"input_ids": [5, 6], "extra_key": "k", "sampling_params": {"temperature": 0, "max_new_tokens": 3}}
    assert body["sampling_params"]["n"] == 3, "the plan is not changed"
    assert alone({"prompt": "x", "n": 2, "temperature": 0}, "/v1/completions") == {"prompt": "x", "temperature": 0}


def test_openai_answers_carry_the_summary_of_each_choice() -> None:
    choice = {"message": {"content": "yes"}, "finish_reason": "stop"}
    assert openai_replies({"choices": [choice]})[0].summary is None
    assert openai_replies({"choices": [choice], "margingate": GOOD})[0].summary == GOOD
    two = openai_replies({"choices": [choice] * 2, "margingate": [GOOD, {**GOOD, "request": 8}]})
    assert [(r.summary or {})["request"] for r in two] == [7, 8]


# ---- comparison and verdict -------------------------------------------------------------------------------------------


def compared(got: Answer, *want: int, finish: str = "length") -> Any:
    return compare([got], {key(got): Reply(want, "", finish, None)})[0]


def test_a_lie_is_found_and_fails_the_sweep() -> None:
    lie = compared(answer(), 1, 9, 3)
    assert (lie.same, lie.at, lie.label) == (False, 1, "structural")
    assert result([lie]).verdict() == ["1 answers labelled structural or verified differ from their runs alone"]
    assert "structural: first differs at 1; 5 tokens" in lie.describe()


def test_another_finish_reason_is_a_difference() -> None:
    found = compared(answer(finish="stop"), 1, 2, 3)
    assert (found.same, found.at, found.finish) == (False, None, ("stop", "length"))


def test_an_aborted_answer_is_the_beginning_of_its_run_alone() -> None:
    assert compared(answer((1, 2), "abort"), 1, 2, 3).same
    assert not compared(answer((1, 4), "abort"), 1, 2, 3).same
    assert not compared(answer((1, 2)), 1, 2, 3).same


def test_a_gated_difference_is_listed_and_fails_nothing() -> None:
    found = result([compared(answer(guarantee="gated"), 1, 9, 3)])
    assert found.verdict() == []
    assert len(found.differing(("gated",))) == 1
    assert found.table()[-1] == "| all | 0/1 |"


def test_a_broken_server_may_claim_nothing() -> None:
    same = [compared(answer(guarantee=g), 1, 2, 3) for g in ("structural", "gated", "none")]
    assert result(same).verdict() == []
    assert "1 structural, 1 gated" in result(same).verdict(broken=True)[0]
    assert result(same[2:]).verdict(broken=True) == []


def test_without_a_gate_something_must_differ() -> None:
    same, other = (compared(answer(guarantee="none"), *want) for want in ((1, 2, 3), (1, 2, 4)))
    assert result([same], "log").verdict() == ["without a gate nothing differs: this sweep could not find a lie"]
    assert result([same, other], "log").verdict() == []


def test_no_batch_and_company_in_the_runs_alone_are_failures() -> None:
    assert result([], largest=1).verdict() == ["no batch formed"]
    assert result([], largest_alone=2).verdict() == ["the runs alone were not alone: 2 rows"]


# ---- summaries ----------------------------------------------------------------------------------------------------------


def test_a_summary_that_fits_is_left_alone() -> None:
    assert problems_of(answer()) == []
    assert problems_of(answer(guarantee="verified", structural=0, verified=2)) == []


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"guarantee_note": None}, "structural has no note"),
        ({"guarantee": "none", "guarantee_note": ""}, "none has no note"),
        ({"guarantee": "sure"}, "the label 'sure' is unknown"),
        ({"steps": 4, "structural": 3}, "steps is not the number of tokens shown"),
        ({"structural": 1}, "structural, but not every decode step is, or was recomputed in the class"),
        ({"structural": 3}, "more structural steps than decode steps"),
        ({"guarantee": "verified", "structural": 0, "verified": 1}, "verified, but not every decode step is"),
        ({"flips": 1}, "not flips <= verified <= steps"),
        ({"request": None}, "the summary has no number request"),
    ],
)
def test_a_summary_that_does_not_fit_is_named(summary: dict[str, Any], said: str) -> None:
    assert said in problems_of(answer(**summary))


def test_one_token_stands_on_its_prefill_and_says_so() -> None:
    one: dict[str, Any] = {"steps": 1, "structural": 0}
    said = "structural of one token, and the note does not say that it stands on its prefill alone"
    assert problems_of(answer((1,), **one)) == [said]
    assert problems_of(answer((1,), **one, guarantee_note="stands on its prefill alone, which ran in the class")) == []


def test_labels_above_none_are_not_for_sampled_ungated_or_aborted_answers() -> None:
    off = case(sampling={"custom_params": {"margingate_policy": "off"}})
    assert problems_of(answer(of=off)) == ["a request with policy off says structural"]
    assert problems_of(answer(of=case(sampling={"temperature": 0.0001}))) == ["a sampled request says structural"]
    assert problems_of(answer(of=case(sampling={"temperature": 0.8, "sampling_seed": 7}))) == []
    assert problems_of(answer(finish="abort")) == ["an aborted answer says structural"]


def test_missing_summaries_errors_and_numbers_twice_are_named() -> None:
    c = case()
    assert problems_of(Answer(c, c.body, 200, [Reply((1,), "", "stop", None)])) == ["the answer has no summary"]
    chat = Case("1", "openai", {"temperature": 0}, CHAT)
    assert problems_of(Answer(chat, {}, 200, [Reply((), "a", "stop", None)])) == [
        "the answer has no summary (OpenAI API)"
    ]
    assert problems_of(Answer(c, c.body, 500, [], "broken")) == ["HTTP 500: broken"]
    assert problems_of(Answer(c, c.body, 400, [], "refused")) == ["HTTP 400: refused"]
    odd = Case("2", "client-key 2", c.body, may_refuse=True)
    assert problems_of(Answer(odd, c.body, 400, [], "refused"), Answer(c, c.body)) == []
    assert problems_of(answer(), answer()) == ["a number of a request is not unique"]


# ---- traces -------------------------------------------------------------------------------------------------------------


def trace(**change: Any) -> tuple[pd.Series, pd.DataFrame]:
    row = {"output_tokens": 3, "triggers": 0, "verified": 0, "flips": 0, "structural": 2, "guarantee": "structural",
           "guarantee_note": GOOD["guarantee_note"], "ttft_ms": 1.0, "e2e_ms": 3.0}  # fmt: skip
    steps = {"step": [0, 1, 2], "time": [1, 2, 3], "structural": [False, True, True], "triggered": [False] * 3,
             "batch_rows": [4, 4, 4], "padded_rows": [None, 16, 16]}  # fmt: skip
    for name, value in change.items():
        (row if name in row else steps)[name] = value
    return pd.Series(row), pd.DataFrame(steps)


def test_a_trace_that_fits_is_left_alone() -> None:
    assert row_problems(GOOD, *trace()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"guarantee": "gated"}, "trace: guarantee of the request's row is not the summary's"),
        ({"structural": 1}, "trace: structural of the request's row is not the summary's"),
        ({"triggered": [True, False, False]}, "trace: triggered step rows are not the summary's triggers"),
        ({"padded_rows": [3, 16, 16]}, "trace: padded_rows is less than batch_rows"),
        ({"time": [1, 3, 2]}, "trace: time goes back"),
        ({"step": [1, 2, 3]}, "trace: steps are not numbered from 0"),
        ({"ttft_ms": 4.0}, "trace: ttft_ms is more than e2e_ms"),
    ],
)
def test_a_trace_that_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    assert row_problems(GOOD, *trace(**change)) == [said]


# ---- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "mixed,warm"], "--parts: 'warm' is unknown; use mixed, pool, retract"),
        (["--knob", "POISON"], "--knob: 'POISON' is not NAME=VALUE"),
        (["--base-url", "http://x", "--parts", "mixed", "--knob", "A=1"], "--base-url names a running server"),
    ],
)
def test_wrong_options_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
