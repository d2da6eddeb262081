"""The Triton kernel of :mod:`margingate_kernels.memory.rank_sum`. Import only where Triton is installed."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank_sum_kernel(
    parts,  # [RANKS, count], contiguous
    out,  # [count]
    count,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up BLOCK elements of all ranks, one rank after another."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    total = tl.load(parts + at, mask=mask).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        total += tl.load(parts + rank * count.to(tl.int64) + at, mask=mask).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
