"""Rollouts for reinforcement learning: groups of samples whose every token and log-probability can be had again.

    python examples/rl_rollouts.py http://127.0.0.1:30000

Each prompt gets a group of four samples in one request. The group's seed gives every sample a seed of its own, which its summary
tells: asked for alone with that seed, later and beside other traffic, a sample is the same, so a reward that looks wrong can be
looked into, and log-probabilities of the policy need no second pass.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

GROUP, TOKENS = 4, 32
PROMPTS = ("Once upon a time", "The small dog", "One day, a girl", "There was a big tree")


def rollout(http: httpx.Client, prompt: str, seed: int, n: int = 1) -> list[dict[str, Any]]:
    """Return ``n`` samples of a prompt, with log-probabilities."""
    params = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": TOKENS, "sampling_seed": seed, "n": n}
    answer = http.post("/generate", json={"text": prompt, "sampling_params": params, "return_logprob": True})
    answer.raise_for_status()
    found = answer.json()
    return found if isinstance(found, list) else [found]


def reward(sample: dict[str, Any]) -> float:
    """Score a sample: here, how many different tokens it has."""
    return len(set(sample["output_ids"])) / TOKENS


def main(url: str) -> None:
    """Sample all groups at once, then draw the best sample of each again, alone."""
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(len(PROMPTS)) as pool:
        groups = list(pool.map(lambda job: rollout(http, job[1], 1000 + job[0], GROUP), enumerate(PROMPTS)))
        for prompt, group in zip(PROMPTS, groups):
            mean = sum(map(reward, group)) / GROUP
            best = max(group, key=reward)
            claims = best["meta_info"]["margingate"]
            (again,) = rollout(http, prompt, claims["seed"])
            assert again["output_ids"] == best["output_ids"], "the same seed, other tokens"
            assert again["meta_info"]["output_token_logprobs"] == best["meta_info"]["output_token_logprobs"]
            assert len({tuple(sample["output_ids"]) for sample in group}) > 1, "the samples of a group differ"
            print(f"{prompt!r}: advantage {reward(best) - mean:+.3f}, {claims['guarantee']}, seed {claims['seed']}")


if __name__ == "__main__":
    main(sys.argv[1])
