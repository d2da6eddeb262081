"""What the kernels that choose a token of each row share: the result, the workspace, the checks of the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16)

LEAST = 256
"""Logits that a program of any kernel takes at least, so that one workspace has room for each cut of a row."""


class Top2(NamedTuple):
    """Result of :func:`~.top2_margin.top2_margin`; every tensor has shape [B] and lies on the device of the logits."""

    token: torch.Tensor
    """int64: argmax, the lowest index among exact ties."""
    second: torch.Tensor
    """int64: argmax of the rest, the lowest index among exact ties; never equal to ``token``."""
    margin: torch.Tensor
    """float32: top-1 minus top-2 in fp32. 0 for a tie, inf beside a single unmasked token, NaN where both are +inf or
    both -inf."""
    trigger: torch.Tensor
    """bool: not (margin > threshold), so ties and NaN always trigger."""


def empty_top2(rows: int, device: torch.device | str) -> Top2:
    """Allocate uninitialised result buffers for ``rows`` rows."""
    return Top2(
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.bool, device=device),
    )


class Workspace:
    """Buffers for ``top2_margin`` and for the seeded ``draw``, made once so that the hot path allocates nothing.

    Results are views of the workspace: the next call with it, of either kind, overwrites them. Calls that share a workspace must be
    ordered (one stream, or one CUDA graph at a time).

    Parameters
    ----------
    max_rows
        Largest B.
    vocab
        V of the logits.
    device
        Device of the logits.
    """

    def __init__(self, max_rows: int, vocab: int, device: torch.device | str) -> None:
        if max_rows < 0 or vocab < 2:
            raise ValueError(f"need max_rows >= 0 and vocab >= 2, got {max_rows} and {vocab}")
        self.max_rows, self.vocab = max_rows, vocab
        self.device = torch.empty(0, device=device).device
        self.keys = torch.empty((max_rows, -(-vocab // LEAST), 2), dtype=torch.int64, device=device)
        self.counters = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._out = empty_top2(max_rows, device)
        self._views: dict[int, Top2] = {}

    def out(self, rows: int) -> Top2:
        """Return the result buffers of the first ``rows`` rows."""
        if rows not in self._views:
            self._views[rows] = Top2(*(t[:rows] for t in self._out))
        return self._views[rows]

    def check(self, logits: torch.Tensor) -> None:
        """Raise ValueError where logits do not fit."""
        if len(logits) > self.max_rows or logits.shape[1] != self.vocab or logits.device != self.device:
            raise ValueError(
                f"a workspace for {self.max_rows} rows of {self.vocab} on {self.device} "
                f"does not fit logits {tuple(logits.shape)} on {logits.device}"
            )


def check_logits(logits: torch.Tensor) -> None:
    """Raise ValueError or TypeError for logits that no kernel takes: [B, V], float32 or bfloat16, V >= 2, unit stride along V."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, V] with V >= 2, got {tuple(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be float32 or bfloat16, got {logits.dtype}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have unit stride along V, got strides {logits.stride()}")


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
