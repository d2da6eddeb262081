"""The draw of a batch's rows, greedy and seeded together."""

from __future__ import annotations

from typing import NamedTuple

import torch

from margingate_kernels._backend import on_device, use_triton
from margingate_kernels.choice.rows import Workspace, check_logits, power_of_two
from margingate_kernels.seeded.draw import WORDS, Drawn, draw_reference
from margingate_kernels.seeded.noise import BLOCK, GROUP

_AT_ONCE = 2048
"""Programs of 128 threads that a GPU of 128 multiprocessors holds."""


class _Split(NamedTuple):
    """How a row is cut into programs. Comparisons are exact, so no cut changes a result: only the time depends on it."""

    block: int
    groups: int
    warps: int
    splits: int


def _split(vocab: int, rows: int) -> _Split:
    """Return the launch constants of the kernel without filters, for ``rows`` rows of ``vocab`` logits (``bench_draw.py --tune``).

    A lane is a thread: with more lanes than threads, Triton would move every word between threads. Few rows are spread over as many
    threads as they can be; many fill a GPU most evenly with the smallest programs that it holds at once.
    """
    block, groups, warps = 256, 1, 8
    if rows >= 32:
        block, warps = 128, 4
        groups = 1 if rows * -(-vocab // GROUP) <= _AT_ONCE else 2
    return _Split(block, groups, warps, -(-vocab // (groups * GROUP)))


def draw(
    logits: torch.Tensor, packed: torch.Tensor, filtered: bool = True, workspace: Workspace | None = None,
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
    work = workspace or Workspace(rows, vocab, logits.device)
    work.check(logits)
    if out is None:
        out = Drawn(*work.out(rows)[:3])
    if rows:
        _launch(logits, packed, filtered, work, out)
    return out


def _check(logits: torch.Tensor, packed: torch.Tensor) -> None:
    check_logits(logits)
    if packed.shape != (len(logits), WORDS) or packed.dtype != torch.int32 or not packed.is_contiguous():
        raise ValueError(f"packed must be int32 [{len(logits)}, {WORDS}], got {packed.dtype} {tuple(packed.shape)}")
    if packed.device != logits.device:
        raise ValueError(f"packed is on {packed.device}, logits on {logits.device}")


_FILTER_BLOCK, _FILTER_WARPS = 4096, 16


def _launch(logits: torch.Tensor, packed: torch.Tensor, filtered: bool, work: Workspace, out: Drawn) -> None:
    from margingate_kernels.seeded._triton import draw_kernel
    from margingate_kernels.seeded._triton_filtered import filtered_kernel

    rows, vocab = logits.shape
    block, groups, warps, splits = _split(vocab, rows)
    steps = groups * GROUP // block
    # Fused multiply-adds would give other bits than the reference's.
    exact = {"enable_fp_fusion": False}
    with on_device(logits):
        draw_kernel[(rows * splits,)](
            logits, logits.stride(0), packed, *out, work.keys, work.counters, V=vocab, BLOCK=block, GROUPS=groups,
            HALVES=BLOCK // block, STEPS=steps, SPLITS=splits,
            SPLITS_P2=power_of_two(splits), SOME_FILTERED=filtered, num_warps=warps, **exact,
        )  # fmt: skip
        if filtered:
            filtered_kernel[(rows,)](
                logits, logits.stride(0), packed, *out, V=vocab, BLOCK=_FILTER_BLOCK, num_warps=_FILTER_WARPS, **exact
            )
