"""Causal prefill attention by FlashAttention-3, as the package ``sgl_kernel`` ships it, with every choice pinned.

SGLang's own default on Hopper, and a candidate for the canonical fast path's prefill beside
:mod:`margingate_kernels.attention.prefill_attention`: faster or as fast at every length (kernels/benchmarks/RESULTS.md). What its launcher would choose by the batch is fixed here:
one K/V split, query heads of a K/V head packed into one tile, and the longest request announced as always the same, so that no
smaller tile is taken for short ones. Over pages of one column it then cuts a context into blocks from its first column and walks them
from a token's last block down; where a tile begins decides which blocks need a mask, nothing else. That a token's bits therefore
depend on its own context alone is what tests and the trial at start-up look for.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from margingate_kernels.attention._inputs import check_attention, check_indptr

HEAD_DIMS = (64, 128)
"""Head sizes that are tried: SGLang's package has others too."""

LONGEST = 1 << 16
"""New tokens of a request that the launcher is told, whatever the batch."""


NEEDED = ("cache_batch_idx", "max_seqlen_q", "num_splits", "out", "pack_gqa", "page_table")
"""What the package's function must take: versions differ."""


@functools.cache
def _function() -> Any:
    """Return the package's function; ImportError where there is none for this machine, or one that cannot be pinned."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    known = inspect.signature(flash_attn_with_kvcache).parameters
    missing = [name for name in NEEDED if name not in known]
    if missing:
        raise ImportError(f"sgl_kernel's flash_attn_with_kvcache takes no {', '.join(missing)}")
    return flash_attn_with_kvcache


class Fa3PrefillAttention:
    """The same calls as :class:`margingate_kernels.PrefillAttention`, done by FlashAttention-3.

    Parameters
    ----------
    q_heads, kv_heads, head_dim
        Shape of the model's attention; see :meth:`supports`.
    device
        Where everything lives: a Hopper GPU.
    rows
        Above 0: outputs are written into one buffer of so many rows, zeros at first, and each call's is overwritten by the next.
        Rows of padding then hold finite leftovers; else what was in that memory. For CUDA graphs, whose rows are not known on the host.

    Raises
    ------
    ValueError
        The shape is not supported.
    """

    def __init__(self, q_heads: int, kv_heads: int, head_dim: int, device: torch.device | str, rows: int = 0) -> None:
        if not self.supports(q_heads, kv_heads, head_dim):
            raise ValueError(f"{q_heads} / {kv_heads} heads of {head_dim}: not supported")
        self._heads, self._rows = (q_heads, kv_heads, head_dim), rows
        self._queries = self._begins = self._lengths = torch.zeros(1, dtype=torch.int32, device=device)
        self._device = self._queries.device
        self._out: torch.Tensor | None = None

    @staticmethod
    def supports(q_heads: int, kv_heads: int, head_dim: int) -> bool:
        """Return whether it is used for this shape: heads of 64 or 128, at most 64 query heads a K/V head."""
        fits = head_dim in HEAD_DIMS
        return fits and kv_heads > 0 and q_heads % kv_heads == 0 and q_heads // kv_heads <= 64

    def plan(
        self, queries: torch.Tensor, columns: torch.Tensor, most_tokens: int, ends: torch.Tensor | None = None
    ) -> None:
        """Note the requests of the next calls; see :meth:`margingate_kernels.PrefillAttention.plan`.

        Raises
        ------
        ValueError
            A shape, dtype or device is wrong.
        """
        del most_tokens
        check_indptr("queries", queries, self._device)
        if ends is None:
            check_indptr("columns", columns, self._device)
            columns, ends = columns[:-1], columns[1:]
        if not len(columns) == len(ends) == len(queries) - 1:
            raise ValueError(f"columns and ends must be one shorter than queries, got {len(columns)}, {len(ends)}")
        self._queries, self._begins, self._lengths = queries, columns.contiguous(), ends - columns

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention's output: of ``q``'s shape, contiguous; see :class:`margingate_kernels.PrefillAttention`.

        Rows after the planned tokens are padding: they attend to nothing, and what they hold means nothing.

        Raises
        ------
        ValueError
            A shape, dtype or device is wrong.
        """
        check_attention(q, k, v, indices, self._heads, self._device)
        # A request's slots begin anywhere in `indices`: a table whose rows begin one place after each other holds them all.
        table = indices.as_strided((1, len(indices)), (1, 1))
        found: torch.Tensor = _function()(
            q, k[:, None], v[:, None], cu_seqlens_q=self._queries, max_seqlen_q=LONGEST, cache_seqlens=self._lengths,
            page_table=table, cache_batch_idx=self._begins, softmax_scale=scale, causal=True, num_splits=1, pack_gqa=True,
            out=self._output(q),
        )  # fmt: skip
        return found

    def _output(self, q: torch.Tensor) -> torch.Tensor | None:
        if not self._rows:
            return None
        if self._out is None:
            self._out = torch.zeros(self._rows, *q.shape[1:], dtype=q.dtype, device=q.device)
        return self._out[: len(q)]


def fa3_available(q_heads: int, kv_heads: int, head_dim: int) -> bool:
    """Return whether FlashAttention-3 can be tried here: Hopper, the package's kernels, a shape that it is used for."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        return False
    try:
        _function()
    except (ImportError, AttributeError, OSError, RuntimeError):
        return False
    return Fa3PrefillAttention.supports(q_heads, kv_heads, head_dim)
