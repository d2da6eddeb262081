"""The Triton kernel of :mod:`.top2_margin`. Import only where Triton is installed.

One launch. A row is cut into SPLITS chunks, one program each. Lane l of a program sees the chunk's logits l, l + BLOCK,
l + 2 * BLOCK, ... and keeps their maximum and where it was: three instructions a logit, where a running top-2 takes
eight and would not hide behind the loads. The chunk's runner-up is then the best of the other lanes' maxima and of the
winning lane's other logits, which are read once more (UNROLL of them). The programs of a row meet in
:func:`._triton_rows.arrive`.

The time of a short row is latency, not bandwidth (RESULTS.md), so what can run early does: the thresholds are read
first, and the other lanes are reduced while the second look is in flight.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from margingate_kernels.choice._triton_rows import NONE, NOTHING, arrive, index_of, key_of, write


@triton.jit
def _scan(pointer, start, V: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """Return the key of each lane's maximum; its index is NONE where nothing is above -inf.

    ``>`` is false for NaN, and for -inf against the initial -inf, so neither ever enters; a lane sees rising indices, so
    ``>`` also keeps the lowest index of equals.
    """
    lane = tl.arange(0, BLOCK)
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    step = tl.full([BLOCK], -1, tl.int32)
    for t in tl.static_range(UNROLL):
        index = start + t * BLOCK + lane
        if MASKED:
            x = tl.load(pointer + index, mask=index < V, other=float("-inf")).to(tl.float32)
        else:
            x = tl.load(pointer + index).to(tl.float32)
        above = x > value
        value = tl.where(above, x, value)
        step = tl.where(above, t, step)
    return key_of(value, tl.where(step < 0, NONE, start + step * BLOCK + lane))


@triton.jit
def top2_kernel(
    logits,
    row_stride,
    thresholds,
    threshold_stride,
    tokens,
    seconds,
    margins,
    triggers,
    keys,  # int64 [rows, SPLITS, 2]
    counters,  # int32 [rows], 0 between launches
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
):
    """Program (row, split) = divmod(program id, SPLITS)."""
    program = tl.program_id(0)
    row = (program // SPLITS).to(tl.int64)
    split = program % SPLITS
    pointer = logits + row * row_stride
    start = split * (BLOCK * UNROLL)
    threshold = tl.load(thresholds + row * threshold_stride)
    if start + BLOCK * UNROLL <= V:
        lanes = _scan(pointer, start, V, BLOCK, UNROLL, False)
    else:
        lanes = _scan(pointer, start, V, BLOCK, UNROLL, True)
    first = tl.max(lanes, 0)
    i1 = index_of(first)
    # The winning lane once more, without its maximum.
    lane = tl.where(i1 == NONE, 0, (i1 - start) % BLOCK)
    again = start + lane + tl.arange(0, UNROLL) * BLOCK
    x = tl.load(pointer + again, mask=(again < V) & (again != i1), other=float("-inf")).to(tl.float32)
    others = tl.max(tl.where(lanes == first, NOTHING, lanes), 0)
    valid = x > float("-inf")
    same_lane = tl.max(key_of(tl.where(valid, x, float("-inf")), tl.where(valid, again, NONE)), 0)
    runner_up = tl.maximum(others, same_lane)

    last, first, runner_up = arrive(row, split, first, runner_up, keys, counters, SPLITS, SPLITS_P2)
    if last:
        margin = write(row, first, runner_up, tokens, seconds, margins)
        tl.store(triggers + row, (margin > threshold) == 0)
