"""The sum over ranks in their order, of parts that were gathered: accumulated in fp32, rounded once.

What a library adds up on its way between GPUs, it adds up in an order that it chooses by size. Gathering moves bits and adds
nothing, so a sum of gathered parts has one order at every size; the price is that every rank receives every part whole.
"""

from __future__ import annotations

import torch

from margingate_kernels._backend import on_device, use_triton

BLOCK = 1024


def rank_sum(parts: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``parts`` over its first dimension, in order.

    Parameters
    ----------
    parts
        [ranks, ...], bfloat16, float16 or float32, contiguous.

    Returns
    -------
    torch.Tensor
        [...] of the same dtype. No host sync; a CUDA graph may capture it.

    Raises
    ------
    ValueError
        ``parts`` is not contiguous, has no rank, or has another dtype.
    """
    if parts.dim() < 2 or not len(parts) or not parts.is_contiguous():
        raise ValueError(f"parts must be contiguous [ranks, ...], got {tuple(parts.shape)}")
    if parts.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"parts must be bfloat16, float16 or float32, got {parts.dtype}")
    if not use_triton(parts):
        return rank_sum_reference(parts)
    from margingate_kernels.memory._triton_rank_sum import rank_sum_kernel

    out = torch.empty_like(parts[0])
    if out.numel():
        with on_device(parts):
            rank_sum_kernel[(-(-out.numel() // BLOCK),)](
                parts, out, out.numel(), RANKS=len(parts), BLOCK=BLOCK, num_warps=4
            )
    return out


def rank_sum_reference(parts: torch.Tensor) -> torch.Tensor:
    """Compute :func:`rank_sum` with plain PyTorch."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts.dtype)
