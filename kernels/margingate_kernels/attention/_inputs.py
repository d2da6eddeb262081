"""What the attention kernels ask of their arguments."""

from __future__ import annotations

import torch

DTYPES = (torch.bfloat16, torch.float16)


def supports(q_heads: int, kv_heads: int, head_dim: int) -> bool:
    """Return whether the kernels exist for this shape.

    head_dim a power of 2 from 16 to 256; at most 64 query heads a K/V head, 32 where head_dim is 256: more would not fit
    the shared memory of small cards (``kernels/benchmarks/compile_cards.py``).
    """
    fits = head_dim in (16, 32, 64, 128, 256)
    return fits and kv_heads > 0 and q_heads % kv_heads == 0 and q_heads // kv_heads <= min(64, 8192 // head_dim)


def check_indptr(name: str, indptr: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless it is int32 [n + 1], contiguous, on ``device``."""
    if indptr.dim() != 1 or len(indptr) < 2 or indptr.dtype != torch.int32:
        raise ValueError(f"{name} must be int32 [n + 1], got {indptr.dtype} {tuple(indptr.shape)}")
    if not indptr.is_contiguous() or indptr.device != device:
        raise ValueError(f"{name} must be contiguous and on {device}, got {indptr.device}")


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    heads: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Raise ValueError unless q is [rows, q_heads, head_dim], the pools [slots, kv_heads, head_dim], indices int32 [n].

    Each row of ``q`` must be contiguous; mostly it is a slice of what one layer makes of queries, keys and values together.
    """
    q_heads, kv_heads, head_dim = heads
    if q.dim() != 3 or not len(q) or q.shape[1:] != (q_heads, head_dim) or q.dtype not in DTYPES:
        raise ValueError(f"q must be bfloat16 or float16 [rows, {q_heads}, {head_dim}], got {q.dtype} {tuple(q.shape)}")
    for name, pool in (("k", k), ("v", v)):
        if pool.shape != (len(k), kv_heads, head_dim) or pool.dtype != q.dtype:
            raise ValueError(
                f"{name} must be {q.dtype} [slots, {kv_heads}, {head_dim}], got {pool.dtype} {tuple(pool.shape)}"
            )
    if indices.dim() != 1 or indices.dtype != torch.int32:
        raise ValueError(f"indices must be int32 of one dimension, got {indices.dtype} {tuple(indices.shape)}")
    dense = q[0].is_contiguous() and all(t.is_contiguous() for t in (k, v, indices))
    if not dense or {t.device for t in (q, k, v, indices)} != {device}:
        raise ValueError(f"each row of q, and k, v and indices must be contiguous, all on {device}")


def power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least ``n``."""
    return 1 << (n - 1).bit_length()
