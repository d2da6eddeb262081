"""The invariance map: classes, padding, and the choice of the decode class."""

from __future__ import annotations

import pytest

from sglang_margingate.gate.invariance import InvarianceMap, LayerClasses, RowSizes, rows_to_probe


def layer(name: str, *runs: tuple[int, int, int | None], head: bool = False) -> LayerClasses:
    return LayerClasses(name, (8, 8), 1, {m: c for first, last, c in runs for m in range(first, last + 1)}, head)


# What an H200 gave for the 8B shape (docs/benchmarks.md).
O_PROJ = layer("o", (1, 24, 0), (25, 31, 1), (32, 40, 0), (41, 47, 1), (48, 48, 0), (49, 128, 1))
DOWN = layer("down", (1, 56, 0), (57, 64, 1), (65, 88, 0), (89, 128, 2))
HEAD = layer("head", (1, 128, 0), head=True)


def test_runs_join_neighbours_of_one_class_and_split_where_it_changes() -> None:
    assert O_PROJ.runs()[:3] == [(1, 24, 0), (25, 31, 1), (32, 40, 0)]
    assert layer("x", (1, 1, 0), (2, 3, None)).runs() == [(1, 1, 0), (2, 3, None)]


def test_padding_goes_to_the_next_probed_size_and_never_beyond_the_last() -> None:
    sizes = RowSizes((2, 3, 8))
    assert [sizes.target(m) for m in (1, 2, 4, 8, 9)] == [2, 2, 8, 8, None]
    assert RowSizes().target(1) is None
    assert sizes.describe() == "2-3, 8"
    assert RowSizes().describe() == "none"


def test_a_class_holds_where_every_layer_agrees() -> None:
    found = InvarianceMap([O_PROJ, DOWN, HEAD])
    assert found.same_as(64, head=True).describe() == "57-64"
    assert found.same_as(16, head=True).describe() == "1-24, 32-40, 48"


@pytest.mark.parametrize(
    ("largest", "targets"),
    [(24, {1: 1, 8: 8, 24: 24}), (64, {1: 25, 8: 25, 32: 41, 64: 65})],
)
def test_the_decode_class_covers_the_wanted_batches_at_little_padding(largest: int, targets: dict[int, int]) -> None:
    chosen = InvarianceMap([O_PROJ, DOWN, HEAD]).decode_class(largest)
    assert {b: chosen.target(b) for b in targets} == targets


def test_sizes_at_which_a_rows_place_matters_are_in_no_class() -> None:
    found = InvarianceMap([layer("x", (1, 4, 0), (5, 5, None), (6, 8, 0))])
    assert 5 not in found.decode_class(8).sizes
    assert found.same_as(5, head=True) == RowSizes()


def test_a_map_without_any_class_says_so() -> None:
    found = InvarianceMap([layer("x", (1, 8, None))])
    assert found.decode_class(8) == RowSizes()
    assert found.to_dict()["layers"][0]["classes"] == [[1, 8, None]]


def test_the_head_may_be_left_out_of_a_prefills_class() -> None:
    found = InvarianceMap([layer("x", (1, 64, 0)), layer("head", (1, 1, 0), (2, 8, 1), head=True)])
    assert found.same_as(64, head=False).sizes[-1] == 64
    assert found.head_same_as(4).describe() == "2-8"
    assert found.largest() == 64


def test_every_small_size_is_probed_and_larger_ones_in_steps() -> None:
    rows = rows_to_probe(64, 2048, 32, 1024, 128)
    assert rows[:64] == list(range(1, 65))
    assert rows[64:67] == [96, 128, 160]
    assert rows[-3:] == [1792, 1920, 2048]
    assert rows == sorted(set(rows))
    assert rows_to_probe(64, 10, 32, 1024, 128) == list(range(1, 11))
