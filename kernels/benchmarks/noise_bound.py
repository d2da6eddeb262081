"""Compare the bound of a token's noise (``noise.BOUND``) with the noise of every one of the 2**32 words, on the CPU.

    python kernels/benchmarks/noise_bound.py

Words that are one number in fp32 have one noise and one bound, so 83 million of them stand for all. The exit status is 1 where the
noise is above its bound anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from margingate_kernels.seeded.noise import BOUND, EXPONENT_LN2, gumbel

TIGHT = 110.2105
"""log(2) * 159, rounded up: what is left of ``BOUND`` is for rounding."""
MANTISSAS, RUN = 1 << 24, 1 << 20


def words() -> Iterator[torch.Tensor]:
    """Return every word below 2**24, then every number of 24 bits times each power of two; 2**32 - 1 rounds to 2**32."""
    for shift in range(9):
        for first in range(0 if shift == 0 else MANTISSAS // 2, MANTISSAS, RUN):
            yield torch.arange(first, first + RUN) << shift
    yield torch.tensor([2**32 - 1])


def main() -> int:
    """Print how far the noise stays below."""
    least = float("inf")
    for some in words():
        bits = some.float().view(torch.int32).double()
        least = min(least, (TIGHT - bits * EXPONENT_LN2 + gumbel(some).double()).min().item())
    print(f"the noise of every word is at least {least:.3g} below {TIGHT} - n * 2**-23 * log(2); BOUND is {BOUND}")
    return 0 if least > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
