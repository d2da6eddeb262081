"""The committed held-out prompt sets, and the command that draws them.

``python -m sglang_margingate.demo.prompts --out DIR``
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

from sglang_margingate.demo.corpora import CORPORA, HELDOUT, generate, get_corpus
from sglang_margingate.demo.paths import prompts_path

PROMPTS_EACH = 200
SEED = 20_000


class Prompt(NamedTuple):
    """One held-out prompt as plain user text; `chat.render_prompt` puts it into the chat template."""

    id: str
    prompt: str
    dataset: str
    answer: str | None = None
    """The right number, for ``arith``."""


def load_prompts(dataset: str, limit: int | None = None) -> list[Prompt]:
    """Read the committed held-out prompts of one dataset, in their fixed order."""
    get_corpus(dataset)
    lines = (prompts_path() / f"{dataset}.jsonl").read_text(encoding="utf-8").splitlines()
    return [Prompt(**json.loads(line)) for line in lines[:limit]]


def interleaved_prompts(*datasets: str) -> list[Prompt]:
    """Read the committed prompts of several datasets, the datasets taking turns."""
    return [prompt for turn in zip(*(load_prompts(name) for name in datasets)) for prompt in turn]


def draw_prompts(dataset: str, count: int = PROMPTS_EACH, seed: int = SEED) -> list[Prompt]:
    """Draw `count` held-out prompts, no template instance twice."""
    get_corpus(dataset)
    rng = random.Random(f"{seed}:{dataset}")
    seen: set[str] = set()
    prompts: list[Prompt] = []
    while len(prompts) < count:
        document = generate(dataset, rng, HELDOUT)
        if document.key not in seen:
            seen.add(document.key)
            prompts.append(Prompt(f"{dataset}-{len(prompts):03d}", document.prompt, dataset, document.answer))
    return prompts


def main() -> None:
    """Write the prompt sets."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.demo.prompts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for dataset in CORPORA:
        rows = ({k: v for k, v in p._asdict().items() if v is not None} for p in draw_prompts(dataset))
        (args.out / f"{dataset}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {PROMPTS_EACH} prompts for each of {', '.join(CORPORA)} to {args.out}")


if __name__ == "__main__":
    main()
