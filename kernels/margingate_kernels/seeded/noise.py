"""The noise of a seeded draw, and the exact arithmetic that it is made with.

A token's noise is a Gumbel variable that depends on (seed, position, token id) and on nothing else::

    block, word = token >> 12 << 10 | token & 1023, token >> 10 & 3
    r = philox4x32-10(key=(seed & 0xFFFFFFFF, seed >> 32), counter=(block, position, 0, 0))[word]     # 32 bits
    v = (r + 1/2) / 2**32                          # uniform in (0, 1)
    noise = -log(-log(1 - v))

Philox4x32-10 is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); seed
is read as 64 bits, position is below 2**32. A block's four words go to tokens 1,024 apart, so that a vector of
consecutive tokens is a vector of consecutive blocks.

Everything here is made of integer operations and of IEEE additions, multiplications and comparisons in fp32, each rounded by
itself: no library's ``log`` or ``exp``, no fused multiply-add. So PyTorch on a CPU, PyTorch on a GPU and the Triton kernels give
the same bits, and no shape of a tensor changes them. :func:`log` and :func:`exp2_fixed` are polynomials with relative errors of
7.4e-6 and 7.5e-8: a token's probability is off by about 1e-5 of itself, and a chip's ``log`` would cost less only where its bits are not
another chip's. All 32 bits of a word count where the noise is large (``v`` small), so tokens down to a probability of 2**-32 are
drawn at their rate.
"""

from __future__ import annotations

import torch

BLOCK = 1024
"""Tokens between two words of one Philox block."""
GROUP = 4 * BLOCK
"""Consecutive tokens that share a run of Philox blocks."""

ROUNDS = 10
M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

SQRT_HALF_BITS = 0x3F3504F3
"""The bits of sqrt(1/2) in fp32: mantissas are taken from [sqrt(1/2), sqrt(2))."""
LN2 = 0.6931471824645996
EXPONENT = -(1 << 23)
"""Keeps the exponent of a number's bits, as a multiple of 2**23."""
EXPONENT_LN2 = LN2 * 2.0**-23
SMALL = 0.29
"""Below it, 1 - v keeps its mantissa and -v is exact where 1 - v is not."""
# log(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1], minimax in the relative error, from the highest power down.
LOG_1, LOG_2, LOG_3 = -0.1429191380739212, 0.2205590307712555, -0.2540329098701477
LOG_4, LOG_5, LOG_6 = 0.3325802683830261, -0.4999021589756012, 1.000004529953003
# 2**f for f in [0, 1), the same.
EXP_1, EXP_2, EXP_3 = 0.0018775759963318706, 0.008989342488348484, 0.05582631379365921
EXP_4, EXP_5, EXP_6 = 0.24015362560749054, 0.6931530833244324, 0.9999999403953552

BOUND = 110.25
"""No noise is above ``BOUND - n * EXPONENT_LN2``, where n are the bits of its word, converted to fp32, read as an integer.

``n * 2**-23 - 127`` is at most log2 of the word (a chord below its curve), so that of v is above ``n * 2**-23 - 159``, and ``-log(1 - v) >= v``:
the noise is at most ``log(2) * 159 - n * EXPONENT_LN2``, and ``log(2) * 159 < 110.2105``. The polynomials stay below that as well, by 1e-4, at every one of the
2**32 words. The other 0.0395 is room for rounding: a score's bound in fp32 is off by less than 2**-21 of the score and 2**-12 of the temperature."""

LARGEST = 3.4028234663852886e38
"""What filters take an infinite logit for: the largest of fp32."""

MASS_BITS = 40
"""A mass of 1 is 2**40 units: 152,064 tokens of mass 1 still add up within an int64."""


def philox(counter: tuple[torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10 at counter (c0, c1, 0, 0).

    Parameters
    ----------
    counter, key
        int64 tensors that broadcast, each word in [0, 2**32).

    Returns
    -------
    list of Tensor
        int64, in [0, 2**32).
    """
    c0, c1 = torch.broadcast_tensors(*counter)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1  # the low 64 bits, whatever the sign
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + W0) & _WORD, (k1 + W1) & _WORD
    return [c0, c1, c2, c3]


def log(x: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm of positive normal fp32 numbers; -88.03 for 0."""
    return _log(*_parts(x))


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x's mantissa, in [sqrt(1/2), sqrt(2)), less 1, and its exponent times 2**23 as an integer."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) & EXPONENT
    return (bits - exponent).view(torch.float32) - 1, exponent


def _log(f: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    p = f * LOG_1
    for coefficient in (LOG_2, LOG_3, LOG_4, LOG_5):
        p = p.add_(coefficient).mul_(f)
    return p.add_(LOG_6).mul_(f).add_(exponent.float().mul_(EXPONENT_LN2))


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Return minus the Gumbel noise, ``log(-log(1 - v))``, of words in [0, 2**32), fp32.

    The sign is left to the subtraction that adds the noise. The 128 largest words have 1 - v = 0 in fp32 and get -4.48, as low as
    noise comes.
    """
    v = words.float().mul_(2.0**-32).add_(2.0**-33)
    f, exponent = _parts(1 - v)
    return log(_log(torch.where(v < SMALL, -v, f), exponent).neg_())


def noise(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """Return minus the noise of all tokens of each row.

    Parameters
    ----------
    seeds, positions
        [B], int64.
    vocab
        V.

    Returns
    -------
    Tensor
        [B, V], fp32.
    """
    groups, width = -(-vocab // GROUP), min(vocab, BLOCK)
    blocks = torch.arange((groups - 1) * BLOCK + width, device=seeds.device)
    key = (seeds & _WORD).unsqueeze(-1), (seeds >> 32 & _WORD).unsqueeze(-1)
    words = philox((blocks, positions.unsqueeze(-1)), key)
    wanted = min(4, -(-vocab // BLOCK))  # words without a token are not transformed
    stacked = torch.stack([word.view(len(seeds), groups, width) for word in words[:wanted]], dim=2)
    return gumbel(stacked.view(len(seeds), -1)[:, :vocab])


def exp2_fixed(y: torch.Tensor) -> torch.Tensor:
    """Return 2**y for y <= 0 as int64 in units of 2**-40, rounded down; 0 below 2**-40, -inf and NaN included."""
    y = torch.where(y > -MASS_BITS - 1.0, y, -MASS_BITS - 1.0)
    whole = y.floor()
    f = y - whole
    p = f * EXP_1
    for coefficient in (EXP_2, EXP_3, EXP_4, EXP_5):
        p = p.add_(coefficient).mul_(f)
    units = p.add_(EXP_6).mul_(2.0**23).long() << (MASS_BITS - 23)
    return units >> (-whole).long()
