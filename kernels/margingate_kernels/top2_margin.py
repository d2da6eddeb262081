"""Argmax, runner-up and margin of each row of logits, with ties to the lowest index."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Top2(NamedTuple):
    """Result of :func:`top2_margin`; every tensor has shape [B] and lies on the device of the logits."""

    token: torch.Tensor
    """int64: argmax, the lowest index among exact ties."""
    second: torch.Tensor
    """int64: argmax of the rest, the lowest index among exact ties."""
    margin: torch.Tensor
    """float32: top-1 minus top-2 in fp32; 0 for a tie, NaN where the row has no finite maximum."""
    trigger: torch.Tensor
    """bool: not (margin > threshold), so ties and NaN always trigger."""


def top2_margin_reference(logits: torch.Tensor, thresholds: torch.Tensor) -> Top2:
    """Compute :func:`top2_margin` with plain PyTorch.

    Parameters
    ----------
    logits
        [B, V], float32 or bfloat16. -inf (masked tokens) is allowed; a NaN counts as the smallest value.
    thresholds
        [B], float32, in logits.

    Returns
    -------
    Top2
        A row's result depends on that row alone.
    """
    values = torch.nan_to_num(logits.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    top, token = values.max(dim=-1)
    # max returns the first maximum on the CPU; masking it leaves the runner-up, again the first of its equals.
    rest = values.scatter(-1, token.unsqueeze(-1), float("-inf"))
    next_best, second = rest.max(dim=-1)
    # With a single unmasked token every other entry is -inf and second would repeat an arbitrary index.
    margin = top - next_best
    return Top2(token, second, margin, ~(margin > thresholds))


def top2_margin(logits: torch.Tensor, thresholds: torch.Tensor) -> Top2:
    """Return argmax, runner-up, margin and trigger mask of each row.

    See :func:`top2_margin_reference` for shapes and meanings.
    """
    return top2_margin_reference(logits, thresholds)
