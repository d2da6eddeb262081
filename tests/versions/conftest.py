"""Servers of every tested SGLang on the CPU; ``make test-versions`` alone runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from served_versions import PROMPTS

from sglang_margingate.bench.prompts.embedded import demo_prompts, shared_prompts
from sglang_margingate.bench.servers.client import Prompt


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.versions)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the servers' invariance maps out of the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Short prompts of each dataset and, by turns, longer ones that share a beginning: those hit the cache."""
    short, shared = demo_prompts(PROMPTS // 2), shared_prompts(PROMPTS)[::2]
    return [prompt for pair in zip(short, shared) for prompt in pair]
