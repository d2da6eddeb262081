"""Sampled requests: which have a seed that is kept, what is wrong with their parameters, and the seeds of a group's samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_margingate.config import ConfigError

LEAST_SEED, LARGEST_SEED = -(2**63), 2**63 - 1
"""What SGLang carries as a seed; OpenAI's documents name the same range."""

DERIVED_BITS = 53
"""Bits of a derived seed: every JSON reader keeps a whole number of so many."""

HOTTEST = 1e30
"""A higher temperature leaves nothing of the logits; fp32 ends at 3e38, and noise is multiplied by it."""

NUMBERS = ("temperature", "top_p", "min_p")
"""Parameters that are numbers; SGLang checks their ranges."""


def check_sampling(params: Mapping[str, Any]) -> None:
    """Check the parameters that a seeded draw stands on, before SGLang makes anything of them.

    Parameters
    ----------
    params
        A request's ``sampling_params``. OpenAI's ``seed`` is ``sampling_seed`` there.

    Raises
    ------
    ConfigError
        One line that names the field, the value and the fix; the server answers it as HTTP 400.
    """
    seed = params.get("sampling_seed")
    if seed is not None and (type(seed) is not int or not LEAST_SEED <= seed <= LARGEST_SEED):
        raise ConfigError(
            f"sampling_seed (seed): {seed!r:.80} is not a whole number from {LEAST_SEED} to {LARGEST_SEED}; "
            "give one, or leave it out for a draw that nobody can repeat"
        )
    for name in NUMBERS:
        value = params.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{name}: {value!r:.80} is not a number; give one, or leave it out")
    min_p, top_k = params.get("min_p"), params.get("top_k")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"min_p: {min_p!r:.80} is no share; give a number from 0 (no filter) to 1")
    if top_k is not None and type(top_k) is not int:
        raise ConfigError(f"top_k: {top_k!r:.80} is not a whole number; give one from 1, or -1 for all tokens")
    temperature = params.get("temperature")
    if temperature is not None and not -HOTTEST <= temperature <= HOTTEST:
        raise ConfigError(
            f"temperature: {temperature!r:.80} is not finite, or beyond {HOTTEST:g}; give a number from 0"
        )


def derived_seed(seed: int, sample: int) -> int:
    """Return the seed of one of a group's samples (``n`` above 1).

    Sample 0 has the seed itself, so a request for one sample and the first of a group are the same; sample i has the lowest 53 bits of
    SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of ``seed + i * 0x9E3779B97F4A7C15``. Its summary tells it, and a request with that
    seed and ``n`` 1 gives the sample again.

    Parameters
    ----------
    seed
        The request's.
    sample
        Which sample of the group, from 0.
    """
    if sample == 0:
        return seed
    mask = (1 << 64) - 1
    x = (seed + sample * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) & ((1 << DERIVED_BITS) - 1)
