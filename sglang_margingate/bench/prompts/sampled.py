"""Seeded sampling for a set of prompts: which parameters each is asked with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sglang_margingate.bench.servers.client import Prompt

COMMON: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.95, "frequency_penalty": 0.4},
    {"temperature": 1.2, "top_p": 0.8, "presence_penalty": 0.5},
)
"""What every OpenAI-compatible server knows."""

MORE: tuple[dict[str, Any], ...] = (
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.1},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 0.6, "repetition_penalty": 1.15},
    {"temperature": 0.9, "top_k": 5},
    {"temperature": 0.3, "top_p": 0.99, "repetition_penalty": 1.05, "presence_penalty": 0.2},
)
"""What SGLang knows beside that."""

WORDS = (
    {"temperature": 0.9, "logit_bias": {"11": 2.5, "40": -4.0}},
    {"temperature": 1.0, "regex": "[a-zA-Z0-9 .,+*=()']{10,160}"},
    {"temperature": 0.8, "regex": "[0-9]{1,3}( [a-z]{2,9}){2,12}", "top_p": 0.9},
)
"""Parameters that only make sense for a vocabulary that is known: the embedded model's."""


def seeded(prompts: Sequence[Prompt], seed: int = 0, words: bool = False, common: bool = False) -> list[Prompt]:
    """Return the prompts with a seed and sampling parameters each, the same ones at every call.

    Parameters
    ----------
    prompts
        Greedy ones.
    seed
        Another number gives other seeds; which parameters a prompt gets depends on its place alone.
    words
        Bias and grammars for the embedded model's vocabulary as well.
    common
        Only parameters that every OpenAI-compatible server knows.
    """
    kinds = COMMON if common else COMMON + MORE + (WORDS if words else ())
    rng = random.Random(f"seeded {seed}")
    out = []
    for number, prompt in enumerate(prompts):
        params = {**kinds[number % len(kinds)], "sampling_seed": rng.randrange(2**53)}
        out.append(replace(prompt, draw=tuple(params.items())))
    return out
