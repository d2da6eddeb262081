"""FlashAttention-3 as a prefill: what reaches the package's function, played by a reference that reads it as the kernel does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from margingate_kernels import Fa3PrefillAttention, PrefillAttention, fa3_available
from margingate_kernels.attention import fa3_prefill

HEADS, KV_HEADS, DIM, SLOTS = 8, 2, 64, 90


def flash_attn_with_kvcache(
    q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any = None, cache_batch_idx: Any = None, page_table: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: Any = None, softmax_scale: Any = None, causal: bool = False,
    num_splits: int = 0, pack_gqa: Any = None, out: Any = None,
) -> torch.Tensor:  # fmt: skip
    """Attend over pages of one column: row ``cache_batch_idx[r]`` of the table, ``cache_seqlens[r]`` columns."""
    assert (max_seqlen_q, causal, num_splits, pack_gqa) == (fa3_prefill.LONGEST, True, 1, True)
    assert page_table.stride(-1) == 1
    assert {t.dtype for t in (cache_seqlens, cache_batch_idx, page_table, cu_seqlens_q)} == {torch.int32}
    out = torch.full_like(q, 7.0) if out is None else out
    for r in range(len(cu_seqlens_q) - 1):
        first, last, length = int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1]), int(cache_seqlens[r])
        begin = int(cache_batch_idx[r]) * page_table.stride(0)
        own = page_table.as_strided((length,), (page_table.stride(1),), page_table.storage_offset() + begin).long()
        for at, row in enumerate(range(first, last)):
            seen = own[: length - (last - first) + at + 1]
            keys, values = (x[seen, 0].float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k_cache, v_cache))
            weights = (torch.einsum("hd,thd->ht", q[row].float(), keys) * softmax_scale).softmax(-1)
            out[row] = torch.einsum("ht,thd->hd", weights, values).to(q.dtype)
    return out


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("sgl_kernel.flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    fa3_prefill._function.cache_clear()
    yield module
    fa3_prefill._function.cache_clear()


def draw(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_it_attends_as_ours_does(package: ModuleType) -> None:
    q, k, v, slots = (
        draw(9, HEADS, DIM),
        draw(SLOTS, KV_HEADS, DIM),
        draw(SLOTS, KV_HEADS, DIM),
        torch.randperm(SLOTS).int(),
    )
    queries, columns = ints(0, 3, 8), ints(0, 9, 30)
    ours, fa3 = PrefillAttention(HEADS, KV_HEADS, DIM, "cpu"), Fa3PrefillAttention(HEADS, KV_HEADS, DIM, "cpu")
    for attend in (ours, fa3):
        attend.plan(queries, columns, 9)
    torch.testing.assert_close(fa3(q, k, v, slots, 0.1)[:8], ours(q, k, v, slots, 0.1)[:8], rtol=2e-2, atol=1e-2)


def test_contexts_may_lie_apart_and_padding_is_finite(package: ModuleType) -> None:
    q, k, v = draw(9, HEADS, DIM), draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM)
    table = torch.zeros(4, 40, dtype=torch.int32)
    table[2, :12], table[1, :7] = torch.randperm(SLOTS)[:12].int(), torch.randperm(SLOTS)[:7].int()
    begins, lengths = ints(80, 40, 0), ints(12, 7, 0)
    ours = PrefillAttention(HEADS, KV_HEADS, DIM, "cpu")
    fa3 = Fa3PrefillAttention(HEADS, KV_HEADS, DIM, "cpu", rows=9)
    for attend in (ours, fa3):
        attend.plan(ints(0, 2, 7, 7), begins, 9, begins + lengths)
    found = fa3(q, k, v, table.view(-1), 0.1)
    torch.testing.assert_close(found[:7], ours(q, k, v, table.view(-1), 0.1)[:7], rtol=2e-2, atol=1e-2)
    assert torch.equal(found[7:], torch.zeros(2, HEADS, DIM, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(8, 2, 96), (8, 3, 64), (130, 2, 64)])
def test_shapes_that_it_is_not_used_for(shape: tuple[int, int, int]) -> None:
    assert not Fa3PrefillAttention.supports(*shape)
    with pytest.raises(ValueError, match="not supported"):
        Fa3PrefillAttention(*shape, "cpu")


def test_broken_plans_are_refused() -> None:
    attend = Fa3PrefillAttention(HEADS, KV_HEADS, DIM, "cpu")
    with pytest.raises(ValueError, match="one shorter"):
        attend.plan(ints(0, 3), ints(0, 9, 12), 3)
    with pytest.raises(ValueError, match="queries must be int32"):
        attend.plan(torch.tensor([0, 3]), ints(0, 9), 3)


@pytest.mark.parametrize(
    ("capability", "has", "available"),
    [((9, 0), True, True), ((8, 0), True, False), ((10, 0), True, False), ((9, 0), False, False)],
)
def test_where_it_can_be_tried(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool, available: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if not has:
        package.flash_attn_with_kvcache = lambda q, k_cache, v_cache, page_table=None: q  # type: ignore[attr-defined]
    assert fa3_available(HEADS, KV_HEADS, DIM) is available
    assert not fa3_available(HEADS, KV_HEADS, 96)


def test_it_cannot_be_tried_without_a_gpu_or_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fa3_available(HEADS, KV_HEADS, DIM)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    fa3_prefill._function.cache_clear()
    assert not fa3_available(HEADS, KV_HEADS, DIM)
