"""top2_margin: its reference against a sort, and the Triton kernel in its interpreter against the reference.

The interpreter reads TRITON_INTERPRET when Triton is first imported, and its kernels then run on CPU tensors only, so
those tests run in a process of their own (see test_kernels_interpreter.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from margingate_kernels import Top2, Workspace, top2_margin, top2_margin_reference
from margingate_kernels.choice.top2_margin import top2_host

INF, NAN = math.inf, math.nan


def by_sorting(row: list[float]) -> tuple[int, int]:
    """Token and runner-up from a stable sort, NaN as -inf."""
    order = sorted(range(len(row)), key=lambda i: (INF if math.isnan(row[i]) else -row[i], i))
    return order[0], order[1]


@pytest.mark.parametrize(
    ("row", "token", "second", "margin", "trigger"),
    [
        ([1.0, 3.0, 2.0], 1, 2, 1.0, False),
        ([1.0, 3.0, 2.5], 1, 2, 0.5, True),  # margin == threshold triggers
        ([3.0, 3.0, 3.0], 0, 1, 0.0, True),
        ([1.0, 3.0, 3.0], 1, 2, 0.0, True),
        ([0.0, -0.0], 0, 1, 0.0, True),
        ([-INF, 2.0, -INF], 1, 0, INF, False),  # a single unmasked token
        ([2.0, -INF, -INF], 0, 1, INF, False),
        ([-INF, -INF, -INF], 0, 1, NAN, True),
        ([NAN, NAN], 0, 1, NAN, True),
        ([NAN, 1.0, NAN], 1, 0, INF, False),
        ([NAN, 1.0, 4.0], 2, 1, 3.0, False),
        ([INF, 1.0, 4.0], 0, 2, INF, False),
        ([1.0, INF, INF], 1, 2, NAN, True),
        ([-INF, NAN, 7.0, -INF], 2, 0, INF, False),
    ],
)
def test_edge_rows(row, token, second, margin, trigger):
    got = top2_margin(torch.tensor([row]), torch.tensor([0.5]))
    assert (got.token.item(), got.second.item()) == (token, second)
    assert got.margin.item() == margin or (math.isnan(margin) and math.isnan(got.margin.item()))
    assert got.trigger.item() is trigger


def test_reference_against_a_sort():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-4, 4, (200, 17), generator=generator).float()
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -INF
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = NAN
    got = top2_margin_reference(logits, torch.zeros(200))
    assert list(zip(got.token.tolist(), got.second.tolist())) == [by_sorting(r) for r in logits.tolist()]


def test_nan_threshold_triggers():
    assert top2_margin(torch.tensor([[0.0, 9.0]]), torch.tensor([NAN])).trigger.item() is True


def test_no_rows():
    got = top2_margin(torch.empty(0, 8), torch.empty(0))
    assert [t.shape for t in got] == [(0,)] * 4
    assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.float32, torch.bool]


@pytest.mark.parametrize(
    ("logits", "thresholds", "error"),
    [
        (torch.zeros(2, 1), torch.zeros(2), ValueError),
        (torch.zeros(4), torch.zeros(4), ValueError),
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2), TypeError),
        (torch.zeros(4, 2).T, torch.zeros(2), ValueError),
        (torch.zeros(2, 4), torch.zeros(3), ValueError),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.float64), ValueError),
    ],
)
def test_bad_input(logits, thresholds, error):
    with pytest.raises(error):
        top2_margin(logits, thresholds)


def test_workspace_and_out_are_used():
    logits, thresholds = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]]), torch.zeros(2)
    workspace = Workspace(4, 3, "cpu")
    first = top2_margin(logits, thresholds, workspace=workspace)
    assert first.token.tolist() == [1, 0]
    assert top2_margin(logits.flip(0), thresholds, workspace=workspace).token is first.token
    assert first.token.tolist() == [0, 1]
    out = Top2(*(torch.zeros_like(t) for t in first))
    assert top2_margin(logits, thresholds, out=out) is out
    assert out.token.tolist() == [1, 0]
    with pytest.raises(ValueError, match="does not fit"):
        top2_margin(torch.zeros(5, 3), torch.zeros(5), workspace=workspace)
    with pytest.raises(ValueError, match="does not fit"):
        top2_margin(torch.zeros(2, 4), torch.zeros(2), workspace=workspace)


@pytest.mark.parametrize(
    "logits",
    [
        torch.randn(16, 2048, generator=torch.Generator().manual_seed(0)),
        torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16().float(),  # many exact ties
        torch.tensor([[1e-30, 3e38, -3e38], [1.0, 1.0 + 2**-23, -5e20]]),  # rounding, and a margin beyond fp32
        torch.tensor([[0.0, 2.0, 1.0], [1.0, INF, INF], [NAN, 1.0, NAN]]),
        torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).bfloat16(),
        torch.empty(0, 8),
    ],
    ids=["plain", "ties", "rounding", "not finite", "bf16", "no rows"],
)
def test_host_numbers_are_the_references_to_the_bit(logits):
    before, want = logits.clone(), top2_margin_reference(logits, torch.zeros(len(logits)))
    token, second, margin = top2_host(logits)
    assert torch.equal(token, want.token)
    assert second == want.second.tolist()
    assert torch.equal(torch.tensor(margin).view(torch.int32), want.margin.view(torch.int32))
    assert torch.equal(logits.nan_to_num(0.5), before.nan_to_num(0.5)), "the logits are put back"
