"""The probe of linear layers sees a change of summation order that random numbers hide."""

from __future__ import annotations

import pytest
import torch
from margingate_kernels import row_digest

from sglang_margingate.serving.linear_probe import _Kind, _labels


def kind(apply_rows: int | None, bias: bool = False, place: bool = False) -> _Kind:
    """Return a layer of 256 inputs; with ``apply_rows`` it sums in two parts up to that many rows."""
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
        if place:
            out = torch.cat([parts[:1], whole[1:]])
        return (out if bias_ is None else out + bias_.float()).bfloat16()

    return _Kind("x", weight, torch.randn(64) if bias else None, apply, False)


@pytest.mark.parametrize("bias", [False, True])
def test_a_change_of_order_is_a_class_of_its_own(bias: bool) -> None:
    labels = _labels(kind(5, bias), list(range(1, 9)))
    assert len({labels[m] for m in range(1, 6)}) == 1
    assert len({labels[m] for m in range(6, 9)}) == 1
    assert labels[5] != labels[6]


def test_an_invariant_layer_has_one_class() -> None:
    assert set(_labels(kind(None), list(range(1, 9))).values()) == {0}


def test_a_row_whose_place_matters_has_no_class() -> None:
    labels = _labels(kind(None, place=True), [1, 2, 3])
    assert labels[2] is None
    assert labels[3] is None


def test_the_weight_comes_back() -> None:
    one = kind(None)
    before = row_digest(one.weight.data).clone()
    pointer = one.weight.data_ptr()
    _labels(one, [1, 2])
    assert one.weight.data_ptr() == pointer
    assert torch.equal(row_digest(one.weight.data), before)
