"""Causal prefill attention over paged K/V in which a token's bits depend on its own context alone.

Whatever shares the forward, however a prompt is cut into chunks and however much of it was cached: a token's context is
read from its first column in blocks of one size, and nothing else enters. No plan on the host, so no wait for the GPU.

It exists because FlashInfer's Hopper prefill (fa3, to 0.6.15 at least) is not repeatable: docs/fast-path.md.
"""

from __future__ import annotations

import itertools
import math

import torch

from margingate_kernels._backend import on_device, use_triton
from margingate_kernels.attention._inputs import check_attention, check_indptr, power_of_2, supports

ROWS = 128
"""Rows of a tile: tokens times the query heads of a K/V head (rounded up to a power of 2)."""

BLOCK = 32
"""Columns of K/V that a program reads at once."""

WARPS, STAGES, FEW_STAGES = 4, 5, 3
WIDE_HEAD_ROWS = 64
"""Rows of a tile for heads of more than 128: a program's sums of ``ROWS`` rows would fit neither registers nor shared memory."""

STAGES_BYTES = 160 * 1024
"""Shared memory of a multiprocessor from which on there are ``STAGES`` loads in flight, for heads of up to 128; else ``FEW_STAGES``."""

PLAN = 128
"""Tiles that the plan writes at once."""


