"""Decode attention over paged K/V in which a row's bits depend on that row alone, at any batch and context length.

A decode row reads its whole context. One program for each (row, K/V head) is row-invariant, but leaves most of a GPU
idle when few rows have long contexts; cutting contexts by a plan for the whole batch, as FlashInfer does, fills the GPU
and lets the batch decide the order of summation. Here a context is cut into chunks by its own length, their results are
joined in one order, and the batch decides only how many programs share the chunks.
"""

from __future__ import annotations

import itertools
import math

import torch

from margingate_kernels._backend import on_device, use_triton

CHUNK = 128
"""Tokens of a chunk, for contexts up to ``CHUNK * MOST_CHUNKS``."""

MOST_CHUNKS = 32
"""A row has no more chunks than this; longer contexts get longer chunks."""

BLOCK = 64
"""Tokens that a program reads at once; every chunk is a multiple."""

PROGRAMS_PER_SM = 4
WARPS, STAGES = 2, 3
WIDE = 8
"""Stored chunks that are loaded before they are joined."""

_DTYPES = (torch.bfloat16, torch.float16)


def chunk_tokens(length: int) -> int:
    """Return the tokens of a chunk in a context of ``length``: a function of the row alone."""
    return max(CHUNK, -(-length // (MOST_CHUNKS * BLOCK)) * BLOCK)


class DecodeAttention:
    """Attention of one query a row over its paged context, grouped-query, no mask beyond the context's end.

    First :meth:`plan` with the batch's contexts, then one call for every layer. Calls must not overlap: they share a
    workspace. Both may be captured in a CUDA graph; the lengths may change between replays.

    Parameters
    ----------
    max_rows
        Largest number of rows of a call.
    q_heads, kv_heads, head_dim
        Shape of the model's attention; see :meth:`supports`.
    device
        Where everything lives.

    Raises
    ------
    ValueError
        The shape is not supported.
    """

    def __init__(self, max_rows: int, q_heads: int, kv_heads: int, head_dim: int, device: torch.device | str) -> None:
        if max_rows < 1 or not self.supports(q_heads, kv_heads, head_dim):
            raise ValueError(f"{max_rows} rows, {q_heads} / {kv_heads} heads of {head_dim}: not supported")
        self.max_rows, self.q_heads, self.kv_heads, self.head_dim = max_rows, q_heads, kv_heads, head_dim
        self.device = torch.device(device)
        shape = (max_rows, MOST_CHUNKS, kv_heads, q_heads // kv_heads)
        self._parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        self._sums = torch.empty(*shape, 2, dtype=torch.float32, device=device)
        self._counters = torch.zeros(max_rows, kv_heads, dtype=torch.int32, device=device)
        self._items = torch.zeros(max_rows * MOST_CHUNKS, 8, dtype=torch.int32, device=device)
        self._count = torch.zeros(1, dtype=torch.int32, device=device)
        self._indptr = torch.zeros(1, dtype=torch.int32, device=device)
        self._programs = 5
        if self.device.type == "cuda":
            sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._programs = PROGRAMS_PER_SM * sms

    @staticmethod
    def supports(q_heads: int, kv_heads: int, head_dim: int) -> bool:
        """Return whether the kernel exists for this shape: head_dim a power of 2 from 16 to 256, at most 64 q heads a K/V head."""
        fits = head_dim in (16, 32, 64, 128, 256)
        return fits and kv_heads > 0 and q_heads % kv_heads == 0 and q_heads // kv_heads <= 64

    def plan(self, indptr: torch.Tensor) -> None:
        """Cut the contexts of the next calls' rows into chunks.

        Parameters
        ----------
        indptr
            int32 [rows + 1]: row r's slots are ``indices[indptr[r]:indptr[r + 1]]``. Values are not checked: that needs a
            sync.

        Raises
        ------
        ValueError
            Its shape, dtype or device is wrong.
        """
        rows = len(indptr) - 1
        if indptr.dim() != 1 or not 0 < rows <= self.max_rows or indptr.dtype != torch.int32:
            raise ValueError(
                f"indptr must be int32 [2 to {self.max_rows + 1}], got {indptr.dtype} {tuple(indptr.shape)}"
            )
        if not indptr.is_contiguous() or indptr.device != self._parts.device:
            raise ValueError(f"indptr must be contiguous and on {self._parts.device}, got {indptr.device}")
        self._indptr = indptr
        if not use_triton(indptr):
            return
        from margingate_kernels._triton_decode_attention import plan_kernel

        with on_device(indptr):
            plan_kernel[(rows,)](
                indptr, self._items, self._count, rows, self._programs,
                KV_HEADS=self.kv_heads, CHUNK=CHUNK, MOST=MOST_CHUNKS, BLOCK=BLOCK, ROWS=_power_of_2(self.max_rows), num_warps=1,
            )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention's output: of ``q``'s shape, contiguous.

        Parameters
        ----------
        q
            [rows, q_heads, head_dim], bfloat16 or float16, each row contiguous; as many rows as were planned.
        k, v
            The pool: [slots, kv_heads, head_dim] of the same dtype, contiguous.
        indices
            int32: slots in the order of their positions.
        scale
            Of the logits, mostly 1 / sqrt(head_dim).

        Raises
        ------
        ValueError
            A shape, dtype or device is wrong.
        """
        self._check(q, k, v, indices)
        if not use_triton(q):
            return decode_attention_reference(q, k, v, self._indptr, indices, scale)
        return self._launch(q, k, v, indices, scale)

    def _launch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        from margingate_kernels._triton_decode_attention import decode_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = self.q_heads // self.kv_heads
        with on_device(q):
            decode_kernel[(self._programs,)](
                q, k, v, indices, self._items, self._count, out, self._parts, self._sums, self._counters,
                scale * math.log2(math.e), q.stride(0),
                KV_HEADS=self.kv_heads, GROUP=group, GROUP_P2=_power_of_2(group), DOT_ROWS=max(16, _power_of_2(group)),
                DIM=self.head_dim, BLOCK=BLOCK, MOST=MOST_CHUNKS, STAGES=STAGES, WIDE=WIDE, num_warps=WARPS,
            )  # fmt: skip
        return out

    def _check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor) -> None:
        rows = len(self._indptr) - 1
        if q.shape != (rows, self.q_heads, self.head_dim) or q.dtype not in _DTYPES:
            raise ValueError(
                f"q must be bfloat16 or float16 [{rows} as planned, {self.q_heads}, {self.head_dim}], "
                f"got {q.dtype} {tuple(q.shape)}"
            )
        for name, pool in (("k", k), ("v", v)):
            if pool.shape != (len(k), self.kv_heads, self.head_dim) or pool.dtype != q.dtype:
                raise ValueError(
                    f"{name} must be {q.dtype} [slots, {self.kv_heads}, {self.head_dim}], got {pool.dtype} {tuple(pool.shape)}"
                )
        if indices.dim() != 1 or indices.dtype != torch.int32:
            raise ValueError(f"indices must be int32 of one dimension, got {indices.dtype} {tuple(indices.shape)}")
        tensors = (q, k, v, indices)
        # Queries mostly are a slice of what one layer makes of queries, keys and values together.
        dense = q[0].is_contiguous() and all(t.is_contiguous() for t in tensors[1:])
        if not dense or {t.device for t in tensors} != {self._parts.device}:
            raise ValueError(f"each row of q, and k, v and indices must be contiguous, all on {self._parts.device}")


def decode_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    """Compute the same in float32 with plain PyTorch; a row without context gets zeros."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    bounds = indptr.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin == end:
            continue
        slots = indices[begin:end].long()
        keys, values = (pool[slots].float().repeat_interleave(group, dim=1) for pool in (k, v))
        weights = torch.einsum("hd,thd->ht", q[row].float(), keys).mul_(scale).softmax(dim=-1)
        out[row] = torch.einsum("ht,thd->hd", weights, values).to(q.dtype)
    return out


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
