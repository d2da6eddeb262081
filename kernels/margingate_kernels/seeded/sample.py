"""The draw of a batch's rows, greedy and seeded together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from margingate_kernels._backend import on_device, use_triton
from margingate_kernels.seeded.draw import WORDS, Drawn, draw_reference
from margingate_kernels.seeded.noise import BLOCK, GROUP

_DTYPES = (torch.float32, torch.bfloat16)


class _Split(NamedTuple):
    """How a row is cut into programs. Comparisons are exact, so no cut changes a result: only the time depends on it."""

    block: int
    groups: int
    warps: int
    splits: int


def _split(vocab: int, rows: int) -> _Split:
    """Return the launch constants of the kernel without filters, for ``rows`` rows of ``vocab`` logits."""
    block, groups, warps = (512, 1, 4) if vocab > 8192 else (256, 1, 2)
    if rows >= 64 and vocab > 65536:
        block, groups, warps = 1024, 4, 8
    return _Split(block, groups, warps, -(-vocab // (groups * GROUP)))


class DrawWorkspace:
    """Buffers for :func:`draw`, made once so that the hot path allocates nothing.

    Results are views of the workspace: the next call with it overwrites them. Calls that share a workspace must be ordered.

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
        # Few rows are cut into most programs, and any cut of more rows needs no more room for each.
        self.keys = torch.empty((max_rows, _split(vocab, 1).splits, 2), dtype=torch.int64, device=device)
        self.counters = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.out = Drawn(
            torch.empty(max_rows, dtype=torch.int64, device=device),
            torch.empty(max_rows, dtype=torch.int64, device=device),
            torch.empty(max_rows, dtype=torch.float32, device=device),
        )


def draw(
    logits: torch.Tensor, packed: torch.Tensor, filtered: bool = True, workspace: DrawWorkspace | None = None,
    out: Drawn | None = None,
) -> Drawn:  # fmt: skip
    """Draw the token of each row with its runner-up and margin, without a host sync.

    On a GPU with Triton one pass over the logits, and one program for each row with filters; elsewhere
    :func:`~.draw.draw_reference`. Both give the same bits, and a row's result depends on that row alone: not on B, its place in the batch
    or its neighbours' parameters.

    Parameters
    ----------
    logits
        [B, V], float32 or bfloat16, V >= 2, unit stride along V (the row stride may be larger). -inf masks a token.
    packed
        [B, 12], int32, of :func:`~.draw.pack`, on the device of the logits.
    filtered
        Whether some row has a filter; False saves a launch.
    workspace
        Buffers to reuse.
    out
        Takes the result; by default the workspace's own.

    Returns
    -------
    Drawn
        What was drawn.
    """
    _check(logits, packed)
    if not use_triton(logits):
        found = draw_reference(logits, packed)
        if out is None:
            return found
        for target, source in zip(out, found):
            target.copy_(source)
        return out
    rows, vocab = logits.shape
    work = workspace or DrawWorkspace(rows, vocab, logits.device)
    if rows > work.max_rows or vocab != work.vocab or logits.device != work.device:
        raise ValueError(
            f"a workspace for {work.max_rows} rows of {work.vocab} on {work.device} "
            f"does not fit logits {tuple(logits.shape)} on {logits.device}"
        )
    if out is None:
        out = Drawn(*(t[:rows] for t in work.out))
    if rows:
        _launch(logits, packed, filtered, work, out)
    return out


def _check(logits: torch.Tensor, packed: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [B, V] with V >= 2, got {tuple(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits must be float32 or bfloat16, got {logits.dtype}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have unit stride along V, got strides {logits.stride()}")
    if packed.shape != (len(logits), WORDS) or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise ValueError(f"packed must be int32 [{len(logits)}, {WORDS}], got {packed.dtype} {tuple(packed.shape)}")
    if packed.device != logits.device:
        raise ValueError(f"packed is on {packed.device}, logits on {logits.device}")


_FILTER_BLOCK, _FILTER_WARPS = 4096, 16


def _launch(logits: torch.Tensor, packed: torch.Tensor, filtered: bool, work: DrawWorkspace, out: Drawn) -> None:
    from margingate_kernels.seeded._triton import draw_kernel, filtered_kernel

    rows, vocab = logits.shape
    block, groups, warps, splits = _split(vocab, rows)
    steps = groups * GROUP // block
    # Fused multiply-adds would give other bits than the reference's.
    exact = {"enable_fp_fusion": False}
    with on_device(logits):
        draw_kernel[(rows * splits,)](
            logits, logits.stride(0), packed, *out, work.keys, work.counters, V=vocab, BLOCK=block, GROUPS=groups,
            HALVES=BLOCK // block, STEPS=steps, STEPS_P2=_power_of_two(steps), SPLITS=splits,
            SPLITS_P2=_power_of_two(splits), num_warps=warps, **exact,
        )  # fmt: skip
        if filtered:
            filtered_kernel[(rows,)](
                logits, logits.stride(0), packed, *out, V=vocab, BLOCK=_FILTER_BLOCK, num_warps=_FILTER_WARPS, **exact
            )


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
