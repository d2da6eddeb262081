"""Log-probabilities: bits that depend on their row alone, in one order, where SGLang looks for them."""

from __future__ import annotations

import math
from types import SimpleNamespace as Some
from typing import Any

import pytest
import torch

from sglang_margingate.canonical.score_probe import ROWS, rows_hold
from sglang_margingate.runtime.logprobs import BLOCK_ROWS, best, keep_asking, keep_scored, row_logprobs
from sglang_margingate.runtime.prefill import Chunk
from sglang_margingate.runtime.state import StepRow
from sglang_margingate.serving.answers import scores
from sglang_margingate.words import Reason

VOCABULARY = 1003
"""No multiple of a vector: a row's first byte is aligned otherwise in each place."""


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, VOCABULARY, generator=generator)).bfloat16().float()


def test_a_row_has_the_same_bits_at_any_number_of_rows_and_place() -> None:
    assert rows_hold(row_logprobs, VOCABULARY, "cpu") is None


def test_a_leak_between_rows_is_found() -> None:
    def leaky(logits: torch.Tensor) -> torch.Tensor:
        return row_logprobs(logits) + (1e-6 if len(logits) > 8 else 0.0)

    assert rows_hold(leaky, VOCABULARY, "cpu") == "17 rows, at place 0"
    placed = lambda logits: row_logprobs(logits) + torch.arange(len(logits))[:, None] * 1e-6  # noqa: E731
    assert rows_hold(placed, VOCABULARY, "cpu") == "2 rows, at place 1"
    assert max(ROWS) > 64


def test_log_probabilities_are_those_of_the_distribution() -> None:
    logits = logits_of(5)
    hot = torch.tensor([[1.0], [0.5], [2.0], [1.0], [0.1]])
    wanted = torch.log_softmax(logits.double() / hot.double(), dim=-1)
    assert torch.allclose(row_logprobs(logits, hot).double(), wanted, atol=1e-5)
    assert torch.equal(row_logprobs(logits)[0], row_logprobs(logits, hot)[0])


def test_what_a_grammar_forbids_is_the_smallest_number_and_no_infinity() -> None:
    logits = logits_of(1)
    logits[0, 7] = float("-inf")
    found = row_logprobs(logits)
    assert found[0, 7] == torch.finfo(torch.float32).min
    assert math.isfinite(float(found.sum().clamp(min=-1e30)))


@pytest.mark.parametrize("rows", [1, 3, BLOCK_ROWS + 2])
def test_the_best_stand_in_one_order_whatever_k_is(rows: int) -> None:
    values = torch.randint(-3, 2, (rows, VOCABULARY), generator=torch.Generator().manual_seed(1)).float() / 4
    values[0, 5], values[0, 9] = 0.0, -0.0
    wanted = [
        sorted(range(VOCABULARY), key=lambda c, row=row: (-math.copysign(1, row[c]) * abs(row[c]), row[c] == 0 and math.copysign(1, row[c]) < 0, c))
        for row in values.tolist()
    ]  # fmt: skip
    for k in (1, 2, 20, VOCABULARY):
        found, index = best(values, k)
        assert index.tolist() == [row[:k] for row in wanted]
        assert torch.equal(found, values.gather(1, index))


def test_the_best_of_a_row_do_not_depend_on_the_neighbours_k() -> None:
    ties = torch.zeros(4, VOCABULARY)
    of_few, of_many = scores.Ordered(ties[:1]).topk(3, dim=1), scores.Ordered(ties).topk(30, dim=1)
    assert of_few.indices[0].tolist() == of_many.indices[0, :3].tolist() == [0, 1, 2]


def a_request(temperature: float = 1.0, max_new_tokens: int = 8, asks: bool = True) -> Any:
    params = Some(temperature=temperature, max_new_tokens=max_new_tokens)
    return Some(sampling_params=params, return_logprob=asks)


def test_kept_rows_take_the_place_of_sglangs() -> None:
    logits = logits_of(3)
    reqs = [a_request(), a_request(asks=False), a_request(temperature=0.5)]
    batch = Some(top_logprobs_nums=[0, 0, 2], token_ids_logprobs=[[4, 6], None, None])
    output = Some(
        next_token_logprobs=torch.full((3,), -9.0),
        next_token_top_logprobs_val=[torch.empty(0), torch.empty(0), torch.zeros(2)],
        next_token_top_logprobs_idx=[torch.empty(0), torch.empty(0), torch.zeros(2)],
        next_token_token_ids_logprobs_val=[torch.zeros(2), torch.empty(0), torch.empty(0)],
    )
    kept = scores.Scores(output, batch, reqs)
    kept.keep([0, 2], logits)
    wanted = row_logprobs(logits[[0, 2]], torch.tensor([[1.0], [0.5]]))
    logits.zero_()  # as SGLang's sampler writes over them
    kept.put(torch.tensor([3, 3, 5]))
    assert output.next_token_logprobs.tolist() == [wanted[0, 3], -9.0, wanted[1, 5]]
    values, index = best(wanted[1:], 2)
    assert torch.equal(output.next_token_top_logprobs_val[2], values[0])
    assert torch.equal(output.next_token_top_logprobs_idx[2], index[0])
    assert torch.equal(output.next_token_token_ids_logprobs_val[0], wanted[0, [4, 6]])
    assert output.next_token_top_logprobs_val[0].numel() == 0


