"""The probe of linear layers sees a change of summation order that random numbers hide."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from margingate_kernels import row_digest

from sglang_margingate.canonical import layer_probe
from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses
from sglang_margingate.canonical.layer_probe import HEAD_LARGEST, labels, probe_layers, spot_check
from sglang_margingate.canonical.linear_probe import FP8, LinearKind


def kind(apply_rows: int | None, bias: bool = False, place: int | None = None) -> LinearKind:
    """Return a layer of 256 inputs that sums in two parts: up to ``apply_rows`` rows, or in the row ``place``."""
    weight = torch.nn.Parameter(torch.randn(64, 256).bfloat16(), requires_grad=False)

    def apply(x: torch.Tensor, bias_: torch.Tensor | None) -> torch.Tensor:
        # Row by row, so that the library's own classes stay out of this test.
        whole = torch.stack([(row.float() * weight.float()).sum(1) for row in x])
        parts = torch.stack(
            [
                (row.float() * weight.float())[:, :100].sum(1) + (row.float() * weight.float())[:, 100:].sum(1)
                for row in x
            ]
        )
        out = parts if apply_rows is not None and len(x) <= apply_rows else whole
        if place is not None:
            out = torch.cat([whole[:place], parts[place : place + 1], whole[place + 1 :]])
        return (out if bias_ is None else out + bias_.float()).bfloat16()

    return LinearKind("x", weight, torch.randn(64) if bias else None, apply, False, "Plain", 2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_change_of_order_is_a_class_of_its_own(bias: bool) -> None:
    found = labels(kind(5, bias), list(range(1, 9)))
    assert len({found[m] for m in range(1, 6)}) == 1
    assert len({found[m] for m in range(6, 9)}) == 1
    assert found[5] != found[6]


def test_an_invariant_layer_has_one_class() -> None:
    assert set(labels(kind(None), list(range(1, 9))).values()) == {0}


@pytest.mark.parametrize("place", [0, 1])
def test_a_row_whose_place_matters_has_no_class(place: int) -> None:
    """Also a place in the middle: some kernels sum some tiles of a product in another order than the others."""
    found = labels(kind(None, place=place), [1, 2, 3])
    assert found[1] is not None
    assert found[2] is None
    assert found[3] is None


def test_the_weight_comes_back() -> None:
    one = kind(None)
    before = row_digest(one.weight.data).clone()
    pointer = one.weight.data_ptr()
    labels(one, [1, 2])
    assert one.weight.data_ptr() == pointer
    assert torch.equal(row_digest(one.weight.data), before)


def test_the_probe_leaves_the_servers_random_numbers_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    one = kind(None)
    torch.manual_seed(0)
    labels(one, [1, 2])
    assert torch.equal(torch.rand(1), wanted)


def test_a_map_says_what_each_layer_is_and_probes_the_head_only_as_far_as_it_is_used() -> None:
    body, head = kind(5, bias=True), LinearKind("h", kind(None).weight, None, lambda x, _: x[:, :64], True, "matmul")
    found = probe_layers([body, head], [1, 2, HEAD_LARGEST, HEAD_LARGEST + 1], {"device": "d"})
    assert [(x.name, x.shape, x.count, x.kind) for x in found.layers] == [
        ("x", (64, 256), 2, "bfloat16, Plain, bias"),
        ("h", (64, 256), 1, "bfloat16, matmul, no bias"),
    ]
    assert max(found.layers[0].labels) == HEAD_LARGEST + 1
    assert max(found.layers[1].labels) == HEAD_LARGEST


def test_large_sizes_are_probed_first_and_classes_numbered_from_small_ones() -> None:
    """The other way round a GPU's allocator would keep a block of every size."""
    calls: list[int] = []
    one = kind(5)

    def counted(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return one.apply(x, bias)

    found = probe_layers([LinearKind("x", one.weight, None, counted, False)], list(range(1, 9)), {})
    assert calls == [m for m in range(8, 0, -1) for _ in range(2)]
    assert found.layers[0].runs() == [(1, 5, 0), (6, 8, 1)]


@pytest.mark.parametrize(("now", "wrong"), [(5, []), (4, [5]), (None, [])])
def test_a_spot_check_finds_a_moved_border(now: int | None, wrong: list[int]) -> None:
    found = probe_layers([kind(5 if now else None)], list(range(1, 13)), {})
    assert spot_check([kind(now)], found) == ({"x": wrong} if wrong else {})


def test_a_spot_check_finds_a_layer_that_fell_in_two() -> None:
    found = probe_layers([kind(None)], list(range(1, 13)), {})
    # Tried first are 1 and 12; 1 sets what the map's only class looks like now, so those that differ from it are named.
    assert spot_check([kind(5)], found) == {"x": list(range(6, 13))}


def test_a_spot_check_stops_when_its_time_is_up_and_still_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    one = kind(None)

    def counted(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return one.apply(x, bias)

    monkeypatch.setattr(layer_probe, "SPOT_SECONDS", 0.0)
    found = InvarianceMap([LayerClasses("x", (64, 256), 1, dict.fromkeys(range(1, 65), 0))])
    assert spot_check([LinearKind("x", one.weight, None, counted, False)], found) == {}
    assert calls == [1, 1, 64, 64]


def small(cut: int | None, inputs_first: bool, rounds_up: int | None = None, batch_scale: bool = False) -> LinearKind:
    """Return a layer of 8-bit weights, one scale per output, that quantises each row and sums in two parts up to ``cut`` rows.

    Up to ``rounds_up`` rows it quantises in another way; or it takes one scale for the whole batch.
    """
    weight = torch.nn.Parameter(torch.randn(64, 256).to(FP8), requires_grad=False)
    if inputs_first:
        weight = torch.nn.Parameter(weight.data.t(), requires_grad=False)
    scale = torch.nn.Parameter(torch.rand(64, 1), requires_grad=False)

    def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        held = weight.float().t() if inputs_first else weight.float()
        groups = x.float().unflatten(1, (-1, 128))
        unit = groups.abs().amax(2, keepdim=True) / 448
        if batch_scale:
            unit = unit.amax((0, 1), keepdim=True).expand_as(unit)
        exact = groups / unit
        held_exact = exact.to(FP8).float() == exact
        if rounds_up is not None and len(x) <= rounds_up:  # another rounding, of what has to be rounded at all
            exact = torch.where(held_exact, exact, exact * 1.03)
        rows = (exact.to(FP8).float() * unit).flatten(1)
        # A tensor core's sums of 8-bit products hold fewer bits than fp32.
        terms = (rows[:, None] * held[None]).half()
        parts = (100, 156) if cut is not None and len(x) <= cut else (256,)
        out = torch.stack([part.cumsum(2)[..., -1] for part in terms.split(parts, dim=2)]).sum(0)
        return (out * scale.t()).bfloat16()

    return LinearKind("x", weight, None, apply, False, "Small", scales=((scale, 1.0),), inputs_first=inputs_first)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_weights_of_8_bits_cancel_too_and_their_scales_come_back(inputs_first: bool) -> None:
    one = small(5, inputs_first)
    assert one.shape == (64, 256)
    assert one.describe() == "float8_e4m3fn, Small, no bias"
    before = one.scales[0][0].data_ptr(), one.weight.data_ptr(), one.weight.stride()
    found = labels(one, [1, 4, 5, 6, 7])
    assert found == {1: 0, 4: 0, 5: 0, 6: 1, 7: 1}
    assert (one.scales[0][0].data_ptr(), one.weight.data_ptr(), one.weight.stride()) == before
    assert set(labels(small(None, inputs_first), [1, 2, 3, 8]).values()) == {0}


def test_activations_that_are_quantised_otherwise_at_few_rows_show() -> None:
    assert labels(small(None, False, rounds_up=2), [1, 2, 3, 4]) == {1: 0, 2: 0, 3: 1, 4: 1}


def test_one_scale_for_the_whole_batch_has_no_class() -> None:
    """A row's bits depend on the largest of its companions."""
    found = labels(small(None, False, batch_scale=True), [1, 3, 8])
    assert found[1] is not None
    assert (found[3], found[8]) == (None, None)


def test_a_lent_row_of_8_bits_is_quantised_to_what_it_was() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    one = small(None, False)

    def watched(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        seen.append((x[0].float(), one.weight.float() @ x[0].float()))
        return one.apply(x, bias)

    labels(replace(one, apply=watched), [1])
    row, sums = seen[0]
    groups = row.unflatten(0, (-1, 128))
    assert torch.equal(groups.abs().amax(1), torch.full((2,), 448 * 2.0**-8))
    assert torch.equal((row / 2.0**-8).to(FP8).float() * 2.0**-8, row)
    assert torch.allclose(sums, torch.zeros(64), atol=1e-3)
