"""Our prefill attention behind the interface that SGLang's FlashInfer backend expects of its paged prefill wrapper."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from margingate_kernels import PrefillAttention, prefill_attention_reference

log = logging.getLogger(__name__)

TRIAL = ((0, 70), (40, 1), (33, 20))
"""Requests that the kernel is tried on: cached tokens, new ones."""


def prefill_works(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> bool:
    """Return whether the kernel agrees with its reference on this machine; say why where it does not.

    The other trials at start-up look for bits that change, not for right ones, and this Triton may be new to us.
    """
    q_heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(6)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    def ends(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    new, columns = [n for _, n in TRIAL], [cached + n for cached, n in TRIAL]
    slots = torch.randperm(sum(columns), generator=generator).int().to(device)
    q, k, v = draw(sum(new), q_heads, dim), draw(sum(columns), kv_heads, dim), draw(sum(columns), kv_heads, dim)
    try:
        attend = PrefillAttention(*shape, device)
        attend.plan(ends(new), ends(columns), len(slots))
        got = attend(q, k, v, slots, dim**-0.5)
        want = prefill_attention_reference(q, k, v, ends(new), ends(columns), slots, dim**-0.5)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
    except Exception as error:  # Triton's own errors share no class: too little shared memory, an unknown GPU
        log.warning("margingate: our prefill attention does not work here: %s", " ".join(str(error).split())[:300])
        return False
    return True


class PagedPrefill:
    """What SGLang uses of ``flashinfer.BatchPrefillWithPagedKVCacheWrapper``.

    Parameters
    ----------
    q_heads, kv_heads, head_dim, device
        See :class:`margingate_kernels.PrefillAttention`.
    """

    is_cuda_graph_enabled = False

    def __init__(self, q_heads: int, kv_heads: int, head_dim: int, device: torch.device | str) -> None:
        self._attend = PrefillAttention(q_heads, kv_heads, head_dim, device)
        self._slots = torch.empty(0)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        _last_page_len: torch.Tensor,
        _q_heads: int,
        _kv_heads: int,
        _head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        non_blocking: bool = True,
        **rest: Any,
    ) -> None:
        """Plan a prefill of requests whose contexts are ``kv_indices[kv_indptr[r]:kv_indptr[r + 1]]``.

        Raises
        ------
        ValueError
            SGLang asks for something that a causal prefill over pages of one token is not.
        """
        odd = sorted(name for name, value in rest.items() if value is not None and value != 0)
        if odd or page_size != 1 or q_data_type != kv_data_type:
            raise ValueError(f"prefill attention knows no {', '.join(odd) or f'pages of {page_size} {kv_data_type}'}")
        self._attend.plan(qo_indptr, kv_indptr, len(kv_indices))
        self._slots = kv_indices

    def forward(
        self, q: torch.Tensor, kv_cache: tuple[torch.Tensor, torch.Tensor], *, causal: bool, sm_scale: float, **_: Any
    ) -> torch.Tensor:
        """Attend; ``q`` is [tokens, q_heads, head_dim], the pool's K and V [slots, kv_heads, head_dim]."""
        if not causal:
            raise ValueError("prefill attention is causal")
        return self._attend(q, *kv_cache, self._slots, sm_scale)
