"""What doctor compares and repeats on a GPU, on a GPU or in Triton's interpreter.

    PYTHONPATH=.:kernels python3 -m pytest tests/gpu/test_cases_gpu.py
    PYTHONPATH=.:kernels TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= python3 -m pytest tests/gpu/test_cases_gpu.py

CI has no GPU: there tests/unit/test_kernels_interpreter.py starts the second command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from margingate_kernels._backend import has_triton

sys.path.append(str(Path(__file__).resolve().parents[2]))

from sglang_margingate.bench.kernels import cases, repeat, run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SHAPE = cases.Shape(4, 2, 16, 64, 96, 131) if INTERPRETED else cases.Shape()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def small(monkeypatch):
    """In the interpreter requests are short, and of a type whose products it can do."""
    if INTERPRETED:
        monkeypatch.setattr(cases, "DTYPE", torch.float16)
        monkeypatch.setattr(cases, "PREFILLS", {"two": ((0, 40), (17, 5))})
        monkeypatch.setattr(cases, "DECODES", ([64, 1, 129],))
        monkeypatch.setattr(cases, "MANY_ROWS", (3,))


@pytest.mark.usefixtures("small")
def test_cases_hold_and_repeat():
    torch.manual_seed(0)
    made = list(cases.of_a_gpu(SHAPE, DEVICE))
    found = [case for case in made if isinstance(case, cases.Case)]
    names = " ".join(case.name for case in found)
    for kernel in ("prefill ours", "decode", "top2_margin", "seeded draw", "row_digest", "kv_column", "linear down"):
        assert kernel in names
    for case in found:
        row = run.compare(case)
        assert row["holds"], row
    if INTERPRETED:
        return
    for case in found:
        calls, differed, _ = repeat.Repeated(case.name, case.call).run(0.05, None)
        assert calls >= repeat.CALLS
        assert differed == 0, case.name
