"""The seeded draw's Triton kernels against their reference, to the bit, on a GPU or in Triton's interpreter.

    PYTHONPATH=kernels python3 -m pytest tests/gpu/test_draw_gpu.py
    PYTHONPATH=kernels TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= python3 -m pytest tests/gpu/test_draw_gpu.py

CI has no GPU: there tests/unit/test_kernels_interpreter.py starts the second command.
"""

from __future__ import annotations

import importlib
import math
import os

import pytest
import torch
from margingate_kernels import Workspace
from margingate_kernels._backend import has_triton, use_triton
from margingate_kernels.seeded import Draw, Drawn, draw, draw_reference, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SAMPLE = "margingate_kernels.seeded.sample"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU")

DRAWS = [
    None, Draw(7, 0.8), Draw(2**40 + 3, 1.3, 50), Draw(-9, 0.7, 0, 0.9), Draw(3, 0.9, 0, 1.0, 0.05), Draw(11, 1.1, 40, 0.8, 0.1, 0.5),
    Draw(12, 2.0, 5000, 0.99, 0.0, 3.0), Draw(5, 0.01), Draw(2**63 - 1, 1.0, 1, 1.0, 1.0),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(f"{SAMPLE}._FILTER_BLOCK", 64)


def rows_of(vocab: int, rows: int = len(DRAWS), seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits with many exact ties, as a bf16 product has them."""
    made = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab + seed)) * 3).bfloat16().to(dtype)
    made[3, 1::2] = -math.inf
    return made.to(DEVICE)


def packed_of(draws: list[Draw | None], first: int = 30) -> torch.Tensor:
    return pack(draws, range(first, first + len(draws))).to(DEVICE)


def assert_same(got: Drawn, want: Drawn) -> None:
    assert torch.equal(got.token.cpu(), want.token)
    assert torch.equal(got.second.cpu(), want.second)
    torch.testing.assert_close(got.margin.cpu(), want.margin, rtol=0, atol=0, equal_nan=True)


def check(logits: torch.Tensor, packed: torch.Tensor) -> Drawn:
    assert use_triton(logits)
    got = draw(logits, packed)
    assert_same(got, draw_reference(logits.cpu(), packed.cpu()))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [2, 131] if INTERPRETED else [2, 5, 1023, 2048, 4097, 32000, 128256, 151936])
def test_draw_is_the_references(vocab, dtype):
    check(rows_of(vocab, dtype=dtype), packed_of(DRAWS))


@pytest.mark.parametrize(("block", "groups"), [(128, 2), (256, 4), (1024, 2)])
def test_draw_does_not_depend_on_how_a_row_is_cut(block, groups, monkeypatch):
    module = importlib.import_module(SAMPLE)
    cut = lambda vocab, _rows: module._Split(block, groups, 4, -(-vocab // (groups * 4096)))  # noqa: E731
    monkeypatch.setattr(module, "_split", cut)
    draws = [Draw(i, 0.8) for i in range(4)]
    check(rows_of(4097 if INTERPRETED else 100_000, 4), packed_of(draws))


def test_draw_special_values():
    inf, nan = math.inf, math.nan
    rows = [
        [-inf] * 6,
        [nan, 1.0, nan, 2.0, -inf, 0.0],
        [inf, 1.0, 0.0, inf, 0.0, -inf],
        [0.0, -0.0, 0.0, 0.0, -0.0, 0.0],
    ]
    draws = (None, Draw(3, 1.0), Draw(3, 1.0, 2), Draw(3, 1.0, 2, 0.5, 0.5))
    check(torch.tensor([row for row in rows for _ in draws], device=DEVICE), packed_of([*draws] * len(rows)))


def test_draw_where_the_best_tokens_share_a_lane():
    """A lane keeps one token; its others are looked at where their bound reaches the second best of the lanes."""
    lanes, vocab = importlib.import_module(SAMPLE)._split(4096, 1).block, 4096
    logits = torch.full((7, vocab), -math.inf)
    logits[0, [5, 5 + lanes]] = 1.0  # the only two
    logits[1, 7::lanes] = torch.arange(vocab // lanes).float()  # one lane holds all
    logits[2, [9, 9 + lanes, 9 + 2 * lanes, 300]] = torch.tensor([8.0, 8.0, 8.0, 2.0])
    logits[3, [3, 3 + lanes, 4]] = torch.tensor([math.nan, 1.0, 0.0])
    logits[4] = rows_of(vocab, 4)[0].cpu()
    logits[5, 11::lanes] = 1e30  # noise is lost in the rounding: ties, to the lowest id
    logits[5, 12::lanes] = 1e30
    logits[6, [20, 20 + lanes, 21]] = math.inf
    for draws in (
        [Draw(i, 0.8) for i in range(7)],
        [None] * 7,
        [Draw(i, t) for i, t in enumerate((1e-38, 1e-9, 1e37, 1e30, 0.5, 1e-30, 40.0))],
    ):
        check(logits.to(DEVICE), packed_of(draws))


def test_draw_many_close_scores():
    """Logits in few steps, so that many bounds lie close to the second best score, at temperatures that let one or the other decide."""
    made = torch.randint(0, 3, (4, 4096), generator=torch.Generator().manual_seed(9)).float().to(DEVICE)
    for temperatures in ((0.05, 0.2, 1.0, 3.0), (10.0, 100.0, 0.001, 0.5)):
        check(made, packed_of([Draw(i, t) for i, t in enumerate(temperatures)]))


def test_draw_row_invariance():
    """A row's result is the same alone, in any batch and at any place, whatever its neighbours ask for."""
    draws = [DRAWS[i] for i in ((5, 1, 2, 3) if INTERPRETED else range(len(DRAWS)))]
    logits = rows_of(70 if INTERPRETED else 128256, len(draws))
    packed = packed_of(draws)
    together = Drawn(*(t.clone() for t in draw(logits, packed)))
    for i in range(len(draws)) if not INTERPRETED else (0, 2):
        alone = draw(logits[i : i + 1], packed[i : i + 1])
        assert_same(alone, Drawn(*(t[i : i + 1].cpu() for t in together)))
    order = [2, 0, 3, 1] if INTERPRETED else [4, 8, 0, 2, 7, 1, 6, 3, 5]
    assert_same(draw(logits[order], packed[order].contiguous()), Drawn(*(t[order].cpu() for t in together)))


def test_draw_strided_rows_and_workspace():
    draws = [DRAWS[2], DRAWS[1]]
    wide, workspace = rows_of(150, 4), Workspace(2, 100, DEVICE)
    for first in (3, 99):
        packed, rows = packed_of(draws, first), wide[::2, 1:101]
        assert_same(draw(rows, packed, workspace=workspace), draw_reference(rows.cpu(), packed.cpu()))
    with pytest.raises(ValueError, match="does not fit"):
        draw(wide[:2], packed_of(draws), workspace=workspace)


@needs_cuda
def test_draw_many_rows():
    """As many rows as an H100 needs for the large programs, all of them seeded."""
    check(rows_of(128256, 64), packed_of([Draw(i, 0.5 + i / 50) for i in range(64)]))


@needs_cuda
def test_draw_graph_capture():
    logits, packed = rows_of(128256), packed_of(DRAWS)
    workspace = Workspace(len(DRAWS), 128256, DEVICE)
    draw(logits, packed, workspace=workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        draw(logits, packed, workspace=workspace)
    for seed in (1, 2):
        logits.copy_(rows_of(128256, seed=seed))
        graph.replay()
        assert_same(Drawn(*workspace.out(len(DRAWS))[:3]), draw_reference(logits.cpu(), packed.cpu()))
