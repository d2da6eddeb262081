"""Prompts of the embedded model's held-out sets, in the forms that commands, evidence scripts and tests send."""

from __future__ import annotations

import random

from sglang_margingate.bench.servers.client import Prompt
from sglang_margingate.demo.chat import ASSISTANT, EOS, USER, render_prompt
from sglang_margingate.demo.corpora import HELDOUT, generate
from sglang_margingate.demo.prompts import interleaved_prompts

SHARES = (0.0, 0.3, 0.5, 0.7, 0.9)
GROUP = 10
SHOTS = 4


def demo_prompts(count: int) -> list[Prompt]:
    """Return ``count`` held-out prompts of the embedded model, spread evenly over its datasets."""
    prompts = interleaved_prompts("arith", "code", "story")[:count]
    return [Prompt(p.id, render_prompt(p.prompt), p.dataset) for p in prompts]


def shared_prompts(count: int) -> list[Prompt]:
    """Return prompts of worked examples, in groups of :data:`GROUP` that share a fixed part of their text.

    Group g shares the first ``SHARES[g % 5]`` of a body of :data:`SHOTS` worked examples; each prompt ends with a
    question of its own.
    """
    rng = random.Random(7)
    names = ("arith", "code", "story")
    questions = interleaved_prompts(*names)

    def body(dataset: str) -> str:
        shots = [generate(dataset, rng, HELDOUT) for _ in range(SHOTS)]
        return "".join(f"{USER}{d.prompt}{ASSISTANT}{d.completion}{EOS}" for d in shots)

    out = []
    for i in range(count):
        group, question = divmod(i, GROUP)[0], questions[i % len(questions)]
        dataset = names[group % 3]
        if i % GROUP == 0:
            common = body(dataset)
        own = body(dataset)
        keep = int(SHARES[group % len(SHARES)] * len(common))
        text = common[:keep] + own[keep:] + render_prompt(question.prompt)
        out.append(Prompt(f"p{i:03d}", text, question.dataset))
    return out


def conversations(count: int, turns: int) -> list[list[str]]:
    """Return the user messages of ``count`` conversations."""
    pool = [p.prompt for p in interleaved_prompts("story", "arith", "code")]
    return [[pool[(i * turns + t) % len(pool)] for t in range(turns)] for i in range(count)]
