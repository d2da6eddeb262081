"""The Triton kernel of rows without filters. Import only where Triton is installed.

:func:`draw_kernel` is ``top2_kernel`` with noise: rows are cut into programs, which meet in :func:`~.choice._triton_rows.arrive`; a lane
reads tokens BLOCK apart, and one Philox block gives it four of them, 1,024 apart.

Two logarithms a token would take three times what reading the token takes, and nearly no token needs them. So a lane finds a bound
above each score instead, without a logarithm (:data:`.noise.BOUND`), and keeps the token with the highest one, and the highest of
the others. Then it computes its one token's score. The best two of those are the program's unless some lane's other tokens may reach
the second: then that lane's scores are all computed, one lane after the other. So what the kernel returns is exact whatever the
bounds are worth; how often a lane is looked at depends on them (two of a program's best tokens in one lane).

Compiled without fused multiply-add, so that noise and scores are the reference's bits (:mod:`.noise`).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from margingate_kernels.choice._triton_rows import NONE, NOTHING, arrive, index_of, key_of, value_of, write
from margingate_kernels.seeded import noise as exact
from margingate_kernels.seeded._triton_noise import FILTERED, WORDS, minus_noise, noise_at, philox

_BLOCK = tl.constexpr(exact.BLOCK)
_BOUND, _BOUND_SCALE = tl.constexpr(exact.BOUND), tl.constexpr(-exact.EXPONENT_LN2)
_HOTTEST = tl.constexpr(2.0**100)
_ROUNDING, _SMALLEST = tl.constexpr(2.0**-21), tl.constexpr(2.0**-100)


@triton.jit
def _load(at, index, more: tl.constexpr, V: tl.constexpr, MASKED: tl.constexpr):
    """Return logits in fp32; a NaN stays one, which no comparison lets win."""
    if MASKED:
        return tl.load(at + more, mask=index + more < V, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(at + more).to(tl.float32)


@triton.jit
def _scan(
    pointer, split, temperature, position, low, high, V: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HALVES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the score and the step of each lane's token (-1 where nothing is above -inf), and the highest bound of its others.

    Bounds are less by ``BOUND`` temperatures. A NaN never wins; a lane's others may have its bound for it, as the interpreter's have.
    """
    lane = tl.arange(0, BLOCK)
    bound = tl.full([BLOCK], float("-inf"), tl.float32)
    others = tl.full([BLOCK], float("-inf"), tl.float32)
    logit = tl.full([BLOCK], float("-inf"), tl.float32)
    word = tl.zeros([BLOCK], tl.uint32)
    step = tl.full([BLOCK], -1, tl.int32)
    scale = temperature * _BOUND_SCALE
    for group in range(GROUPS):
        run = split * GROUPS + group
        token = run * (4 * _BLOCK) + lane
        found = tl.full([BLOCK], -1, tl.int32)
        for half in tl.static_range(HALVES):
            words = philox((run * _BLOCK + half * BLOCK + lane).to(tl.uint32), position, low, high)
            for i in tl.static_range(4):
                x = _load(pointer + token, token, i * _BLOCK + half * BLOCK, V, MASKED)
                bits = words[i].to(tl.float32).to(tl.int32, bitcast=True)
                b = tl.fma(bits.to(tl.float32), scale, x)
                above = b > bound
                others = tl.where(above, bound, tl.maximum(others, b))
                bound = tl.where(above, b, bound)
                logit = tl.where(above, x, logit)
                word = tl.where(above, words[i], word)
                found = tl.where(above, i * HALVES + half, found)
        step = tl.where(found < 0, step, group * (4 * HALVES) + found)
    # A bound this far below its logit may be -inf: then nothing is known of any token.
    others = tl.where(temperature > _HOTTEST, float("inf"), others)
    return logit - temperature * minus_noise(word), step, others


@triton.jit
def _best_two(first, second, other_first, other_second):
    """Return the two largest of four keys, the first of each pair being its larger."""
    return tl.maximum(first, other_first), tl.maximum(tl.minimum(first, other_first), tl.maximum(second, other_second))


@triton.jit
def _unsettled(others, runner_up, temperature, lane):
    """Return a lane among whose other tokens may be one of a score that reaches the runner-up's, -1 where there is none."""
    score = value_of(runner_up)
    least = score - tl.abs(score) * _ROUNDING - (temperature * _BOUND + _SMALLEST)
    # Not "least or more": of two infinities the difference is NaN.
    return tl.max(tl.where((others != float("-inf")) & ((others < least) == 0), lane, -1), 0)


@triton.jit
def draw_kernel(
    logits,
    row_stride,
    packed,  # int32 [rows, 12]
    tokens,
    seconds,
    margins,
    keys,  # int64 [rows, SPLITS, 2]
    counters,  # int32 [rows], 0 between launches
    V: tl.constexpr,
    BLOCK: tl.constexpr,  # lanes; divides 1,024
    GROUPS: tl.constexpr,  # runs of 4,096 tokens a program
    HALVES: tl.constexpr,  # 1,024 / BLOCK
    STEPS: tl.constexpr,  # a lane's tokens are start + step * BLOCK + lane
    SPLITS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
    SOME_FILTERED: tl.constexpr,
):
    """Program (row, split) = divmod(program id, SPLITS). Rows with filters are left to the other kernel."""
    program = tl.program_id(0)
    row = (program // SPLITS).to(tl.int64)
    split = program % SPLITS
    words = packed + row * WORDS
    # Without filters in the batch the logits are on their way before the row's words are here.
    if SOME_FILTERED:  # noqa: SIM102
        if (tl.load(words + 4) & FILTERED) != 0:
            return
    position = tl.load(words).to(tl.uint32, bitcast=True)
    low = tl.load(words + 1).to(tl.uint32, bitcast=True)
    high = tl.load(words + 2).to(tl.uint32, bitcast=True)
    temperature = tl.load(words + 3).to(tl.float32, bitcast=True)
    pointer = logits + row * row_stride
    start = split * (GROUPS * 4 * _BLOCK)
    lane = tl.arange(0, BLOCK)
    if start + GROUPS * 4 * _BLOCK <= V:
        value, step, others = _scan(pointer, split, temperature, position, low, high, V, BLOCK, GROUPS, HALVES, False)
    else:
        value, step, others = _scan(pointer, split, temperature, position, low, high, V, BLOCK, GROUPS, HALVES, True)
    lanes = key_of(value, tl.where(step < 0, NONE, start + step * BLOCK + lane))
    first, runner_up = tl.reduce((lanes, tl.full([BLOCK], NOTHING, tl.int64)), 0, _best_two)

    unsettled = _unsettled(others, runner_up, temperature, lane)
    while unsettled >= 0:
        token = start + unsettled + tl.arange(0, STEPS) * BLOCK
        x = tl.load(pointer + token, mask=token < V, other=float("-inf")).to(tl.float32)
        x = x - temperature * noise_at(token, position, low, high)
        new = (x > float("-inf")) & (token != index_of(first)) & (token != index_of(runner_up))
        more = key_of(tl.where(new, x, float("-inf")), tl.where(new, token, NONE))
        best, rest = tl.reduce((more, tl.full([STEPS], NOTHING, tl.int64)), 0, _best_two)
        first, runner_up = _best_two(first, runner_up, best, rest)
        others = tl.where(lane == unsettled, float("-inf"), others)
        unsettled = _unsettled(others, runner_up, temperature, lane)

    last, first, runner_up = arrive(row, split, first, runner_up, keys, counters, SPLITS, SPLITS_P2)
    if last:
        write(row, first, runner_up, tokens, seconds, margins)
