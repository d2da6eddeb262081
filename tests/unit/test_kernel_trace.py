"""tests/gpu/kernel_trace.py: what a trace says of the GPU's time."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
kernel_trace = __import__("kernel_trace")


def event(name: str, begin: float, took: float, cat: str = "kernel") -> dict[str, Any]:
    return {"name": name, "ts": begin, "dur": took, "cat": cat}


EVENTS = [
    event("ignored", 0, 500, "cpu_op"),
    {"name": "mark", "ts": 5, "cat": "kernel"},
    event("top2_kernel", 90, 10),
    event("nvjet_tst_192x8", 150, 100),
    event("FlashAttnFwdSm90<cutlass>", 240, 60),  # on another stream: 10 us beside the product
    event("Memcpy DtoH", 300, 10, "gpu_memcpy"),
    event("at::native::reduce_kernel<ArgMaxOps>", 400, 20),
    event("nvjet_tst_192x8", 420, 80),
    event("top2_kernel", 500, 10),
]


def test_a_forward_lies_between_two_choices_and_its_waits_are_what_no_kernel_fills() -> None:
    first, second = kernel_trace.forwards(kernel_trace.work_of(EVENTS))
    assert (first.span_us, first.busy_us, first.waits_us) == (320, 180, 140)
    assert first.longest_wait_us == 90
    assert first.by_kind == {"gemm": 100, "attention": 60, "copies": 10, "choice": 20}
    assert (second.span_us, second.busy_us, second.kernels) == (90, 90, 2)


def test_the_summary_is_of_all_forwards(tmp_path: Path) -> None:
    path = tmp_path / "a.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": EVENTS[::-1]}, file)
    work = kernel_trace.read(path)
    found = kernel_trace.summary(kernel_trace.forwards(work))
    assert found["forwards"] == 2
    assert found["mean_ms"] == pytest.approx(0.205)
    assert found["mean_wait_ms"] == pytest.approx(0.07)
    assert found["busy"] == pytest.approx(270 / 410)
    assert kernel_trace.top(work, 1) == [("nvjet_tst_192x8", 2, pytest.approx(0.18))]


def test_without_two_choices_nothing_is_said() -> None:
    assert kernel_trace.summary(kernel_trace.forwards(kernel_trace.work_of(EVENTS[:4]))) == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fused_add_rmsnorm", "small"), ("decode_kernel", "attention"), ("void cutlass::Kernel2", "gemm"), ("what", "other"),
     ("void at::native::vectorized_elementwise_kernel<4>", "copies")],
)  # fmt: skip
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kernel_trace.kind_of(name) == kind
