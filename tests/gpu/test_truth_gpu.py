"""Labels and columns on a GPU: runs truth.py once and asserts each of its checks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

CHECKS = ("sweep", "sweep-trace", "columns-embedded", "columns-chaotic", "chaotic-scoring", "chaotic-retracted",
          "ungated-differs", "broken")  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    out = tmp_path_factory.mktemp("truth")
    here = Path(__file__).resolve().parent
    command = [sys.executable, str(here / "truth.py"), "--out", str(out)]
    done = subprocess.run(command, cwd=here.parents[1], capture_output=True, text=True, check=False)
    print(done.stdout[-8000:], done.stderr[-4000:])
    return json.loads((out / "truth.json").read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_it_holds(found: Mapping[str, Any], name: str) -> None:
    assert name in found, "the run ended before this check"
    assert found[name]["problems"] == []
