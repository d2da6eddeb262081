"""The Triton kernel of rows with filters: one program a row looks for the values at which they cut.

By bisection over the floats' order, since counts and integer masses of what lies above a value need no sort. Compiled without
fused multiply-add, as the other kernel.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from margingate_kernels.choice._triton_rows import NONE, index_of, key_of, value_of
from margingate_kernels.seeded import noise as exact
from margingate_kernels.seeded._triton_noise import FILTERED, WORDS, log, noise_at

_E1, _E2, _E3 = tl.constexpr(exact.EXP_1), tl.constexpr(exact.EXP_2), tl.constexpr(exact.EXP_3)
_E4, _E5, _E6 = tl.constexpr(exact.EXP_4), tl.constexpr(exact.EXP_5), tl.constexpr(exact.EXP_6)
_MASS_BITS = tl.constexpr(exact.MASS_BITS)
_NUCLEUS = tl.constexpr(2)
_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(exact.LARGEST)
_LOWEST = tl.constexpr(-2139095041)  # the place of -inf in the order of all floats


@triton.jit
def _logits(pointer, index, V: tl.constexpr):
    """Return logits in fp32, -inf behind the last token and for NaN, and no +inf."""
    x = tl.load(pointer + index, mask=index < V, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, _LARGEST), float("-inf"))


@triton.jit
def _better(value, step, x, t):
    above = x > value
    return tl.where(above, x, value), tl.where(above, t, step)


@triton.jit
def _order(x):
    """Return the place of a float in the order of all floats, int32; -0 counts as 0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float(order):
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, best, rate):
    """Return exp of the distance to the best, at the row's temperature, as int64 in units of 2**-40."""
    y = (x - best) * rate
    y = tl.where(y > -41.0, y, -41.0)
    whole = tl.floor(y)
    f = y - whole
    p = f * _E1
    p = (p + _E2) * f
    p = (p + _E3) * f
    p = (p + _E4) * f
    p = (p + _E5) * f
    units = ((p + _E6) * 8388608.0).to(tl.int64) << (_MASS_BITS - 23)
    return units >> (0.0 - whole).to(tl.int64)


@triton.jit
def _log_odds(part, rest):
    value = log(tl.maximum(part, 1).to(tl.float32)) - log(tl.maximum(rest, 1).to(tl.float32))
    return tl.where(part == 0, -_INF, tl.where(rest == 0, _INF, value))


