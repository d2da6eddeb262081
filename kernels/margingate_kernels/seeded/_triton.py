"""The Triton kernels of :mod:`margingate_kernels.seeded`. Import only where Triton is installed.

:func:`draw_kernel` is ``top2_kernel`` with noise: the same cut of a row into programs, the same lanes, keys and last program
(:mod:`margingate_kernels._triton_top2`); a lane's Philox block gives it four tokens, 1,024 apart. :func:`filtered_kernel` gives each
row with filters to one program: it looks for the values at which the filters cut by bisection over the floats' order, since
counts and integer masses of what lies above a value need no sort.

Compiled without fused multiply-add, so that noise and scores are the reference's bits (:mod:`.noise`).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from margingate_kernels import _triton_top2 as top2
from margingate_kernels.seeded import noise as exact

_key, _value, _index = top2._key, top2._value, top2._index

_NONE = tl.constexpr(2**31 - 1)  # index of an empty place, above every token
_NOTHING = tl.constexpr(-(2**63))  # a key below every other
_BLOCK = tl.constexpr(exact.BLOCK)
_M0, _M1 = tl.constexpr(exact.M0), tl.constexpr(exact.M1)
_W0, _W1 = tl.constexpr(exact.W0), tl.constexpr(exact.W1)
_ROUNDS = tl.constexpr(exact.ROUNDS)
_SQRT_HALF = tl.constexpr(exact.SQRT_HALF_BITS)
_EXPONENT, _EXPONENT_LN2 = tl.constexpr(exact.EXPONENT), tl.constexpr(exact.EXPONENT_LN2)
_SMALL = tl.constexpr(exact.SMALL)
_L1, _L2, _L3 = tl.constexpr(exact.LOG_1), tl.constexpr(exact.LOG_2), tl.constexpr(exact.LOG_3)
_L4, _L5, _L6 = tl.constexpr(exact.LOG_4), tl.constexpr(exact.LOG_5), tl.constexpr(exact.LOG_6)
_E1, _E2, _E3 = tl.constexpr(exact.EXP_1), tl.constexpr(exact.EXP_2), tl.constexpr(exact.EXP_3)
_E4, _E5, _E6 = tl.constexpr(exact.EXP_4), tl.constexpr(exact.EXP_5), tl.constexpr(exact.EXP_6)
_MASS_BITS = tl.constexpr(exact.MASS_BITS)
_WORDS = tl.constexpr(12)
_FILTERED, _NUCLEUS = tl.constexpr(1), tl.constexpr(2)
_INF = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(exact.LARGEST)
_LOWEST = tl.constexpr(-2139095041)  # the place of -inf in the order of all floats


@triton.jit
def _philox(block, position, low, high):
    """Return the four words of Philox4x32-10 at counter (block, position, 0, 0); all uint32."""
    c0, c1 = block, tl.zeros_like(block) + position
    c2, c3 = tl.zeros_like(block), tl.zeros_like(block)
    for _ in tl.static_range(_ROUNDS):
        p0, p1 = c0.to(tl.uint64) * _M0, c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ low
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ high
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        low = (low.to(tl.uint64) + _W0).to(tl.uint32)
        high = (high.to(tl.uint64) + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _parts(x):
    """Return x's mantissa, in [sqrt(1/2), sqrt(2)), less 1, and its exponent times 2**23 as an integer."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) & _EXPONENT
    return (bits - exponent).to(tl.float32, bitcast=True) - 1.0, exponent


@triton.jit
def _log_of(f, exponent):
    p = f * _L1
    p = (p + _L2) * f
    p = (p + _L3) * f
    p = (p + _L4) * f
    p = (p + _L5) * f
    return (p + _L6) * f + exponent.to(tl.float32) * _EXPONENT_LN2


@triton.jit
def _log(x):
    f, exponent = _parts(x)
    return _log_of(f, exponent)


@triton.jit
def _minus_noise(word):
    v = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33
    f, exponent = _parts(1.0 - v)
    return _log(-_log_of(tl.where(v < _SMALL, -v, f), exponent))


