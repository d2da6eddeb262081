"""The sum over ranks on a GPU, or in Triton's interpreter: its reference's bits, whatever the size."""

from __future__ import annotations

import pytest
import torch
from margingate_kernels import rank_sum, rank_sum_reference
from margingate_kernels._backend import interpreted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or interpreted()), reason="no NVIDIA GPU"),
]
# Triton's interpreter cuts off what bfloat16 does not hold instead of rounding.
DTYPES = [torch.float16, torch.float32, *([] if interpreted() else [torch.bfloat16])]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts(ranks: int, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """Return parts whose sum shows its order: large numbers with either sign beside small ones."""
    generator = torch.Generator().manual_seed(ranks)
    drawn = torch.randn(ranks, rows, hidden, generator=generator)
    if ranks > 2:
        large = torch.rand(rows, hidden, generator=generator) * 2.0**12
        drawn[1], drawn[-1] = large, -large
    return drawn.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ranks", "rows", "hidden"), [(2, 1, 64), (3, 5, 100), (4, 17, 256), (8, 64, 96), (4, 1, 1), (2, 0, 8)]
)
def test_rank_sum_has_the_bits_of_the_order(ranks: int, rows: int, hidden: int, dtype: torch.dtype) -> None:
    x = parts(ranks, rows, hidden, dtype)
    assert torch.equal(rank_sum(x), rank_sum_reference(x))


def test_rank_sum_shows_another_order() -> None:
    x = parts(4, 64, 256, torch.float32)
    assert not torch.equal(rank_sum(x), rank_sum(x.flip(0).contiguous()))


def test_rank_sum_of_a_row_does_not_depend_on_the_others() -> None:
    x = parts(4, 33, 256, DTYPES[-1])
    whole = rank_sum(x)
    for rows in (1, 2, 17):
        assert torch.equal(rank_sum(x[:, :rows].contiguous()), whole[:rows])


def test_rank_sum_refuses_what_it_does_not_add_up() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        rank_sum(parts(4, 8, 64, torch.float32)[:, ::2])
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        rank_sum(torch.zeros(2, 4, dtype=torch.int32, device=DEVICE))
