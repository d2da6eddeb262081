"""What a row's draw is: its parameters, packed for one copy to the device, and the reference of the draw.

A row's token is the best by ``score = logit + temperature * noise`` among the tokens that the filters keep, which is a draw from
their softmax at that temperature (the Gumbel-max trick). Scores are in logits; at temperature 0 they are the logits, and
the draw is the greedy choice, ties to the lowest id.

Filters. All are taken of the whole softmax at the row's temperature and keep the tokens at or above a value, ties included::

    top-k   the k best
    top-p   the smallest set of the best that holds at least the share p:   share(tokens above it) < p
    min-p   those with at least min_p times the best one's probability

A token is kept where all three keep it. Shares are sums of integers (:func:`.noise.exp2_fixed`), so no order of summing changes
them, and the value at which a filter cuts is one of the row's own logits.

The margin. tau has one meaning for greedy and seeded rows: *where the margin is above tau, no change of the logits by at most
tau/2 each changes the token* (up to the rounding of fp32). Without filters that is the best score minus the second best:
noise does not depend on the logits, so a gap of two scores shrinks by tau at most. With filters the winner w may also fall out, and
a token that is out may come in::

    margin = min(exit(w), min over tokens v but w of max(score(w) - score(v), entry(v)))

``entry(v)`` is a lower bound of the smallest tau at which v could be kept, and ``exit(w)`` one of the smallest at which w could fall
out; a token changes the choice only if it is in *and* ahead, hence the maximum. With d = tau/2:

- top-k. The k-th best value falls by at most d and v rises by at most d: ``entry = kth - z(v)``. w falls out only behind k others, the
  k-th best of which rises by at most d: ``exit = z(w) - (k+1)th``.
- min-p. The cut is the best value minus L = -temperature * log(min_p): ``entry = best - L - z(v)`` and
  ``exit = z(w) + L - (best of the others)``.
- top-p. Weights change by factors between exp(-d/T) and exp(d/T), so the odds of a set's share, share/(1 - share), by at most exp(tau/T).
  And the tokens above v are at least those that were above z(v) + tau, those above w at most those that were above z(w) - tau. Both
  depend on tau; with a *reach* R and tau <= R the first are at least those above z(v) + tau, and in terms of the share q whose odds are
  exp(R/T) times those of p: v comes in only if z(v) + tau >= cut(q), where cut(q) is the value at which top-p of q cuts. So
  ``entry = min(R, cut(q) - z(v))``. And w stays while the odds of the others above z(w) - R, times exp(tau/T), are below those
  of p: ``exit = min(R, T * (logit(p) - logit(share of the others above z(w) - R)))``. For any tau, without a reach, the others are
  at most all of them: ``exit`` is the larger of this and ``T * (logit(p) - logit(1 - share(w)))``. Shares are whole units, the rest
  cut off, so each of the others is counted as a unit more: what is far below the best has none, and still comes in when it rises.

R is a little more than twice the row's threshold, so that it never decides at the threshold itself: a margin that R cuts says
"above the threshold", and no more.

Penalties and bias come before all this. A repetition penalty r stretches a change of the model's logits by at most
max(r, 1/r); the margin, as a greedy row's, is one of the processed logits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from margingate_kernels.seeded.noise import LARGEST, exp2_fixed, log, noise

NEG_INF = -math.inf

WORDS = 12
"""int32 words of a packed row; see :func:`pack`."""
FILTERED = 1
"""Bit of the flags: some filter is on."""
LEAST_SHARE = 1e-30
"""A smaller top-p, which fp32 may not hold, keeps the same tokens: the best."""
NUCLEUS = 2
"""Bit of the flags: top-p is on."""


class Draw(NamedTuple):
    """How one row's token is drawn.

    Parameters
    ----------
    seed
        64 bits; a negative number stands for its two's complement.
    temperature
        0 is greedy: filters and seed then change nothing.
    top_k
        Tokens kept; 0 for all.
    top_p
        Share kept, in (0, 1]; 1 for all.
    min_p
        Least probability kept, as a share of the best one's, in [0, 1]; 0 for all.
    reach
        How far, in logits, the margin looks for what top-p would change: R above. A margin that top-p bounds is at most this.
    """

    seed: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    reach: float = 1.0

    @property
    def filtered(self) -> bool:
        """Whether some filter is on."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Drawn(NamedTuple):
    """Result of a draw; every tensor has shape [B] and lies on the device of the logits."""

    token: torch.Tensor
    """int64: the token drawn, the lowest id among exact ties of scores."""
    second: torch.Tensor
    """int64: the token that comes nearest to changing the choice; never equal to ``token``."""
    margin: torch.Tensor
    """float32, in logits: see the module. NaN where no token is above -inf."""


