"""The Triton kernel of :mod:`margingate_kernels.top2_margin`. Import only where Triton is installed.

One launch. A row is cut into SPLITS chunks, one program each; a program keeps the two best of every lane, reduces its
lanes, and leaves four numbers in the workspace. The program that arrives last at the row's counter combines the chunks
in index order and sets the counter back to 0, so that the workspace is ready for the next launch. Which program comes
last changes nothing: comparisons are exact and ties go to the lower index wherever they are decided.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # index of an empty place, above every token


@triton.jit
def _merge(v1, i1, v2, i2, w1, j1, w2, j2):
    """Two best of two pairs (value, index), each pair in order; ties to the lower index."""
    left = (v1 > w1) | ((v1 == w1) & (i1 < j1))
    best, best_index = tl.where(left, v1, w1), tl.where(left, i1, j1)
    # The runner-up is the loser of the two firsts or the second of the winner's side.
    a, a_index = tl.where(left, w1, v1), tl.where(left, j1, i1)
    b, b_index = tl.where(left, v2, w2), tl.where(left, i2, j2)
    take_a = (a > b) | ((a == b) & (a_index < b_index))
    return best, best_index, tl.where(take_a, a, b), tl.where(take_a, a_index, b_index)


@triton.jit
def _scan(pointer, start, V: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """Two best (v1, i1, v2, i2) of UNROLL * BLOCK logits from index ``start``.

    ``>`` is false for NaN and for -inf against the initial -inf, so neither ever enters; a lane sees rising indices, so
    ``>`` also keeps the lowest index of equals. Lanes remember the iteration, not the index: one register less to add.
    """
    lane = tl.arange(0, BLOCK)
    v1 = tl.full([BLOCK], float("-inf"), tl.float32)
    v2 = tl.full([BLOCK], float("-inf"), tl.float32)
    t1 = tl.full([BLOCK], -1, tl.int32)
    t2 = tl.full([BLOCK], -1, tl.int32)
    for t in tl.static_range(UNROLL):
        index = start + t * BLOCK + lane
        if MASKED:
            x = tl.load(pointer + index, mask=index < V, other=float("-inf")).to(tl.float32)
        else:
            x = tl.load(pointer + index).to(tl.float32)
        above_first = x > v1
        above_second = x > v2
        v2 = tl.where(above_first, v1, tl.where(above_second, x, v2))
        t2 = tl.where(above_first, t1, tl.where(above_second, t, t2))
        v1 = tl.where(above_first, x, v1)
        t1 = tl.where(above_first, t, t1)
    i1 = tl.where(t1 < 0, _NONE, start + t1 * BLOCK + lane)
    i2 = tl.where(t2 < 0, _NONE, start + t2 * BLOCK + lane)
    return tl.reduce((v1, i1, v2, i2), 0, _merge)


@triton.jit
def _finish(row, v1, i1, v2, i2, thresholds, threshold_stride, tokens, seconds, margins, triggers):
    """Write one row's result. Places that nothing above -inf took go to the lowest indices left."""
    token = tl.where(i1 == _NONE, 0, i1)
    second = tl.where(i2 == _NONE, tl.where(token == 0, 1, 0), i2)
    margin = v1 - v2
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, second.to(tl.int64))
    tl.store(margins + row, margin)
    trigger = (margin > tl.load(thresholds + row * threshold_stride)) == 0
    tl.store(triggers + row, trigger)


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
    values,  # float32 [rows, SPLITS, 2]
    indices,  # int32 [rows, SPLITS, 2]
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
    if start + BLOCK * UNROLL <= V:
        v1, i1, v2, i2 = _scan(pointer, start, V, BLOCK, UNROLL, False)
    else:
        v1, i1, v2, i2 = _scan(pointer, start, V, BLOCK, UNROLL, True)

    if SPLITS == 1:
        _finish(row, v1, i1, v2, i2, thresholds, threshold_stride, tokens, seconds, margins, triggers)
    else:
        part = (row * SPLITS + split) * 2
        tl.store(values + part, v1)
        tl.store(values + part + 1, v2)
        tl.store(indices + part, i1)
        tl.store(indices + part + 1, i2)
        tl.debug_barrier()
        # Release: the four numbers are visible before the count; acquire: the last program sees all of them.
        arrived = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            place = tl.arange(0, SPLITS_P2)
            used = place < SPLITS
            parts = (row * SPLITS + place) * 2
            # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
            a1 = tl.load(values + parts, mask=used, other=float("-inf"), cache_modifier=".cg")
            a2 = tl.load(values + parts + 1, mask=used, other=float("-inf"), cache_modifier=".cg")
            b1 = tl.load(indices + parts, mask=used, other=_NONE, cache_modifier=".cg")
            b2 = tl.load(indices + parts + 1, mask=used, other=_NONE, cache_modifier=".cg")
            v1, i1, v2, i2 = tl.reduce((a1, b1, a2, b2), 0, _merge)
            _finish(row, v1, i1, v2, i2, thresholds, threshold_stride, tokens, seconds, margins, triggers)
            tl.store(counters + row, 0)