@triton.jit
def _noise_at(token, position, low, high):
    """Return minus the noise of single tokens."""
    block = ((token >> 12) << 10) | (token & 1023)
    w0, w1, w2, w3 = _philox(block.to(tl.uint32), position, low, high)
    place = (token >> 10) & 3
    return _minus_noise(tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3))))


@triton.jit
def _logits(pointer, index, V: tl.constexpr):
    """Return logits in fp32, -inf behind the last token and for NaN, and no +inf."""
    x = tl.load(pointer + index, mask=index < V, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, tl.minimum(x, _LARGEST), float("-inf"))


@triton.jit
def _load(pointer, index, V: tl.constexpr, MASKED: tl.constexpr):
    """Return logits in fp32; a NaN stays one, which no comparison lets win."""
    if MASKED:
        return tl.load(pointer + index, mask=index < V, other=float("-inf")).to(tl.float32)
    else:
        return tl.load(pointer + index).to(tl.float32)


@triton.jit
def _write(row, first, runner_up, tokens, seconds, margins):
    """Write one row's result. Places that nothing above -inf took go to the lowest indices left."""
    i1, i2 = _index(first), _index(runner_up)
    token = tl.where(i1 == _NONE, 0, i1)
    second = tl.where(i2 == _NONE, tl.where(token == 0, 1, 0), i2)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, second.to(tl.int64))
    tl.store(margins + row, _value(first) - _value(runner_up))


@triton.jit
def _better(value, step, x, t):
    above = x > value
    return tl.where(above, x, value), tl.where(above, t, step)


