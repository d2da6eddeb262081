"""Argmax, runner-up and margin of each row of logits, with ties to the lowest index."""

from __future__ import annotations

import math
from array import array
from typing import NamedTuple

import torch

from margingate_kernels._backend import on_device, use_triton
from margingate_kernels.choice.rows import Top2, Workspace, check_logits, empty_top2, power_of_two


class _Split(NamedTuple):
    """How a row is cut into programs. Comparisons are exact, so no cut changes a result: only the time depends on it."""

    block: int
    unroll: int
    warps: int
    splits: int


def _split(vocab: int, rows: int) -> _Split:
    """Return the launch constants for ``rows`` rows of ``vocab`` logits (chosen by ``bench_top2_margin.py --tune``)."""
    block, unroll, warps = (512, 8, 4) if vocab > 8192 else (256, 4, 2)
    if rows >= 64 and vocab > 65536:  # enough rows to fill a GPU with few programs each, so fewer results are combined
        block, unroll, warps = 1024, 32, 8
    return _Split(block, unroll, warps, -(-vocab // (block * unroll)))


def top2_margin_reference(logits: torch.Tensor, thresholds: torch.Tensor) -> Top2:
    """Compute :func:`top2_margin` with plain PyTorch.

    Parameters
    ----------
    logits
        [B, V], float32 or bfloat16, V >= 2. -inf (masked tokens) and +inf are allowed; a NaN counts as -inf.
    thresholds
        [B], float32, in logits.

    Returns
    -------
    Top2
        A row's result depends on that row alone.
    """
    values = torch.nan_to_num(logits.float(), nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # max returns the first maximum; masking it leaves the runner-up, again the first of its equals.
    top, token = values.max(dim=-1)
    next_best, second = values.scatter(-1, token.unsqueeze(-1), float("-inf")).max(dim=-1)
    # Where nothing but the top lies above -inf, the second max may find the masked place itself.
    second = torch.where(second == token, (token == 0).long(), second)
    margin = top - next_best
    return Top2(token, second, margin, ~(margin > thresholds))


def _is_quick(logits: torch.Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and len(logits) > 0


def top2_host(logits: torch.Tensor) -> tuple[torch.Tensor, list[int], list[float]]:
    """Return token (int64 [B]), runner-up and margin of each row of CPU logits, the same as the reference's.

    For a decode step: the tokens go on into the next forward, the rest is for the host. The forward before has emptied
    the core's caches, so each further *kind* of operation costs 10 to 20 us of misses, many times its own work: this
    makes do with NumPy's argmax, which takes the first of equals too, and plain Python. The logits are changed on the
    way and put back. Rows with infinities or NaN go the long way.
    """
    if _is_quick(logits):
        values = logits.numpy()
        token = torch.from_numpy(values.argmax(axis=1))
        places = list(enumerate(token.tolist()))
        best = [values.item(place) for place in places]
        for place in places:
            values[place] = -math.inf
        second = values.argmax(axis=1).tolist()
        gaps = [top - values.item(place) for top, place in zip(best, enumerate(second))]
        for place, top in zip(places, best):
            values[place] = top
        margin = array("f", gaps).tolist()  # an fp64 difference of fp32 numbers, rounded, is their fp32 difference
        if all(map(math.isfinite, margin)):
            return token, second, margin
    top2 = top2_margin_reference(logits, torch.zeros(len(logits)))
    return top2.token, top2.second.tolist(), top2.margin.tolist()


def _top2_quick(logits: torch.Tensor, thresholds: torch.Tensor) -> Top2:
    token, second, margin = top2_host(logits)
    gap = torch.tensor(margin, dtype=torch.float32)
    return Top2(token, torch.tensor(second), gap, ~(gap > thresholds))


def top2_margin(
    logits: torch.Tensor,
    thresholds: torch.Tensor,
    *,
    workspace: Workspace | None = None,
    out: Top2 | None = None,
) -> Top2:
    """Return argmax, runner-up, margin and trigger mask of each row, in one launch and without a host sync.

    On a GPU with Triton this is one pass over the logits; elsewhere it is :func:`top2_margin_reference`. Both give the
    same numbers, and a row's result depends on that row alone: not on B, its place in the batch or its neighbours.

    Parameters
    ----------
    logits
        [B, V], float32 or bfloat16, V >= 2, unit stride along V (the row stride may be larger).
    thresholds
        [B], float32, in logits.
    workspace
        Buffers to reuse. Without it each call allocates its own, which a CUDA graph may capture too.
    out
        Result buffers; by default those of the workspace, else new ones.

    Returns
    -------
    Top2
        See :class:`Top2` for NaN and infinities.
    """
    _check(logits, thresholds)
    rows, vocab = logits.shape
    if workspace is not None:
        workspace.check(logits)
    if out is None and workspace is not None:
        out = workspace.out(rows)
    if not use_triton(logits):
        result = (_top2_quick if _is_quick(logits) else top2_margin_reference)(logits, thresholds)
        if out is None:
            return result
        for target, source in zip(out, result):
            target.copy_(source)
        return out
    if out is None:
        out = empty_top2(rows, logits.device)
    if rows:
        _launch(logits, thresholds, workspace or Workspace(rows, vocab, logits.device), out)
    return out


def _check(logits: torch.Tensor, thresholds: torch.Tensor) -> None:
    check_logits(logits)
    if thresholds.shape != logits.shape[:1] or thresholds.dtype != torch.float32:
        raise ValueError(
            f"thresholds must be float32 [{logits.shape[0]}], got {thresholds.dtype} {tuple(thresholds.shape)}"
        )
    if thresholds.device != logits.device:
        raise ValueError(f"thresholds are on {thresholds.device}, logits on {logits.device}")


def _launch(logits: torch.Tensor, thresholds: torch.Tensor, work: Workspace, out: Top2) -> None:
    from margingate_kernels.choice._triton_top2 import top2_kernel

    block, unroll, warps, splits = _split(logits.shape[1], len(logits))
    with on_device(logits):
        top2_kernel[(len(logits) * splits,)](
            logits,
            logits.stride(0),
            thresholds,
            thresholds.stride(0),
            *out,
            work.keys,
            work.counters,
            V=logits.shape[1],
            BLOCK=block,
            UNROLL=unroll,
            SPLITS=splits,
            SPLITS_P2=power_of_two(splits),
            num_warps=warps,
        )