def _single(value: float) -> int:
    """Return the bits of a number in fp32, rounded, as a signed word."""
    try:
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    except OverflowError:
        return _single(math.copysign(math.inf, value))


def _signed(word: int) -> int:
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


@lru_cache(4096)
def _constants(draw: Draw | None) -> tuple[int, ...]:
    """Return all words of a row but its position; the same at every step of a request."""
    if draw is None or not draw.temperature > 0:
        return (0,) * (WORDS - 1)
    temperature = struct.unpack("<f", struct.pack("<f", draw.temperature))[0]
    nucleus = draw.top_p < 1
    flags = FILTERED * draw.filtered | NUCLEUS * nucleus
    reach = min(max(draw.reach, 2.0**-10), 2.0**10)
    top_p = max(draw.top_p, LEAST_SHARE)
    odds = math.log(top_p / (1 - top_p)) if nucleus else math.inf
    wide = 1 / (1 + math.exp(-min(odds + reach / temperature, 700.0)))
    # Rounded up: a larger share only makes the margin smaller.
    share = torch.nextafter(torch.tensor(wide), torch.tensor(2.0)).item() if nucleus else 1.0
    span = -temperature * math.log(draw.min_p) if draw.min_p > 0 else math.inf
    return (
        _signed(draw.seed), _signed(draw.seed >> 32), _single(temperature), flags, min(draw.top_k, 2**31 - 1),
        _single(top_p), _single(share), _single(odds), _single(span), _single(reach),
        _single(math.log2(math.e) / temperature),
    )  # fmt: skip


def pack(draws: Sequence[Draw | None], positions: Sequence[int]) -> torch.Tensor:
    """Return rows' parameters as int32 [B, 12] on the CPU; None is a greedy row.

    Words: position, seed low and high, temperature, flags, top-k, top-p, top-p widened by the reach, log odds of top-p, min-p's span L,
    reach, log2(e) / temperature. Numbers are fp32 bits.

    Parameters
    ----------
    draws
        How each row is drawn.
    positions
        The position of the token that each row draws: that of the token it read, plus 1.
    """
    rows = [(_signed(position), *_constants(draw)) for draw, position in zip(draws, positions)]
    return torch.tensor(rows, dtype=torch.int32).view(len(rows), WORDS)


def draw_reference(logits: torch.Tensor, packed: torch.Tensor) -> Drawn:
    """Draw the rows' tokens with plain PyTorch.

    Parameters
    ----------
    logits
        [B, V], float32 or bfloat16, V >= 2; a NaN counts as -inf.
    packed
        Of :func:`pack`, on the device of the logits.

    Returns
    -------
    Drawn
        A row's result depends on that row alone.
    """
    values = torch.nan_to_num(logits.float(), nan=NEG_INF, posinf=math.inf, neginf=NEG_INF)
    number = packed.view(torch.float32)
    seeds = (packed[:, 1].long() & 0xFFFFFFFF) | (packed[:, 2].long() << 32)
    minus = noise(seeds, packed[:, 0].long() & 0xFFFFFFFF, logits.shape[1])
    scores = values - number[:, 3:4] * minus
    token, second, margin = _best_two(scores)
    some = (packed[:, 4] & FILTERED).nonzero().flatten()
    if len(some):
        z = values[some].clamp(max=LARGEST)
        score = z - number[some, 3:4] * minus[some]
        token[some], second[some], margin[some] = _filtered(z, score, packed[some])
    return Drawn(token, second, margin)