@triton.jit
def _scan(
    pointer, split, temperature, position, low, high, V: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    HALVES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return each lane's best score and the step that it came at, -1 where nothing is above -inf."""
    lane = tl.arange(0, BLOCK)
    value = tl.full([BLOCK], float("-inf"), tl.float32)
    step = tl.full([BLOCK], -1, tl.int32)
    for group in range(GROUPS):
        for half in tl.static_range(HALVES):
            base = (split * GROUPS + group) * (4 * _BLOCK) + half * BLOCK
            at = group * (4 * HALVES) + half
            x0 = _load(pointer, base + lane, V, MASKED)
            x1 = _load(pointer, base + _BLOCK + lane, V, MASKED)
            x2 = _load(pointer, base + 2 * _BLOCK + lane, V, MASKED)
            x3 = _load(pointer, base + 3 * _BLOCK + lane, V, MASKED)
            if temperature > 0:
                block = ((split * GROUPS + group) * _BLOCK + half * BLOCK + lane).to(tl.uint32)
                w0, w1, w2, w3 = _philox(block, position, low, high)
                x0 = x0 - temperature * _minus_noise(w0)
                x1 = x1 - temperature * _minus_noise(w1)
                x2 = x2 - temperature * _minus_noise(w2)
                x3 = x3 - temperature * _minus_noise(w3)
            value, step = _better(value, step, x0, at)
            value, step = _better(value, step, x1, at + HALVES)
            value, step = _better(value, step, x2, at + 2 * HALVES)
            value, step = _better(value, step, x3, at + 3 * HALVES)
    return value, step


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
    STEPS_P2: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P2: tl.constexpr,
):
    """Program (row, split) = divmod(program id, SPLITS). Rows with filters are left to the other kernel."""
    program = tl.program_id(0)
    row = (program // SPLITS).to(tl.int64)
    split = program % SPLITS
    words = packed + row * _WORDS
    if (tl.load(words + 4) & _FILTERED) != 0:
        return
    position = tl.load(words).to(tl.uint32, bitcast=True)
    low = tl.load(words + 1).to(tl.uint32, bitcast=True)
    high = tl.load(words + 2).to(tl.uint32, bitcast=True)
    temperature = tl.load(words + 3).to(tl.float32, bitcast=True)
    pointer = logits + row * row_stride
    start = split * (GROUPS * 4 * _BLOCK)
    lane = tl.arange(0, BLOCK)
    if start + GROUPS * 4 * _BLOCK <= V:
        value, step = _scan(pointer, split, temperature, position, low, high, V, BLOCK, GROUPS, HALVES, False)
    else:
        value, step = _scan(pointer, split, temperature, position, low, high, V, BLOCK, GROUPS, HALVES, True)
    lanes = _key(value, tl.where(step < 0, _NONE, start + step * BLOCK + lane))
    first = tl.max(lanes, 0)
    i1 = _index(first)
    # The winning lane once more, without its maximum.
    turn = tl.arange(0, STEPS_P2)
    again = start + tl.where(i1 == _NONE, 0, (i1 - start) % BLOCK) + turn * BLOCK
    x = _load(pointer, tl.where(turn < STEPS, again, V), V, True)
    if temperature > 0:
        x = x - temperature * _noise_at(again, position, low, high)
    valid = (x > float("-inf")) & (again != i1)
    same_lane = tl.max(_key(tl.where(valid, x, float("-inf")), tl.where(valid, again, _NONE)), 0)
    runner_up = tl.maximum(tl.max(tl.where(lanes == first, _NOTHING, lanes), 0), same_lane)

    if SPLITS == 1:
        _write(row, first, runner_up, tokens, seconds, margins)
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
            runner_up = tl.max(tl.where(best == first, rest, best), 0)
            _write(row, first, runner_up, tokens, seconds, margins)
            tl.store(counters + row, 0)


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
    value = _log(tl.maximum(part, 1).to(tl.float32)) - _log(tl.maximum(rest, 1).to(tl.float32))
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
    words = packed + row * _WORDS
    flags = tl.load(words + 4)
    if (flags & _FILTERED) == 0:
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
        score = tl.where(kept, x - temperature * _noise_at(index, position, low, high), float("-inf"))
        value, found = _better(value, found, score, step)
        enough += (x >= kth).to(tl.int32)
        below = tl.maximum(below, tl.where(x < kth, x, float("-inf")))
    first = tl.max(_key(value, tl.where(found < 0, _NONE, found * BLOCK + lane)), 0)
    winner = _value(first)
    token = tl.where(_index(first) == _NONE, 0, _index(first))
    chosen = _logits(pointer, token, V)
    after = tl.where(counts, tl.where(tl.sum(enough, 0) > top_k, kth, tl.max(below, 0)), -_INF)

    value = tl.full([BLOCK], float("-inf"), tl.float32)
    found = tl.full([BLOCK], -1, tl.int32)
    rest = tl.full([BLOCK], float("-inf"), tl.float32)
    near = tl.zeros([BLOCK], tl.int64)
    for step in range(STEPS):
        index = step * BLOCK + lane
        x = _logits(pointer, index, V)
        score = x - temperature * _noise_at(index, position, low, high)
        entry = tl.maximum(tl.maximum(hard - x, tl.minimum(reach, soft - x)), 0.0)
        entry = tl.where(x == -_INF, _INF, entry)  # a masked token never comes in
        other = index != token
        rival = tl.where(other, tl.minimum(score, winner - entry), float("-inf"))
        value, found = _better(value, found, rival, step)
        rest = tl.maximum(rest, tl.where(other, x, float("-inf")))
        if nucleus:
            near += tl.where(other & (x > chosen - reach), _mass(x, best, rate), 0)
    runner_up = tl.max(_key(value, tl.where(found < 0, _NONE, found * BLOCK + lane)), 0)
    margin = winner - _value(runner_up)
    margin = _least(margin, chosen - after)
    margin = _least(margin, chosen + span - tl.max(rest, 0))
    if nucleus:
        above = tl.sum(near, 0)
        mine = _mass(chosen, best, rate)
        stays = tl.minimum(reach, temperature * (odds - _log_odds(above, total - above)))
        alone = temperature * (odds - _log_odds(total - mine, mine))
        margin = _least(margin, tl.maximum(tl.maximum(stays, alone), 0.0))
    i2 = _index(runner_up)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(seconds + row, tl.where(i2 == _NONE, tl.where(token == 0, 1, 0), i2).to(tl.int64))
    tl.store(margins + row, margin)
