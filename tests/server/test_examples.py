"""The examples run as they stand, against a server of the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_margingate.bench.servers.process import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "says"), [("openai_client", "log-probabilities exact, seed 7"), ("rl_rollouts", "structural, seed")]
)
def test_an_example_runs(canonical_server: Server, name: str, says: str) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), canonical_server.base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert says in done.stdout
