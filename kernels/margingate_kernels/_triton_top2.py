"""The Triton kernel of :mod:`margingate_kernels.top2_margin`. Import only where Triton is installed.

One launch. A row is cut into SPLITS chunks, one program each. Lane l of a program sees the chunk's logits l, l + BLOCK,
l + 2 * BLOCK, ... and keeps their maximum and where it was: three instructions a logit, where a running top-2 takes
eight and would not hide behind the loads. The chunk's runner-up is then the best of the other lanes' maxima and of the
winning lane's other logits, which are read once more (UNROLL of them). The program leaves four numbers in the
workspace; the one that arrives last at the row's counter combines the chunks and sets the counter back to 0, so that
the workspace is ready for the next launch. Which program comes last changes nothing: comparisons are exact, and ties go
to the lower index wherever they are decided.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # index of an empty place, above every token


@triton.jit
def _best(value, index):
    """Largest value and the lowest index that has it. No value may be NaN."""
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, index, _NONE), 0)


@triton.jit
def _better(a, i, b, j):
    """Return the better of two (value, index); the lower index among equals."""
    first = (a > b) | ((a == b) & (i < j))
    return tl.where(first, a, b), tl.where(first, i, j)


@triton.jit
def _scan(pointer, start, V: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """Maximum and place (an index in the row) of each lane's logits; -inf and _NONE where none is above -inf.

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
    return value, tl.where(step < 0, _NONE, start + step * BLOCK + lane)


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
        value, index = _scan(pointer, start, V, BLOCK, UNROLL, False)
    else:
        value, index = _scan(pointer, start, V, BLOCK, UNROLL, True)
    v1, i1 = _best(value, index)
    # The winning lane once more, without its maximum.
    lane = tl.where(i1 == _NONE, 0, (i1 - start) % BLOCK)
    again = start + lane + tl.arange(0, UNROLL) * BLOCK
    x = tl.load(pointer + again, mask=(again < V) & (again != i1), other=float("-inf")).to(tl.float32)
    valid = x > float("-inf")
    w, j = _best(tl.where(valid, x, float("-inf")), tl.where(valid, again, _NONE))
    v2, i2 = _best(tl.where(index == i1, float("-inf"), value), tl.where(index == i1, _NONE, index))
    v2, i2 = _better(v2, i2, w, j)

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
            v1, i1 = _best(a1, b1)
            v2, i2 = _best(tl.where(b1 == i1, a2, a1), tl.where(b1 == i1, b2, b1))
            _finish(row, v1, i1, v2, i2, thresholds, threshold_stride, tokens, seconds, margins, triggers)
            tl.store(counters + row, 0)
