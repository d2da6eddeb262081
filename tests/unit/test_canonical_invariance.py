"""The invariance map: classes, padding, and the choice of the decode class."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sglang_margingate.canonical.invariance import (
    SPOT_ROWS,
    InvarianceMap,
    LayerClasses,
    MapError,
    RowSizes,
    rows_to_probe,
    spans,
)


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


# ---- on disk ----------------------------------------------------------------------------------------------------------

CPU_ROWS = rows_to_probe(64, 2048, 32, 1024, 128)
GPU_ROWS = rows_to_probe(260, 16_384, 8, 16_384, 8)


def stored() -> dict[str, Any]:
    """Return a map with every peculiarity, as it comes back from a file."""
    labels = {m: None if m in (7, 96, 128) else (m > 20) + 2 * (m % 64 == 0) for m in CPU_ROWS}
    fine = {m: m % 16 // 8 for m in GPU_ROWS}
    found = InvarianceMap(
        [LayerClasses("a", (8, 16), 3, labels, kind="bfloat16"), LayerClasses("b", (4, 8), 1, fine), HEAD],
        {"device": "d", "torch": "2"},
        1.25,
    )
    return json.loads(json.dumps(found.to_dict()))


def test_a_map_survives_json_with_exactly_the_values_that_were_probed() -> None:
    labels = {m: m > 100 for m in CPU_ROWS}
    found = InvarianceMap(
        [LayerClasses("a", (8, 16), 3, {m: int(c) for m, c in labels.items()}), HEAD], {"x": "y"}, 2.5
    )
    back = InvarianceMap.from_dict(json.loads(json.dumps(found.to_dict())))
    assert back == found
    assert 97 not in back.layers[0].labels
    assert back.same_as(64, head=False).target(65) == 96
    assert InvarianceMap.from_dict(stored()).to_dict() == stored()


def test_runs_stay_as_the_dashboard_reads_them_and_probed_values_stand_beside_them() -> None:
    data = LayerClasses("a", (8, 16), 3, {m: int(m > 100) for m in CPU_ROWS}).to_dict()
    assert data["classes"] == [[1, 96, 0], [128, 2048, 1]]
    assert data["probed"] == [[1, 64, 1], [96, 1024, 32], [1152, 2048, 128]]


@pytest.mark.parametrize("rows", [[], [5], [5, 9], [1, 2, 3, 5, 7, 9, 100], CPU_ROWS, GPU_ROWS])
def test_spans_hold_every_number_once(rows: list[int]) -> None:
    assert [m for first, last, step in spans(rows) for m in range(first, last + 1, step)] == rows


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("layers"), "'layers' is missing"),
        (lambda d: d.pop("seconds"), "'seconds' is missing"),
        (lambda d: d.update(environment=None), "environment"),
        (lambda d: d.update(seconds="long"), "wrong value"),
        (lambda d: d["layers"][0].pop("probed"), "'probed' is missing"),
        (lambda d: d["layers"][0].pop("count"), "'count' is missing"),
        (lambda d: d["layers"][0].update(more=1), "unknown"),
        (lambda d: d["layers"][0].update(probed=[]), "no value"),
        (lambda d: d["layers"][0].update(probed=[[1, 10**30, 1]]), "wrong value|too many"),
        (lambda d: d["layers"][0].update(probed=[[1, 64, 0]]), "wrong value"),
        (lambda d: d["layers"][0]["classes"].pop(1), "do not fit"),
        (lambda d: d["layers"][0]["classes"].pop(), "do not fit"),
        (lambda d: d["layers"][0]["classes"][-1].__setitem__(1, 4096), "do not fit"),
        (lambda d: d["layers"][0]["classes"][0].__setitem__(2, "a"), "'a'"),
        (lambda d: d["layers"][0].update(probed=[[1, 64, 1], [96, 1024, 16], [1152, 2048, 128]]), "do not fit"),
        (lambda d: d["layers"].__setitem__(0, 3), "wrong value"),
    ],
)
def test_a_damaged_map_says_which_field(damage: Any, message: str) -> None:
    data = stored()
    damage(data)
    with pytest.raises(MapError, match=message) as caught:
        InvarianceMap.from_dict(data)
    assert "\n" not in str(caught.value)


def test_a_map_that_is_no_object_is_refused() -> None:
    for data in ([], "text", None, 3):
        with pytest.raises(MapError):
            InvarianceMap.from_dict(data)


# ---- the spot check ---------------------------------------------------------------------------------------------------


def test_a_spot_check_tries_the_ends_of_runs_and_a_sample_of_small_and_large_values() -> None:
    one = LayerClasses("a", (8, 8), 1, {m: int(m > 100) for m in GPU_ROWS})
    picked = one.spot_rows(random.Random(1))
    assert len(picked) == len(set(picked)) == SPOT_ROWS
    assert picked[:2] == [1, 16_384]
    assert {1, 100, 101, 16_384} <= set(picked) <= set(GPU_ROWS)
    assert len({m.bit_length() for m in picked}) == 15, "one of every doubling"
    assert set(picked) != set(one.spot_rows(random.Random(2)))


def test_a_map_of_many_runs_is_checked_at_few_values_other_ones_each_time() -> None:
    many = LayerClasses("a", (8, 8), 1, {m: m // 8 % 2 for m in GPU_ROWS})
    tries = [set(many.spot_rows(random.Random(seed))) for seed in range(300)]
    assert {len(picked) for picked in tries} == {SPOT_ROWS}
    assert len(set.union(*tries)) > len(GPU_ROWS) / 2


@pytest.mark.parametrize("rows", [[1], [1, 2], [1, 2, 3], list(range(1, 30))])
def test_a_small_map_is_checked_as_far_as_it_goes(rows: list[int]) -> None:
    picked = LayerClasses("a", (8, 8), 1, dict.fromkeys(rows, 0)).spot_rows(random.Random(0))
    assert len(picked) == min(len(rows), SPOT_ROWS)
    assert set(picked) <= set(rows)


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({1: 0, 4: 0, 5: 1, 8: 1}, []),
        ({5: 0, 8: 0, 1: 1, 4: 1}, []),  # the numbers alone say nothing
        ({1: 0, 4: 0, 5: 0, 8: 1}, [5, 8]),  # a border moved
        ({1: 0, 4: 1, 5: 2}, [4]),  # a class fell in two
        ({1: 0, 5: 0}, [5]),  # two classes became one
        ({1: 0, 9: None}, []),
        ({1: 0, 9: 1}, [9]),
        ({1: None, 5: 0}, [1]),
    ],
)
def test_a_spot_check_compares_who_shares_bits(found: dict[int, int | None], wrong: list[int]) -> None:
    assert layer("x", (1, 4, 3), (5, 8, 1), (9, 9, None)).disagreements(found) == wrong
