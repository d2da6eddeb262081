"""The canonical radix cache on the tree of every tested SGLang: the same scenes end in the same way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served_versions import VERSIONS, environment


def scenes(version: str) -> dict[str, dict[str, int]]:
    program = Path(__file__).parents[1] / "support" / "radix_scenarios.py"
    env = {**os.environ, **environment(version)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def first() -> dict[str, dict[str, int]]:
    return scenes(VERSIONS[0])


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_who_shares_what_is_the_same(version: str, first: dict[str, dict[str, int]]) -> None:
    """tests/unit/test_radix_cache.py says what it has to be, on the installed version."""
    found = scenes(version)
    assert found.pop("salted") == {"other": 0, "same": 8, "ungated": 0, "leaked": 0}
    assert found == first
