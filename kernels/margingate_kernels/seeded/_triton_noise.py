"""The noise of :mod:`.noise` in Triton, bit for bit, for kernels compiled without fused multiply-add."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from margingate_kernels.seeded import noise as exact

_BLOCK = tl.constexpr(exact.BLOCK)
_M0, _M1 = tl.constexpr(exact.M0), tl.constexpr(exact.M1)
_W0, _W1 = tl.constexpr(exact.W0), tl.constexpr(exact.W1)
_ROUNDS = tl.constexpr(exact.ROUNDS)
_SQRT_HALF = tl.constexpr(exact.SQRT_HALF_BITS)
_EXPONENT, _EXPONENT_LN2 = tl.constexpr(exact.EXPONENT), tl.constexpr(exact.EXPONENT_LN2)
_SMALL = tl.constexpr(exact.SMALL)
_L1, _L2, _L3 = tl.constexpr(exact.LOG_1), tl.constexpr(exact.LOG_2), tl.constexpr(exact.LOG_3)
_L4, _L5, _L6 = tl.constexpr(exact.LOG_4), tl.constexpr(exact.LOG_5), tl.constexpr(exact.LOG_6)
WORDS = tl.constexpr(12)  # of a packed row
FILTERED = tl.constexpr(1)  # bit of its flags


@triton.jit
def philox(block, position, low, high):
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
def log(x):
    f, exponent = _parts(x)
    return _log_of(f, exponent)


@triton.jit
def minus_noise(word):
    v = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2**-32, 2**-33
    f, exponent = _parts(1.0 - v)
    return log(-_log_of(tl.where(v < _SMALL, -v, f), exponent))


@triton.jit
def noise_at(token, position, low, high):
    """Return minus the noise of single tokens."""
    block = ((token >> 12) << 10) | (token & 1023)
    w0, w1, w2, w3 = philox(block.to(tl.uint32), position, low, high)
    place = (token >> 10) & 3
    return minus_noise(tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3))))
