"""The probe of fused experts sees what depends on companions: counts per expert, places, and the order of the sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_margingate.canonical.experts.probe import ExpertKind, chosen_experts, lent_experts
from sglang_margingate.canonical.layer_probe import labels

EXPERTS, INNER, HIDDEN, TOP_K = 16, 32, 64, 8
Cut = Callable[[int, int, int], bool]
"""Whether a product is summed in two parts: rows of its expert, rows in all, and the row's place."""


def never(count: int, rows: int, place: int) -> bool:
    return False


def product(row: torch.Tensor, weight: torch.Tensor, cut: bool) -> torch.Tensor:
    terms = row.float() * weight.float()
    middle = terms.shape[1] // 3
    return (terms[:, :middle].sum(1) + terms[:, middle:].sum(1) if cut else terms.sum(1)).bfloat16()


def kind(up: Cut = never, down: Cut = never, backwards: Callable[[int], bool] = lambda rows: False) -> ExpertKind:
    """Return a bank of small experts, computed row by row, whose order of summation the tests choose."""
    first = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN).bfloat16(), requires_grad=False)
    second = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER).bfloat16(), requires_grad=False)

    def apply(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(experts.flatten().long(), minlength=EXPERTS)
        out = torch.empty_like(x)
        for place in range(len(x)):
            total = torch.zeros(HIDDEN)
            picks = list(zip(experts[place].tolist(), weights[place]))
            for expert, weight in reversed(picks) if backwards(len(x)) else picks:
                where = (int(counts[expert]), len(x), place)
                gate, value = product(x[place], first[expert], up(*where)).chunk(2)
                middle = torch.nn.functional.silu(gate) * value
                total += (product(middle, second[expert], down(*where)).float() * weight).bfloat16().float()
            out[place] = total.bfloat16()
        return x.copy_(out)  # in place, as most models' banks

    return ExpertKind("experts", first, second, TOP_K, apply, "row by row", 3)


def test_a_bank_that_looks_at_each_row_alone_has_one_class() -> None:
    assert set(labels(kind(), [1, 2, 3, 5]).values()) == {0}


@pytest.mark.parametrize("which", ["up", "down"])
def test_a_product_that_depends_on_the_rows_of_its_expert_has_no_class(which: str) -> None:
    """At one row there is one count; above, companions decide it."""
    found = labels(kind(**{which: lambda count, rows, place: count >= 2}), [1, 2, 4])
    assert found[1] is not None
    assert (found[2], found[4]) == (None, None)


@pytest.mark.parametrize("which", ["up", "down"])
def test_a_product_that_depends_on_all_rows_has_classes(which: str) -> None:
    found = labels(kind(**{which: lambda count, rows, place: rows > 2}), [1, 2, 3, 4])
    assert found == {1: 0, 2: 0, 3: 1, 4: 1}


@pytest.mark.parametrize("which", ["up", "down"])
def test_a_product_that_depends_on_the_place_has_no_class(which: str) -> None:
    found = labels(kind(**{which: lambda count, rows, place: place == 1}), [1, 3])
    assert found == {1: 0, 3: None}


def test_another_order_of_the_sum_over_experts_is_a_class_of_its_own() -> None:
    assert labels(kind(backwards=lambda rows: rows > 2), [1, 2, 3, 4]) == {1: 0, 2: 0, 3: 1, 4: 1}


def test_the_lent_products_cancel_and_leave_nothing_but_rounding() -> None:
    one = kind()
    with lent_experts(one.up, one.down, "up") as row:
        exact = one.up.double() @ row.double()
        plain = torch.nn.functional.linear(row.float(), one.up.float().flatten(0, 1))
        assert torch.allclose(exact, torch.zeros_like(exact), atol=1e-9)
        assert plain.abs().max() > 0
        assert torch.equal(one.down[0] * 64, one.down[2])
        assert torch.equal(one.down[2] * -1, one.down[3])
    with lent_experts(one.up, one.down, "down") as row:
        gate, value = (one.up[0].double() @ row.double()).chunk(2)
        middle = (torch.nn.functional.silu(gate) * value).bfloat16().double()
        exact = one.down[0].double() @ middle
        assert middle.abs().max() > 0
        assert torch.allclose(exact, torch.zeros_like(exact), atol=1e-9)


def test_the_weights_come_back_also_after_an_error() -> None:
    one = kind()
    up, down = one.up.data_ptr(), one.down.data_ptr()
    with pytest.raises(RuntimeError, match="stop"), lent_experts(one.up, one.down, "up"):
        raise RuntimeError("stop")
    assert (one.up.data_ptr(), one.down.data_ptr()) == (up, down)


def test_what_is_tried_stops_when_the_time_is_up() -> None:
    assert sorted(kind().digests([5, 3, 2, 1], seconds=0.0)) == [3, 5]


def test_a_map_says_how_many_experts_there_are() -> None:
    one = kind()
    assert one.describe() == "bfloat16, row by row, 8 of 16 experts"
    assert one.shape == (2 * INNER, HIDDEN)


def test_the_probed_row_takes_its_experts_in_pairs() -> None:
    assert chosen_experts(8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert chosen_experts(1).tolist() == [0]


def test_settings_are_compared_by_what_the_row_becomes() -> None:
    now = {"cut": False, "companions": False}
    one = kind(up=lambda count, rows, place: now["cut"] or (now["companions"] and count > 1))

    def settle(**values: bool) -> Callable[[], None]:
        return lambda: now.update({"cut": False, "companions": False} | values)

    whole, parts, again, bad = one.bits_of([settle(), settle(cut=True), settle(), settle(companions=True)], [1, 3])
    assert whole is not None
    assert whole == again
    assert parts not in (None, whole)
    assert bad is None


def test_large_numbers_of_rows_are_probed_at_multiples_only() -> None:
    from sglang_margingate.canonical.layer_probe import wanted

    rows = [1, 259, 260, 264, 320, 328, 384, 8192]
    assert wanted(kind(), rows) == [1, 259, 260, 320, 384, 8192]
