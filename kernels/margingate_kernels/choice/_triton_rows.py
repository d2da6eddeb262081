"""What the Triton kernels share that cut a row of logits into programs. Import only where Triton is installed.

A key is a (value, index) as one int64 whose order is "larger value, then lower index", so that a maximum with its place
is one reduction, not two. A program leaves the keys of its best two in the workspace; the one that arrives last at the row's
counter combines them and sets the counter back to 0, so that the workspace is ready for the next launch. Which program
comes last changes nothing: comparisons are exact, and ties go to the lower index wherever they are decided.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(2**31 - 1)  # index of an empty place, above every token
NOTHING = tl.constexpr(-(2**63))  # a key below every other


@triton.jit
def key_of(value, index):
    """(value, index) as an int64. No value may be NaN; -0 counts as 0."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, floats below 0 run backwards
    return (ordered.to(tl.int64) << 32) | (index ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def value_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key):
    return (key & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def arrive(
    row, split, first, runner_up, keys, counters, SPLITS: tl.constexpr, SPLITS_P2: tl.constexpr,
):  # fmt: skip
    """Return whether this program is the row's last, and then the keys of the row's best two.

    ``keys`` is int64 [rows, SPLITS, 2], ``counters`` int32 [rows], 0 between launches.
    """
    last = tl.full([], SPLITS == 1, tl.int1)
    if SPLITS > 1:
        part = (row * SPLITS + split) * 2
        tl.store(keys + part, first)
        tl.store(keys + part + 1, runner_up)
        tl.debug_barrier()
        # Release: both keys are visible before the count; acquire: the last program sees all of them.
        last = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            place = tl.arange(0, SPLITS_P2)
            parts = (row * SPLITS + place) * 2
            # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
            best = tl.load(keys + parts, mask=place < SPLITS, other=NOTHING, cache_modifier=".cg")
            rest = tl.load(keys + parts + 1, mask=place < SPLITS, other=NOTHING, cache_modifier=".cg")
            first = tl.max(best, 0)
            # Programs without any logit above -inf have equal keys; the runner-up is then another empty place.
            runner_up = tl.max(tl.where(best == first, rest, best), 0)
            tl.store(counters + row, 0)
    return last, first, runner_up


@triton.jit
def write(row, first, runner_up, tokens, seconds, margins):
    """Write one row's result and return its margin. Places that nothing above -inf took go to the lowest indices left."""
    i1, i2 = index_of(first), index_of(runner_up)
    token = tl.where(i1 == NONE, 0, i1)
    second = tl.where(i2 == NONE, tl.where(token == 0, 1, 0), i2)
    margin = value_of(first) - value_of(runner_up)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, second.to(tl.int64))
    tl.store(margins + row, margin)
    return margin