class PrefillAttention:
    """Attention of the new tokens of several requests over their paged contexts, grouped-query, causal.

    First :meth:`plan` with the batch's requests, then one call for every layer.

    Parameters
    ----------
    q_heads, kv_heads, head_dim
        Shape of the model's attention; see :meth:`supports`.
    device
        Where everything lives.
    shared_sm
        Bytes of shared memory of a multiprocessor; by default the device's.

    Raises
    ------
    ValueError
        The shape is not supported.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, head_dim: int, device: torch.device | str, *, shared_sm: int | None = None
    ) -> None:
        if not self.supports(q_heads, kv_heads, head_dim):
            raise ValueError(f"{q_heads} / {kv_heads} heads of {head_dim}: not supported")
        self.q_heads, self.kv_heads, self.head_dim = q_heads, kv_heads, head_dim
        self.device = torch.device(device)
        self._count = torch.zeros(2, dtype=torch.int32, device=device)
        self._tiles = torch.zeros(0, 4, dtype=torch.int32, device=device)
        self._queries = self._begins = self._ends = torch.zeros(1, dtype=torch.int32, device=device)
        if shared_sm is None:
            on_gpu = self.device.type == "cuda"
            shared_sm = torch.cuda.get_device_properties(self.device).shared_memory_per_multiprocessor if on_gpu else 0
        self._stages = STAGES if shared_sm >= STAGES_BYTES and head_dim <= 128 else FEW_STAGES

    @staticmethod
    def supports(q_heads: int, kv_heads: int, head_dim: int) -> bool:
        """Return whether the kernel exists for this shape: head_dim a power of 2 up to 256, at most 64 query heads a K/V head (32 at 256)."""
        return supports(q_heads, kv_heads, head_dim)

    def plan(
        self, queries: torch.Tensor, columns: torch.Tensor, most_tokens: int, ends: torch.Tensor | None = None
    ) -> None:
        """Cut the requests of the next calls into tiles. Nothing is read on the host, so a CUDA graph may hold it.

        Parameters
        ----------
        queries
            int32 [requests + 1]: request r's new tokens are rows ``queries[r]`` to ``queries[r + 1]`` of ``q``.
        columns
            int32 [requests + 1]: its context, the new tokens last, lies in ``indices[columns[r]:columns[r + 1]]``. Values
            are not checked: that needs a sync.
        most_tokens
            At least ``queries[-1]``, and the rows of ``q``; more costs a little memory.
        ends
            int32 [requests]: contexts lie apart from each other, in ``indices[columns[r]:ends[r]]``, and ``columns`` is as
            long as ``ends``.

        Raises
        ------
        ValueError
            A shape, dtype or device is wrong.
        """
        check_indptr("queries", queries, self._count.device)
        if ends is None:
            check_indptr("columns", columns, self._count.device)
            if len(columns) != len(queries):
                raise ValueError(f"columns must be as long as queries, {len(queries)}, got {len(columns)}")
            columns, ends = columns[:-1], columns[1:]
        elif len(columns) != len(queries) - 1 or len(ends) != len(columns):
            raise ValueError(f"columns and ends must be one shorter than queries, got {len(columns)}, {len(ends)}")
        elif {(t.dtype, t.device, t.is_contiguous()) for t in (columns, ends)} != {
            (torch.int32, self._count.device, True)
        }:
            raise ValueError(f"columns and ends must be int32, contiguous and on {self._count.device}")
        self._queries, self._begins, self._ends = queries, columns, ends
        if not use_triton(queries):
            return
        from margingate_kernels.attention._triton_prefill_attention import plan_kernel

        requests, tokens = len(queries) - 1, self._tile_tokens()
        self._tiles = torch.empty(-(-most_tokens // tokens) + requests, 4, dtype=torch.int32, device=queries.device)
        with on_device(queries):
            plan_kernel[(requests,)](
                queries, columns, ends, self._tiles, self._count, requests,
                TOKENS=tokens, REQUESTS=power_of_2(requests), WIDE=PLAN, num_warps=1,
            )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention's output: of ``q``'s shape, contiguous.

        Parameters
        ----------
        q
            [rows, q_heads, head_dim], bfloat16 or float16, each row contiguous; as many as tokens were planned. Further
            rows are padding: they attend to nothing and give zeros.
        k, v
            The pool: [slots, kv_heads, head_dim] of the same dtype, contiguous. Finite in every slot of a context.
        indices
            int32: slots in the order of their positions.
        scale
            Of the logits, above 0; mostly 1 / sqrt(head_dim).

        Raises
        ------
        ValueError
            A shape, dtype or device is wrong.
        """
        check_attention(q, k, v, indices, (self.q_heads, self.kv_heads, self.head_dim), self._count.device)
        if not use_triton(q):
            return _reference(q, k, v, self._queries, self._begins, self._ends, indices, scale)
        from margingate_kernels.attention._triton_prefill_attention import prefill_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        group = self.q_heads // self.kv_heads
        tiles = min(len(self._tiles), -(-len(q) // self._tile_tokens()) + len(self._queries) - 1)
        with on_device(q):
            prefill_kernel[(tiles * self.kv_heads,)](
                q, k, v, indices, self._tiles, self._count, out, scale * math.log2(math.e), q.stride(0),
                len(q),
                KV_HEADS=self.kv_heads, GROUP=group, GROUP_P2=power_of_2(group), ROWS=self._rows(), DIM=self.head_dim,
                BLOCK=BLOCK, STAGES=self._stages, num_warps=WARPS,
            )  # fmt: skip
        return out

    def _tile_tokens(self) -> int:
        return self._rows() // power_of_2(self.q_heads // self.kv_heads)

    def _rows(self) -> int:
        return ROWS if self.head_dim <= 128 else WIDE_HEAD_ROWS


def prefill_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    columns: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute the same in float32 with plain PyTorch."""
    return _reference(q, k, v, queries, columns[:-1], columns[1:], indices, scale)


def _reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    group = q.shape[1] // k.shape[1]
    for (first, last), begin, end in zip(itertools.pairwise(queries.tolist()), begins.tolist(), ends.tolist()):
        slots = indices[begin:end].long()
        keys, values = (pool[slots].float().repeat_interleave(group, dim=1) for pool in (k, v))
        logits = torch.einsum("qhd,thd->hqt", q[first:last].float(), keys).mul_(scale)
        position = torch.arange(end - begin - (last - first), end - begin, device=q.device)
        logits.masked_fill_(torch.arange(end - begin, device=q.device)[None] > position[:, None], float("-inf"))
        out[first:last] = torch.einsum("hqt,thd->qhd", logits.softmax(dim=-1), values).to(q.dtype)
    return out