@triton.jit
def _least(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _middle(low, high):
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def filtered_kernel(
    logits, row_stride, packed, tokens, seconds, margins, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row; rows without filters are left to the other kernel."""
    row = tl.program_id(0).to(tl.int64)
    words = packed + row * WORDS
    flags = tl.load(words + 4)
    if (flags & FILTERED) == 0:
        return
    position = tl.load(words).to(tl.uint32, bitcast=True)
    low = tl.load(words + 1).to(tl.uint32, bitcast=True)
    high = tl.load(words + 2).to(tl.uint32, bitcast=True)
    temperature = tl.load(words + 3).to(tl.float32, bitcast=True)
    top_k = tl.load(words + 5)
    top_p = tl.load(words + 6).to(tl.float32, bitcast=True)
    wide = tl.load(words + 7).to(tl.float32, bitcast=True)
    odds = tl.load(words + 8).to(tl.float32, bitcast=True)
    span = tl.load(words + 9).to(tl.float32, bitcast=True)
    reach = tl.load(words + 10).to(tl.float32, bitcast=True)
    rate = tl.load(words + 11).to(tl.float32, bitcast=True)
    nucleus = (flags & _NUCLEUS) != 0
    counts = (top_k > 0) & (top_k < V)
    pointer = logits + row * row_stride
    lane = tl.arange(0, BLOCK)
    STEPS: tl.constexpr = (V + BLOCK - 1) // BLOCK

    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for step in range(STEPS):
        most = tl.maximum(most, _logits(pointer, step * BLOCK + lane, V))
    best = tl.max(most, 0)
    sums = tl.zeros([BLOCK], tl.int64)
    if nucleus:
        for step in range(STEPS):
            sums += _mass(_logits(pointer, step * BLOCK + lane, V), best, rate)
    total = tl.sum(sums, 0)
    inner, outer = top_p.to(tl.float64) * total.to(tl.float64), wide.to(tl.float64) * total.to(tl.float64)

    # Three bisections at once: the smallest value above which there are fewer than top_k tokens, less than the share top_p, and
    # less than that of the wider nucleus. A place is kept once it satisfies; the best value's does.
    top = _order(best)
    bottom = tl.full([], _LOWEST, tl.int32)
    k_low, k_high = tl.where(counts, bottom, top), top
    p_low, p_high = tl.where(nucleus, bottom, top), top
    w_low, w_high = tl.where(nucleus, bottom, top), top
    while (k_low < k_high) | (p_low < p_high) | (w_low < w_high):
        k_mid, p_mid, w_mid = _middle(k_low, k_high), _middle(p_low, p_high), _middle(w_low, w_high)
        k_sum, p_sum = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int64)
        w_sum = tl.zeros([BLOCK], tl.int64)
        for step in range(STEPS):
            x = _logits(pointer, step * BLOCK + lane, V)
            place = _order(x)
            k_sum += (place > k_mid).to(tl.int32)
            if nucleus:
                mass = _mass(x, best, rate)
                p_sum += tl.where(place > p_mid, mass, 0)
                w_sum += tl.where(place > w_mid, mass, 0)
        k_fits = tl.sum(k_sum, 0) < top_k
        p_fits = tl.sum(p_sum, 0).to(tl.float64) < inner
        w_fits = tl.sum(w_sum, 0).to(tl.float64) < outer
        k_low, k_high = tl.where(k_fits, k_low, k_mid + 1), tl.where(k_fits, k_mid, k_high)
        p_low, p_high = tl.where(p_fits, p_low, p_mid + 1), tl.where(p_fits, p_mid, p_high)
        w_low, w_high = tl.where(w_fits, w_low, w_mid + 1), tl.where(w_fits, w_mid, w_high)
    kth = tl.where(counts, _float(k_high), -_INF)
    cut = tl.where(nucleus, _float(p_high), -_INF)
    soft = tl.where(nucleus, _float(w_high), -_INF)
    hard = tl.maximum(kth, tl.where(span == _INF, -_INF, best - span))

    # The winner among those that are kept, and what the filters' margins need of all others.
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.full([BLOCK], -1, tl.int32)
    enough = tl.zeros([BLOCK], tl.int32)
    below = tl.full([BLOCK], float("-inf"), tl.float32)
    for step in range(STEPS):
        index = step * BLOCK + lane
        x = _logits(pointer, index, V)
        kept = (x >= hard) & (x >= cut)
        score = tl.where(kept, x - temperature * noise_at(index, position, low, high), float("-inf"))
        value, found = _better(value, found, score, step)
        enough += (x >= kth).to(tl.int32)
        below = tl.maximum(below, tl.where(x < kth, x, float("-inf")))
    first = tl.max(key_of(value, tl.where(found < 0, NONE, found * BLOCK + lane)), 0)
    winner = value_of(first)
    token = tl.where(index_of(first) == NONE, 0, index_of(first))
    chosen = _logits(pointer, token, V)
    after = tl.where(counts, tl.where(tl.sum(enough, 0) > top_k, kth, tl.max(below, 0)), -_INF)

    value = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.full([BLOCK], -1, tl.int32)
    rest = tl.full([BLOCK], float("-inf"), tl.float32)
    near = tl.zeros([BLOCK], tl.int64)
    for step in range(STEPS):
        index = step * BLOCK + lane
        x = _logits(pointer, index, V)
        score = x - temperature * noise_at(index, position, low, high)
        entry = tl.maximum(tl.maximum(hard - x, tl.minimum(reach, soft - x)), 0.0)
        entry = tl.where(x == -_INF, _INF, entry)  # a masked token never comes in
        other = index != token
        rival = tl.where(other, tl.minimum(score, winner - entry), float("-inf"))
        value, found = _better(value, found, rival, step)
        rest = tl.maximum(rest, tl.where(other, x, float("-inf")))
        if nucleus:
            near += tl.where(other & (x > chosen - reach), _mass(x, best, rate) + 1, 0)
    runner_up = tl.max(key_of(value, tl.where(found < 0, NONE, found * BLOCK + lane)), 0)
    margin = winner - value_of(runner_up)
    margin = _least(margin, chosen - after)
    margin = _least(margin, chosen + span - tl.max(rest, 0))
    if nucleus:
        above = tl.sum(near, 0)
        mine = _mass(chosen, best, rate)
        stays = tl.minimum(reach, temperature * (odds - _log_odds(above, total - above)))
        alone = temperature * (odds - _log_odds(total - mine + (V - 1), mine))
        margin = _least(margin, tl.maximum(tl.maximum(stays, alone), 0.0))
    i2 = index_of(runner_up)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, tl.where(i2 == NONE, tl.where(token == 0, 1, 0), i2).to(tl.int64))
    tl.store(margins + row, margin)
