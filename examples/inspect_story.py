"""An inspect_ai task against a server with margingate: seeded, so that a sample can be looked into again.

pip install inspect-ai "openai>=3.4"
SGLANG_BASE_URL=http://127.0.0.1:30000/v1 SGLANG_API_KEY=none \
        inspect eval examples/inspect_story.py --model openai-api/sglang/default --seed 7 --max-connections 16
"""

from __future__ import annotations

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate


@task
def story() -> Task:
    """Ask for stories; look for a word."""
    asks = [
        f"Tell me a story about a {animal}." for animal in ("dog", "cat", "bird", "fish", "bear", "fox", "frog", "duck")
    ]
    return Task([Sample(input=ask, target="the") for ask in asks], solver=generate(max_tokens=48), scorer=includes())
