"""The Triton kernels in Triton's interpreter, on the CPU: tests/gpu/test_*_gpu.py, each kernel's in a process of its own.

Triton reads TRITON_INTERPRET when it is first imported, and SGLang's CPU tests put a stand-in in Triton's place, so the
checks cannot run inside this process. ``MARGINGATE_TRITON_PYTHON`` names another Python that has Triton (and torch and
pytest) when this one has none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("MARGINGATE_TRITON_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def python_with_triton() -> str:
    probe = subprocess.run([PYTHON, "-c", "import triton.language, torch, pytest"], capture_output=True, text=True)
    if probe.returncode:
        reason = probe.stderr.strip().splitlines()[-1:] or ["no reason given"]
        if "MARGINGATE_TRITON_PYTHON" in os.environ:
            pytest.fail(f"MARGINGATE_TRITON_PYTHON={PYTHON} cannot run the kernels: {reason[0]}")
        pytest.skip(f"{PYTHON} cannot run Triton's interpreter ({reason[0]}); pip install --no-deps triton==3.6.0")
    return PYTHON


@pytest.mark.parametrize(
    "kernel", ["top2", "kv_column", "digest", "decode_attention", "prefill_attention", "draw", "rank_sum", "cases"]
)
def test_kernel_in_the_interpreter(kernel, python_with_triton):
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    env.pop("PYTEST_ADDOPTS", None)
    command = [python_with_triton, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kernel]
    own = ("draw", "rank_sum", "cases")
    tests = f"tests/gpu/test_{kernel if kernel in own else 'kernels'}_gpu.py"
    run = subprocess.run([*command, tests], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
