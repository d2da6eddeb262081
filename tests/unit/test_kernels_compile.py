"""Every Triton kernel compiles for six architectures, without a GPU, and fits each card (kernels/benchmarks/compile_cards.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("MARGINGATE_TRITON_PYTHON", sys.executable)
MOST_KEPT = 1500
"""Kernels in the cache; a run has some 200."""

SPILLED = 256
"""Bytes a thread: above this a kernel would run from memory instead of registers."""


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's own cache, kept between runs: it knows a kernel by its source, arguments, options, card and compiler.

    What compiled once is looked at again each time, and compiled again where any of these is another.
    """
    if not hasattr(pytestconfig, "cache"):  # -p no:cacheprovider
        return tmp_path_factory.mktemp("kernels")
    folder = pytestconfig.cache.mkdir("kernels")
    if sum(1 for _ in folder.iterdir()) > MOST_KEPT:
        shutil.rmtree(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    has = subprocess.run([PYTHON, "-c", "import triton.language"], capture_output=True, text=True)
    if has.returncode and "MARGINGATE_TRITON_PYTHON" not in os.environ:
        pytest.skip(f"{PYTHON} has no Triton; pip install --no-deps triton==3.6.0")
    folder = tmp_path_factory.mktemp("compiled")
    env = dict(os.environ, PYTHONPATH=str(ROOT / "kernels"), TRITON_CACHE_DIR=str(cache))
    env.pop("TRITON_INTERPRET", None)
    command = [PYTHON, "kernels/benchmarks/compile_cards.py", "--quick", "--json", str(folder / "found.json")]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (folder / "found.json").exists(), run.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_kernel_compiles_for_every_card_and_fits_it(compiled):
    assert [f"{r['case']} on {r['card']}: {r['problem']}" for r in compiled if r["problem"]] == []
    cards = {r["card"] for r in compiled}
    assert cards == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
    for kernel in {r["kernel"] for r in compiled}:
        assert {r["card"] for r in compiled if r["kernel"] == kernel} == cards, kernel


def test_no_kernel_lives_in_spilled_registers(compiled):
    assert [f"{r['case']} on {r['card']}: {r['spilled']}" for r in compiled if r["spilled"] > SPILLED] == []


def test_no_kernel_is_left_out(compiled):
    sources = (ROOT / "kernels" / "margingate_kernels").rglob("_triton*.py")
    names = {
        line.split("(")[0][4:] for path in sources for line in path.read_text().splitlines() if line.startswith("def ")
    }
    launched = {name for name in names if name.endswith("_kernel")}
    assert launched
    assert {r["kernel"] for r in compiled} == launched