def _best_two(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    top, token = scores.max(dim=-1)
    next_best, second = scores.scatter(-1, token.unsqueeze(-1), NEG_INF).max(dim=-1)
    # Where nothing but the top lies above -inf, the second max may find the masked place itself.
    second = torch.where(second == token, (token == 0).long(), second)
    return token, second, top - next_best


def _filtered(
    z: torch.Tensor, score: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw filtered rows, [F, V]; every name is a column, [F, 1], or as wide as the row."""
    number = rows.view(torch.float32)
    nucleus, top_k = (rows[:, 4:5] & NUCLEUS) > 0, rows[:, 5:6].long()
    temperature, (top_p, wide, odds, span, reach, rate) = number[:, 3:4], number[:, 6:12].split(1, dim=1)
    counts = (top_k > 0) & (top_k < z.shape[1])
    ordered, order = z.sort(dim=1, descending=True)  # its values depend on no algorithm
    best = ordered[:, :1]
    kth = torch.where(counts, ordered.gather(1, (top_k - 1).clamp(0, z.shape[1] - 1)), NEG_INF)
    after = torch.where(counts, ordered.gather(1, top_k.clamp(max=z.shape[1] - 1)), NEG_INF)
    hard = torch.maximum(kth, torch.where(span == math.inf, NEG_INF, best - span))
    mass = exp2_fixed((z - best) * rate)
    total = mass.sum(1, keepdim=True)
    above = _above(ordered, mass.gather(1, order))
    cut, soft = (torch.where(nucleus, _cut(ordered, above, total, share), NEG_INF) for share in (top_p, wide))

    token = torch.where((z >= hard) & (z >= cut), score, NEG_INF).argmax(1, keepdim=True)
    winner, chosen, mine = score.gather(1, token), z.gather(1, token), mass.gather(1, token)
    entry = torch.maximum(hard - z, torch.minimum(reach, soft - z)).clamp(min=0)
    entry = torch.where(z == NEG_INF, math.inf, entry)  # a masked token never comes in
    rival = torch.minimum(score, winner - entry).scatter(1, token, NEG_INF)
    nearest, second = rival.max(1, keepdim=True)
    second = torch.where(second == token, (token == 0).long(), second)
    others = z.scatter(1, token, NEG_INF).amax(1, keepdim=True)
    margin = torch.minimum(winner - nearest, torch.minimum(chosen - after, chosen + span - others))
    beside = torch.where(z > chosen - reach, mass + 1, 0).sum(1, keepdim=True) - (mine + 1)
    near = torch.minimum(reach, temperature * (odds - _log_odds(beside, total - beside)))
    far = temperature * (odds - _log_odds(total - mine + (z.shape[1] - 1), mine))
    stays = torch.maximum(torch.maximum(near, far), torch.zeros_like(near))
    margin = torch.where(nucleus, torch.minimum(margin, stays), margin)
    return token.squeeze(1), second.squeeze(1), margin.squeeze(1)


def _log_odds(part: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Return log(part / rest) of masses, -inf and inf where one of them is 0 (the first counts)."""
    value = log(part.clamp(min=1).float()) - log(rest.clamp(min=1).float())
    return torch.where(part == 0, NEG_INF, torch.where(rest == 0, math.inf, value))


def _above(values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """Return the mass of all tokens of a larger value, of rows in falling order."""
    first = torch.searchsorted(-values, -values)  # of equal values, the first's place
    return (mass.cumsum(1) - mass).gather(1, first)


def _cut(values: torch.Tensor, above: torch.Tensor, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return the smallest value that top-p keeps: less than ``share`` of the mass is above it."""
    return torch.where(above.double() < share.double() * total.double(), values, math.inf).amin(1, keepdim=True)
