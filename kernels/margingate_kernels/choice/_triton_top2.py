"""The Triton kernel of :mod:`margingate_kernels.top2_margin`. Import only where Triton is installed.

One launch. A row is cut into SPLITS chunks, one program each. Lane l of a program sees the chunk's logits l, l + BLOCK,
l + 2 * BLOCK, ... and keeps their maximum and where it was: three instructions a logit, where a running top-2 takes
eight and would not hide behind the loads. The chunk's runner-up is then the best of the other lanes' maxima and of the
winning lane's other logits, which are read once more (UNROLL of them). The program leaves two keys in the workspace; the
one that arrives last at the row's counter combines the chunks and sets the counter back to 0, so that the workspace is
ready for the next launch. Which program comes last changes nothing: comparisons are exact, and ties go to the lower
index wherever they are decided.

A key is a (value, index) as one int64 whose order is "larger value, then lower index", so that a maximum with its place
is one reduction, not two.

The time of a short row is latency, not bandwidth (RESULTS.md), so what can run early does: the thresholds are read
first, and the other lanes are reduced while the second look is in flight.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

_NONE = tl.constexpr(2**31 - 1)  # index of an empty place, above every token
_NOTHING = tl.constexpr(-(2**63))  # a key below every other


@triton.jit
def _key(value, index):
    """(value, index) as an int64. No value may be NaN; -0 counts as 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, floats below 0 run backwards
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index(key):
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def _scan(pointer, start, V: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """Return the key of each lane's maximum; its index is _NONE where nothing is above -inf.

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
    return _key(value, tl.where(step < 0, _NONE, start + step * BLOCK + lane))


@triton.jit
def _finish(row, first, runner_up, threshold, tokens, seconds, margins, triggers):
    """Write one row's result. Places that nothing above -inf took go to the lowest indices left."""
    i1, i2 = _index(first), _index(runner_up)
    token = tl.where(i1 == _NONE, 0, i1)
    second = tl.where(i2 == _NONE, tl.where(token == 0, 1, 0), i2)
    margin = _value(first) - _value(runner_up)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, second.to(tl.int64))
    tl.store(margins + row, margin)
    tl.store(triggers + row, (margin > threshold) == 0)


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
    i1 = _index(first)
    # The winning lane once more, without its maximum.
    lane = tl.where(i1 == _NONE, 0, (i1 - start) % BLOCK)
    again = start + lane + tl.arange(0, UNROLL) * BLOCK
    x = tl.load(pointer + again, mask=(again < V) & (again != i1), other=float("-inf")).to(tl.float32)
    others = tl.max(tl.where(lanes == first, _NOTHING, lanes), 0)
    valid = x > float("-inf")
    same_lane = tl.max(_key(tl.where(valid, x, float("-inf")), tl.where(valid, again, _NONE)), 0)
    runner_up = tl.maximum(others, same_lane)

    if SPLITS == 1:
        _finish(row, first, runner_up, threshold, tokens, seconds, margins, triggers)
    else:
        part = (row * SPLITS + split) * 2
        tl.store(keys + part, first)
        tl.store(keys + part + 1, runner_up)
        tl.debug_barrier()
        # Release: both keys are visible before the count; acquire: the last program sees all of them.
        arrived = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            place = tl.arange(0, SPLITS_P2)
            parts = (row * SPLITS + place) * 2
            # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
            best = tl.load(keys + parts, mask=place < SPLITS, other=_NOTHING, cache_modifier=".cg")
            rest = tl.load(keys + parts + 1, mask=place < SPLITS, other=_NOTHING, cache_modifier=".cg")
            first = tl.max(best, 0)
            # Chunks without any logit above -inf have equal keys; the runner-up is then another empty place.
            runner_up = tl.max(tl.where(best == first, rest, best), 0)
            _finish(row, first, runner_up, threshold, tokens, seconds, margins, triggers)
            tl.store(counters + row, 0)
