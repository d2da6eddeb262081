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
from margingate_kernels.attention._inputs import check_attention, check_indptr, power_of_2, supports

CHUNK = 128
"""Tokens of a chunk, for contexts up to ``CHUNK * CHUNKS``."""

CHUNKS = 32
"""Chunks of a longer context, until they reach ``LONG_CHUNK`` tokens; of a model with ``KV_HEADS`` K/V heads or more."""

LONG_CHUNK = 512
"""Tokens of a chunk of a context above ``LONG_CHUNK * CHUNKS``, up to ``LONG_CHUNK * MOST_CHUNKS``: one row fills more of a GPU."""

MOST_CHUNKS = 64
"""A row has no more chunks than this; still longer contexts get longer chunks."""

KV_HEADS, MOST_TIMES = 8, 4
"""A model with fewer K/V heads has fewer programs a chunk, and that many times as many chunks, at most the second number."""

SPAN = 8
"""Neighbouring chunks that are joined first in a model with fewer K/V heads than ``KV_HEADS``. With as many, joining in two
steps won nothing and took 2% to 4% longer where contexts are short (H200)."""

BLOCK = 64
"""Tokens that a program reads at once; every chunk is a multiple."""

PROGRAMS_PER_SM = 4
WARPS, STAGES = 2, 3
WIDE_SUMS = 16 * 128
"""Numbers that a program sums at once (query heads times head_dim) with ``WARPS``; more get more warps, so that they fit registers."""

WIDE = 8
"""Stored chunks that are loaded before they are joined."""


def most_chunks(kv_heads: int) -> tuple[int, int]:
    """Return the chunks of a row until they reach ``LONG_CHUNK`` tokens, and the most that it has, in a model of ``kv_heads``."""
    times = max(1, min(MOST_TIMES, KV_HEADS // kv_heads))
    return times * CHUNKS, times * MOST_CHUNKS


def chunk_tokens(length: int, kv_heads: int = KV_HEADS) -> int:
    """Return the tokens of a chunk in a context of ``length``: a function of the row and the model alone."""
    few, most = (-(-length // (n * BLOCK)) * BLOCK for n in most_chunks(kv_heads))
    return max(CHUNK, min(few, LONG_CHUNK), most)


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
        self._few, self._most = most_chunks(kv_heads)
        self._span = SPAN if kv_heads < KV_HEADS else self._most
        spans = self._most // self._span
        shape = (max_rows, self._most + spans, kv_heads, q_heads // kv_heads)
        self._parts = torch.empty(*shape, head_dim, dtype=torch.float32, device=device)
        self._sums = torch.empty(*shape, 2, dtype=torch.float32, device=device)
        self._counters = torch.zeros(max_rows, spans + 1, kv_heads, dtype=torch.int32, device=device)
        self._indptr = torch.zeros(1, dtype=torch.int32, device=device)
        groups = 5
        if self.device.type == "cuda":
            sms = torch.cuda.get_device_properties(self.device).multi_processor_count
            groups = max(1, PROGRAMS_PER_SM * sms // kv_heads)
        # Of each group of programs, one a K/V head: the row and chunk it begins with, and how many chunks it takes.
        self._shares = torch.zeros(groups, 4, dtype=torch.int32, device=device)

    @staticmethod
    def supports(q_heads: int, kv_heads: int, head_dim: int) -> bool:
        """Return whether the kernel exists for this shape: head_dim a power of 2 up to 256, at most 64 query heads a K/V head (32 at 256)."""
        return supports(q_heads, kv_heads, head_dim)

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
        check_indptr("indptr", indptr, self._parts.device)
        rows = len(indptr) - 1
        if rows > self.max_rows:
            raise ValueError(f"indptr is of {rows} rows, more than {self.max_rows}")
        self._indptr = indptr
        if not use_triton(indptr):
            return
        from margingate_kernels.attention._triton_decode_attention import plan_kernel

        with on_device(indptr):
            plan_kernel[(len(self._shares),)](
                indptr, self._shares, rows,
                CHUNK=CHUNK, FEW=self._few, LONG=LONG_CHUNK, MOST=self._most, BLOCK=BLOCK, ROWS=power_of_2(self.max_rows), num_warps=1,
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
        if len(q) != len(self._indptr) - 1:
            raise ValueError(f"q must have {len(self._indptr) - 1} rows as planned, got {len(q)}")
        check_attention(q, k, v, indices, (self.q_heads, self.kv_heads, self.head_dim), self._parts.device)
        if not use_triton(q):
            return decode_attention_reference(q, k, v, self._indptr, indices, scale)
        return self._launch(q, k, v, indices, scale)

    def _launch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        from margingate_kernels.attention._triton_decode_attention import decode_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = self.q_heads // self.kv_heads
        dot_rows = max(16, power_of_2(group))
        sums = dot_rows * self.head_dim
        # Two loads in flight where three would not fit the shared memory of the cards that have least.
        warps, stages = WARPS * max(1, sums // WIDE_SUMS), STAGES if sums <= 2 * WIDE_SUMS else 2
        with on_device(q):
            decode_kernel[(len(self._shares) * self.kv_heads,)](
                q, k, v, indices, self._indptr, self._shares, out, self._parts, self._sums, self._counters,
                scale * math.log2(math.e), q.stride(0),
                KV_HEADS=self.kv_heads, GROUP=group, GROUP_P2=power_of_2(group), DOT_ROWS=dot_rows,
                DIM=self.head_dim, CHUNK=CHUNK, FEW=self._few, LONG=LONG_CHUNK, MOST=self._most, BLOCK=BLOCK, SPAN=self._span,
                STAGES=stages, WIDE=WIDE,
                num_warps=warps,
            )  # fmt: skip
        return out


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
