"""The noise of a seeded draw: the generator against published vectors, the transform against the Gumbel distribution."""

from __future__ import annotations

import math

import pytest
import torch
from margingate_kernels.seeded import noise as exact
from margingate_kernels.seeded.noise import exp2_fixed, gumbel, log, noise, philox

# Random123's kat_vectors: counter, key and output of philox4x32-10 where counter words 2 and 3 can be 0.
ZERO = "6627e8d5 e169c58d bc57ac4c 9b00dbd8"


def column(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The published algorithm, in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, p0 >> 32 ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_published_vectors():
    assert " ".join(f"{int(w):08x}" for w in philox((column(0), column(0)), (column(0), column(0)))) == ZERO
    ones = [0xFFFFFFFF] * 4
    assert [f"{w:08x}" for w in plain_philox(ones, ones[:2])] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    digits = plain_philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0])
    assert [f"{w:08x}" for w in digits] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_tensors_give_what_the_published_algorithm_gives():
    generator = torch.Generator().manual_seed(0)
    c0, c1, k0, k1 = torch.randint(0, 1 << 32, (4, 50), generator=generator)
    got = torch.stack(philox((c0, c1), (k0, k1)), dim=1).tolist()
    want = [plain_philox([a, b, 0, 0], [c, d]) for a, b, c, d in zip(*(t.tolist() for t in (c0, c1, k0, k1)))]
    assert got == want


def test_a_token_has_the_word_that_is_documented():
    seed, position, vocab = 2**40 + 77, 913, 9001
    got = noise(column(seed), column(position), vocab)[0]
    for token in (0, 1, 1023, 1024, 3333, 4095, 4096, 8191, 9000):
        block, word = token >> 12 << 10 | token & 1023, token >> 10 & 3
        number = plain_philox([block, position, 0, 0], [seed & 0xFFFFFFFF, seed >> 32])[word]
        assert got[token] == gumbel(column(number))
        v = (number + 0.5) / 2**32
        assert got[token].item() == pytest.approx(math.log(-math.log1p(-v)), abs=3e-5)


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = column(1, 2, -3), column(5, 6, 2**31)
    together = noise(seeds, positions, 2048)
    for row in range(3):
        assert torch.equal(noise(seeds[row : row + 1], positions[row : row + 1], 2048)[0], together[row])
    assert torch.equal(noise(seeds, positions, 700), together[:, :700])
    assert torch.equal(noise(seeds, positions, 5000)[:, :2048], together)
    assert not (noise(column(1), column(6), 2048) == together[0]).all()


def test_logarithm():
    x = torch.cat([torch.logspace(-37, 37, 20_001), torch.linspace(0.5, 2, 20_001)])
    true = x.double().log()
    assert ((log(x) - true).abs() <= 7.5e-6 * true.abs().clamp(max=0.35) + 1e-6 * true.abs() + 1e-12).all()


@pytest.mark.parametrize("v", [2.0**-33, 1e-6, 0.001, 0.2899, 0.2901, 0.5, 0.9, 0.9999])
def test_transform(v):
    word = min(max(round(v * 2**32 - 0.5), 0), 2**32 - 1)
    true = -math.log(-math.log1p(-(word + 0.5) / 2**32))
    assert -gumbel(column(word)).item() == pytest.approx(true, abs=2e-5)


def test_transform_falls_from_the_first_word_to_the_last():
    words = torch.cat([torch.arange(0, 2**32 - 1, 99_991), torch.tensor([2**32 - 129, 2**32 - 1])])
    values = gumbel(words)  # minus the noise: it rises, but for the polynomials' error where they join
    assert (values[1:] - values[:-1]).min() > -2e-5
    assert torch.isfinite(values).all()
    assert (-values[0]).item() == pytest.approx(22.87, abs=0.01)


@pytest.mark.parametrize("shift", range(9))
def test_no_noise_is_above_its_bound(shift):
    """A word is a float with a mantissa of 24 bits: here the ends of each power of two, where the chord is tight, and a run between."""
    ends = [n for e in range(25) for n in range(2**e - 2, 2**e + 3)]
    low = 0 if shift == 0 else 1 << 23
    words = torch.tensor([n for n in ends if low <= n < 1 << 24] + list(range(low, 1 << 24, 127))) << shift
    words = torch.cat([words, torch.tensor([2**32 - 1, 2**32 - 128, 2**32 - 129])]).clamp(max=2**32 - 1)
    bits = words.float().view(torch.int32).double()
    above = 110.2105 - bits * exact.EXPONENT_LN2 + gumbel(words).double()
    assert above.min() > 1e-4
    assert exact.BOUND - 110.2105 > 2.0**-12 + 0.03


def test_noise_is_gumbel():
    """Kolmogorov and Smirnov's distance of a million values; the critical value at 1e-6 is 2.7 / 1000."""
    values = -noise(torch.arange(100), torch.arange(100) * 7, 10_000).flatten().double()
    ordered = values.sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    distance = (torch.exp(-torch.exp(-ordered)) - steps).abs().max()
    assert distance < 2.7e-3
    # Neighbours in token, position and seed are not correlated.
    table = -noise(torch.arange(2), torch.arange(2), 10_000)
    for other in (torch.roll(table[0], 1), torch.roll(table[0], exact.BLOCK), table[1]):
        assert abs(torch.corrcoef(torch.stack([table[0], other]))[0, 1]) < 0.06


def test_masses():
    y = -torch.linspace(0, 16, 10_001)
    assert ((exp2_fixed(y).double() / 2**40 / torch.exp2(y.double()) - 1).abs() < 2e-7).all()
    assert exp2_fixed(torch.tensor([0.0, -1.0, -40.0, -41.0, -1e30, -math.inf, math.nan])).tolist() == [
        int(exact.EXP_6 * 2**23) << 17, int(exact.EXP_6 * 2**23) << 16, int(exact.EXP_6 * 2**23) >> 23, 0, 0, 0, 0
    ]  # fmt: skip
    assert 152_064 * (1 << 41) < 2**63
