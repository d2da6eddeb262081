"""The trial of a prefill kernel by itself: what is right and depends on its context alone passes, all else is named."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sglang_margingate.canonical import attention_probe

HEADS, KV_HEADS, DIM = 4, 2, 16
SHAPE = HEADS, KV_HEADS, DIM


class Rows:
    """Attends row by row over its own columns, so nothing else can enter; what is broken on purpose is said by ``fault``."""

    fault = ""

    def __init__(self, q_heads: int, kv_heads: int, head_dim: int, device: Any) -> None:
        assert (q_heads, kv_heads, head_dim, device) == (*SHAPE, "cpu")

    def plan(self, queries: Any, columns: Any, most_tokens: int, ends: Any = None) -> None:
        self.queries = queries.tolist()
        self.table = ends is not None
        begins, stops = (columns, ends) if ends is not None else (columns[:-1], columns[1:])
        self.contexts = list(zip(begins.tolist(), stops.tolist()))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float) -> Any:
        out = torch.zeros_like(q)
        for r, ((first, last), (begin, end)) in enumerate(zip(itertools.pairwise(self.queries), self.contexts)):
            for row in range(first, last):
                seen = indices[begin : end - (last - row) + 1].long()
                keys, values = (x[seen].float().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
                weights = (torch.einsum("hd,thd->ht", q[row].float(), keys) * scale).softmax(-1)
                y = torch.einsum("ht,thd->hd", weights, values)
                out[row] = (y * (1 + self.off(row - first, last - first, r, seen))).to(q.dtype)
        return out

    def off(self, at: int, new: int, request: int, seen: torch.Tensor) -> float:
        bad = {
            "": False,
            "companions": len(self.contexts) > 3 and request == 2,
            "chunks": at == 0 and len(seen) == 14,
            "a cached prefix": new < 8 and len(self.contexts) > 3,
            "other slots": bool((seen >= attention_probe.SLOTS // 2).all()) and len(self.contexts) == 1,
            "a table, and padding": self.table and at == 5,
            "wrong": at == 3,
        }[self.fault]
        return 0.03 * bad if self.fault != "wrong" else 0.3 * bad


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_probe, "ASKED", ((17, 17), (40, 40), (90, 20)))
    monkeypatch.setattr(attention_probe, "OTHERS", ((0, 3), (20, 1), (9, 4), (3, 1)))
    monkeypatch.setattr(attention_probe, "SLOTS", 240)
    monkeypatch.setattr(attention_probe, "PADDING", 7)


def kind(fault_: str) -> type[Rows]:
    class Broken(Rows):
        fault = fault_

    return Broken


def test_a_kernel_that_holds_passes() -> None:
    assert attention_probe.wrong(Rows, SHAPE, torch.bfloat16, "cpu") is None
    assert attention_probe.changed(Rows, SHAPE, torch.bfloat16, "cpu") is None


@pytest.mark.parametrize("fault", ["companions", "chunks", "a cached prefix", "other slots", "a table, and padding"])
def test_what_bits_depend_on_is_named(fault: str) -> None:
    found = attention_probe.changed(kind(fault), SHAPE, torch.bfloat16, "cpu")
    assert found is not None
    assert fault in found
    assert "columns" in found


def test_a_wrong_kernel_is_found() -> None:
    assert "not close" in str(attention_probe.wrong(kind("wrong"), SHAPE, torch.bfloat16, "cpu"))


def test_a_kernel_that_does_not_run_is_found() -> None:
    class Raises(Rows):
        def __call__(self, *_: Any) -> Any:
            raise RuntimeError("out of resource:\n shared memory")

    assert attention_probe.wrong(Raises, SHAPE, torch.bfloat16, "cpu") == "out of resource: shared memory"
    with pytest.raises(RuntimeError, match="out of resource"):
        attention_probe.changed(Raises, SHAPE, torch.bfloat16, "cpu")
