"""The Triton kernels in Triton's interpreter, on the CPU: tests/gpu/test_*_gpu.py, in a process of their own.

Triton reads TRITON_INTERPRET when it is first imported, and SGLang's CPU tests put a stand-in in Triton's place, so the
checks cannot run inside this one. ``MARGINGATE_TRITON_PYTHON`` names another Python that has Triton (and torch and
pytest) when this one has none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

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


KERNELS = ["top2", "kv_column", "digest", "decode_attention", "prefill_attention", "draw", "rank_sum", "cases"]


@pytest.fixture(scope="module")
def outcomes(python_with_triton: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the checks of all kernels, in one process: imports cost as much as some kernels do. What became of each, by name."""
    env = dict(os.environ, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), env.get("PYTHONPATH")]))
    env.pop("PYTEST_ADDOPTS", None)
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [python_with_triton, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    files = [f"tests/gpu/test_{name}_gpu.py" for name in ("kernels", "draw", "rank_sum", "cases")]
    run = subprocess.run([*command, *files], cwd=ROOT, env=env, capture_output=True, text=True)
    assert report.exists(), run.stdout[-4000:] + run.stderr[-2000:]
    cases = ElementTree.parse(report).getroot().iter("testcase")
    found = {f"{case.get('classname')}::{case.get('name')}": "".join(problem(part) for part in case) for case in cases}
    assert run.returncode == 0 or any(found.values()), run.stdout[-4000:] + run.stderr[-2000:]
    return found


def problem(part: ElementTree.Element) -> str:
    return (part.text or part.tag)[-4000:] if part.tag in ("failure", "error") else part.tag * (part.tag == "skipped")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_in_the_interpreter(kernel: str, outcomes: dict[str, str]) -> None:
    of_it = {name: what for name, what in outcomes.items() if kernel in name}
    assert [f"{name}: {what}" for name, what in of_it.items() if what not in ("", "skipped")] == []
    assert "" in of_it.values(), "no check of it ran"


def test_no_check_is_left_out(outcomes: dict[str, str]) -> None:
    assert [name for name in outcomes if not any(kernel in name for kernel in KERNELS)] == []
