"""The trials before the first request: whatever makes a row's bits depend on its batch is found, and claims fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fake_engine import FakeEngine

from sglang_margingate.canonical.classes import Classes, DecodeGraphs, FastPath, Trial
from sglang_margingate.canonical.engine import Extend
from sglang_margingate.canonical.grid_probe import grid_holds
from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses, RowSizes
from sglang_margingate.canonical.path_probe import try_fast_path
from sglang_margingate.canonical.selftest import run_self_test
from sglang_margingate.serving.setup import prefill_notes

CHUNK = 16
SIZES = RowSizes(tuple(range(1, 2049)))
CLASSES = Classes(InvarianceMap([]), SIZES, SIZES, RowSizes(tuple(range(1, 513))), 8)


def tokens_of(parts: Sequence[Extend]) -> int:
    return sum(p.end - p.start for p in parts)


def asked(parts: Sequence[Extend]) -> float:
    return 1.0 if any(p.logprobs for p in parts) else 0.0


def test_a_server_whose_bits_depend_on_nothing_is_batched_and_in_class() -> None:
    engine = FakeEngine()
    before = engine.table.clone()
    found = try_fast_path(CLASSES, engine, CHUNK)
    assert (found.decode_ok, found.prefill, found.notes) == (True, "batched", ())
    assert engine.table.equal(before), "the table is given back"
    assert max(map(tokens_of, engine.forwards)) <= max(SIZES.sizes)


@pytest.mark.parametrize("most_running", [1, 2, 3, 7, 16, 17, 32])
def test_no_more_requests_are_tried_than_may_run(most_running: int) -> None:
    tried: list[int] = []
    engine = FakeEngine(decode_leak=lambda rows: tried.append(rows) or 0.0, requests=most_running + 1)
    found = try_fast_path(CLASSES, engine, CHUNK)
    assert found.decode_ok
    assert max(tried) <= most_running
    assert found.prefill == ("batched" if most_running > 3 else "grid"), "what could not be tried is not claimed"


@pytest.mark.parametrize(
    ("leak", "says"),
    [
        (lambda parts: float(len(parts) == 3), "companions"),
        (lambda parts: float(tokens_of(parts) == 1), "a rest of one token"),
        (
            lambda parts: float(any(p.start for p in parts)),
            "chunks, a rest of one token, a cached prefix among companions",
        ),
        (asked, "companions that ask for the log-probabilities of their prompts"),
    ],
)
def test_a_prefill_that_depends_on_its_shape_keeps_to_the_grid(leak: Any, says: str) -> None:
    found = try_fast_path(CLASSES, FakeEngine(extend_leak=leak), CHUNK)
    assert (found.decode_ok, found.prefill) == (True, "grid")
    (note,) = found.notes
    assert note.startswith(f"prefill depends on {says};")


def test_the_neighbours_that_ask_for_log_probabilities_bring_more_rows_than_one_block_of_the_head() -> None:
    engine = FakeEngine()
    try_fast_path(CLASSES, engine, CHUNK)
    most = max(sum(p.end - p.start for p in parts if p.logprobs) for parts in engine.forwards)
    assert most > max(CLASSES.head.sizes)


def test_a_decode_that_depends_on_its_batch_is_gated() -> None:
    found = try_fast_path(CLASSES, FakeEngine(decode_leak=lambda rows: float(rows == 17)), CHUNK)
    assert (found.decode_ok, found.prefill) == (False, "batched")
    assert found.notes == ("decode differs from the verify at 17 requests: steps are gated by their margin",)


APART = DecodeGraphs((1, 2, 4, 17, 32, 64), {1: 17, 2: 17, 4: 17, 17: 17, 32: 32})


def test_layers_that_do_not_hold_padded_by_themselves_are_padded_with_the_others() -> None:
    """The sizes that were captured so are left out, and what was tried before them stands."""
    engine = FakeEngine(decode_leak=lambda rows: float(rows == 3 and engine.kept_graphs is None))
    found = try_fast_path(CLASSES, engine, CHUNK, APART)
    assert engine.kept_graphs == (17, 32, 64)
    assert found.graphs == DecodeGraphs((17, 32, 64), {17: 17, 32: 32})
    assert found.decode_ok
    assert found.notes == (
        "decode with layers padded by themselves differs from the verify at 3 requests: it is padded as a whole",
    )


@pytest.mark.parametrize("graphs", [APART, DecodeGraphs((1, 4), {1: 17, 4: 17}), DecodeGraphs((17, 64), {17: 17})])
def test_what_does_not_hold_as_a_whole_either_is_gated(graphs: DecodeGraphs) -> None:
    engine = FakeEngine(decode_leak=lambda rows: float(rows == 1))
    found = try_fast_path(CLASSES, engine, CHUNK, graphs)
    assert not found.decode_ok
    assert found.notes[-1] == "decode differs from the verify at 1 requests: steps are gated by their margin"
    assert engine.kept_graphs == ((17, 32, 64) if graphs == APART else None), (
        "a server without graphs inside wins nothing"
    )


@pytest.mark.parametrize("leak", ["slot_leak", "around_leak"])
def test_a_prefill_that_is_not_even_repeatable_alone_costs_every_guarantee(leak: str) -> None:
    engine = FakeEngine(**{leak: True})
    broken = grid_holds(engine, CHUNK)
    assert broken == "the slots it has, or the columns around them"
    found = try_fast_path(CLASSES, FakeEngine(**{leak: True}), CHUNK)
    assert found.prefill is None
    sentence = (
        f"a prompt that is prefilled alone in chunks of {CHUNK} depends on {broken}, so no column of it is canonical"
    )
    assert found.notes[-1] == sentence
    assert prefill_notes(engine, CHUNK, FastPath(CLASSES, found)) == (sentence,), "with the canonical fast path"
    assert prefill_notes(engine, CHUNK, None) == (sentence,), "and without"


def test_a_prefill_that_is_repeatable_costs_nothing() -> None:
    engine = FakeEngine(extend_leak=lambda parts: float(parts[0].start > 0))
    before = engine.table.clone()
    assert prefill_notes(engine, CHUNK, None) == ()
    assert engine.table.equal(before)
    assert [p.start for (p,) in engine.forwards[:3]] == [0, CHUNK, 2 * CHUNK], "two whole chunks and a rest, alone"
    assert prefill_notes(engine, CHUNK, FastPath(CLASSES, Trial(prefill="grid", notes=("decode differs",)))) == ()


def test_a_pool_too_small_to_try_the_grid_claims_nothing() -> None:
    assert grid_holds(FakeEngine(capacity=20), CHUNK) == "what could not be tried: the K/V pool leaves only 10 tokens"


@pytest.mark.parametrize("missing", ["decode", "prefill", "head"])
def test_a_server_without_a_class_claims_none(missing: str) -> None:
    one = LayerClasses("x", (4, 4), 1, {1: 0, 2: 1, 3: None})
    head = LayerClasses("h", (4, 4), 1, {1: 0, 2: 0, 3: 0}, head=True)
    nothing = Classes.of(InvarianceMap([LayerClasses("x", (4, 4), 1, {1: None}), head]), 8, 8, [])
    assert not nothing.decode.sizes
    assert not nothing.prefill.sizes
    assert Classes.of(InvarianceMap([one]), 2, 2, []).head == RowSizes(), "a model whose head nobody could probe"
    classes = {"decode": CLASSES.decode, "prefill": CLASSES.prefill, "head": CLASSES.head, missing: RowSizes()}
    found = try_fast_path(Classes(InvarianceMap([]), **classes, verify_rows=8), FakeEngine(), CHUNK)
    assert found.decode_ok is (missing != "decode")
    assert (found.prefill == "batched") is (missing == "decode")
    both = try_fast_path(nothing, FakeEngine(), CHUNK)
    assert (both.decode_ok, both.prefill) == (False, "grid")


def test_a_layer_that_the_probe_does_not_know_leaves_everything_to_the_gate() -> None:
    odd = Classes(InvarianceMap([]), SIZES, SIZES, SIZES, 8, ("1 (Conv1d)", "2 (Conv1d)"))
    found = try_fast_path(odd, FakeEngine(), CHUNK)
    assert (found.decode_ok, found.prefill) == (False, "grid")
    assert found.notes == ("the probe does not know 1 (Conv1d) and 1 more: everything is gated by its margin",)


def test_the_self_test_gives_pool_and_table_back() -> None:
    engine = FakeEngine()
    pool, table = engine.pool.clone(), engine.table.clone()
    assert run_self_test(engine).passed
    assert engine.pool.equal(pool)
    assert engine.table.equal(table)


def test_the_self_test_names_a_verify_that_depends_on_its_companions() -> None:
    engine = FakeEngine()
    healthy = engine.verify
    engine.verify = lambda requests, positions, tokens: healthy(requests, positions, tokens) + sum(tokens)  # type: ignore
    found = run_self_test(engine)
    assert not found.passed
    assert found.broken_layer == "a part of the model without layers of its own (attention kernel or logits)"


def test_log_probabilities_of_prompts_are_tried_among_companions_and_behind_a_prefix() -> None:
    assert try_fast_path(CLASSES, FakeEngine(), CHUNK).prompt_scores
    crowded = FakeEngine(score_leak=lambda parts: 1e-6 * (len(parts) > 1))
    found = try_fast_path(CLASSES, crowded, CHUNK)
    assert (found.prefill, found.prompt_scores) == ("batched", False)
    assert found.notes == ("log-probabilities of a prompt depend on companions, a cached prefix",)
    alone = try_fast_path(CLASSES, FakeEngine(extend_leak=lambda parts: float(len(parts) > 1)), CHUNK)
    assert (alone.prefill, alone.prompt_scores) == ("grid", True), "alone a prompt meets the same shapes each time"


def test_chunks_are_cut_off_the_border_of_a_kernels_blocks() -> None:
    """A kernel that computes blocks of 16 tokens hides what a cut between two of them does not change."""
    engine = FakeEngine(extend_leak=lambda parts: float(any(p.start % 16 for p in parts)))
    found = try_fast_path(CLASSES, engine, CHUNK)
    assert (found.prefill, found.notes[0].split(";")[0]) == (
        "grid", "prefill depends on chunks, a rest of one token, a cached prefix among companions",
    )  # fmt: skip