def test_a_forward_of_which_no_token_is_chosen_has_no_tokens_log_probability() -> None:
    batch = Some(top_logprobs_nums=[1], token_ids_logprobs=[None])
    output = Some(next_token_logprobs=None, next_token_top_logprobs_val=[None], next_token_top_logprobs_idx=[None])
    kept = scores.Scores(output, batch, [a_request(temperature=0.3, max_new_tokens=0)])
    logits = logits_of(1)
    kept.keep([0], logits)
    kept.put(None)
    assert output.next_token_logprobs is None
    assert output.next_token_top_logprobs_val[0].tolist() == [float(row_logprobs(logits).max())], "no temperature"


@pytest.mark.parametrize(("switch", "wanted"), [("1", 1.0), ("true", 1.0), ("0", 0.7), ("", 0.7)])
def test_sglangs_switch_for_original_log_probabilities_is_heeded(
    switch: str, wanted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(scores.ORIGINAL, switch)
    assert scores.temperature(a_request(temperature=0.7)) == wanted


def test_requests_that_name_no_tokens_get_an_empty_tensor() -> None:
    """SGLang 0.5.17 asks the list that it leaves there for ``tolist``, and the server ends."""
    output = Some(next_token_token_ids_logprobs_val=[torch.ones(2), [], torch.ones(1)])
    scores.fill_gaps(output)
    assert [v.tolist() for v in output.next_token_token_ids_logprobs_val] == [[1, 1], [], [1]]
    untouched = Some(next_token_token_ids_logprobs_val=None)
    scores.fill_gaps(untouched)
    assert untouched.next_token_token_ids_logprobs_val is None


class Kept:
    """A scorer that notes what it is asked for."""

    def __init__(self, asks: list[bool]) -> None:
        self.asks, self.rows = asks, None

    def keep(self, rows: list[int]) -> None:
        self.rows: Any = rows

    def score(self, tokens: torch.Tensor | None) -> None: ...


def a_state(gated: bool = True, most_tokens: int = 9) -> Any:
    return Some(ledger=Some(gated=gated, counters=Some(scored=0)), most_tokens=most_tokens, draw=None)


def a_row(index: int, state: Any, **more: Any) -> StepRow:
    return StepRow(index, index, state, 0, 0, **more)


@pytest.mark.parametrize(
    ("more", "decode", "scored"),
    [
        ({"structural": True}, True, True),
        ({"reason": Reason.MARGIN}, True, True),
        ({"reason": Reason.AUDIT}, True, False),
        ({}, True, False),
        ({}, False, True),
    ],
    ids=["in class", "repaired", "audited outside", "above the threshold", "a prefill"],
)
def test_a_row_counts_as_scored_where_its_logits_depend_on_it_alone(
    more: dict[str, Any], decode: bool, scored: bool
) -> None:
    row, kept = a_row(1, a_state(), **more), Kept([False, True])
    keep_asking([row], kept, decode)
    assert kept.rows == [1]
    assert row.scored is scored


def test_rows_that_do_not_ask_or_are_not_gated_are_left_alone() -> None:
    rows = [a_row(0, a_state()), a_row(1, a_state(gated=False)), a_row(2, a_state())]
    kept = Kept([False, True, True])
    keep_asking(rows, kept, True)
    assert kept.rows == [2]
    for none in (Kept([]), Kept([False, True, False])):
        keep_asking(rows, none, True)
        assert none.rows is None


def test_scoring_requests_count_their_last_chunk() -> None:
    scoring, middle, other = a_state(most_tokens=0), a_state(most_tokens=0), a_state(gated=False, most_tokens=0)
    chunks = [Chunk(0, 10, 10), Chunk(0, 8, 10), Chunk(0, 10, 10)]
    kept = Kept([True, True, True])
    keep_scored([scoring, middle, other], chunks, kept)
    assert kept.rows == [0]
    assert [s.ledger.counters.scored for s in (scoring, middle, other)] == [1, 0, 0]
    beside = a_state(most_tokens=0)
    keep_asking([a_row(0, beside)], Kept([True]), False)  # in a forward from which a neighbour's token is chosen
    assert beside.ledger.counters.scored == 1


@pytest.mark.parametrize(("gated", "scoring", "shown"), [(True, True, None), (True, False, 1.5), (False, True, 1.5)])
def test_a_scoring_request_shows_no_token_that_nobody_asked_for(
    gated: bool, scoring: bool, shown: float | None
) -> None:
    req = Some(is_prefill_only=scoring, margingate_state=a_state(gated=gated, most_tokens=0))
    output = Some(next_token_logprobs=1.5, input_token_logprobs=(1.0,))

    def original(processor: Any, i: int, req: Any, pt: int, ids: list[int], n: int, output: Any) -> Any:
        assert output.input_token_logprobs == (1.0,)
        return output.next_token_logprobs

    assert scores.add_return_values(original, None, 0, req, 0, [], 1, output) == shown
