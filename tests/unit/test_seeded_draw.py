"""Seeded draws: the right distribution under each filter, and a margin that no small change of the logits escapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from margingate_kernels import top2_margin_reference
from margingate_kernels.seeded import Draw, draw, draw_reference, pack

INF, NAN = math.inf, math.nan
DRAWS = 20_000

LOGITS = torch.tensor([2.0, 1.5, 1.5, 0.75, 0.5, 0.0, -0.5, -1.0, -1.0, -2.0, -3.5, -INF])


def kept(logits: torch.Tensor, d: Draw) -> torch.Tensor:
    """Which tokens the filters keep, said another way than the reference says it: one token at a time, in float64."""
    p = torch.softmax(logits.double() / d.temperature, 0)
    keep = []
    for value, share in zip(logits, p):
        above = logits > value
        keep.append(
            (not d.top_k or int(above.sum()) < d.top_k)
            and (d.top_p >= 1 or p[above].sum() < d.top_p)
            and share >= d.min_p * p.max()
            and value > -INF
        )
    return torch.tensor(keep)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic over the cells that are expected at all, less its mean, in standard deviations."""
    cells = expected > 0
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum().item()
    freedom = int(cells.sum()) - 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))


FILTERS = [
    Draw(1, 1.0), Draw(2, 0.6), Draw(3, 1.7), Draw(4, 1.0, top_k=4), Draw(5, 1.0, top_k=2), Draw(6, 1.0, top_p=0.8),
    Draw(7, 0.7, top_p=0.45), Draw(8, 1.2, min_p=0.2), Draw(9, 1.0, top_k=7, top_p=0.9, min_p=0.05), Draw(10, 1.0, top_k=12),
    Draw(11, 1.0, top_k=10**9), Draw(12, 0.9, top_p=0.999), Draw(13, 1.0, min_p=1.0), Draw(14, 3.0, 5, 0.99, 0.01),
]  # fmt: skip


@pytest.mark.parametrize("d", FILTERS, ids=str)
@pytest.mark.parametrize("by", ["positions", "seeds"])
def test_distribution(d, by):
    numbers = range(1, DRAWS + 1)
    draws = [d] * DRAWS if by == "positions" else [d._replace(seed=d.seed * 10**9 + i) for i in numbers]
    positions = list(numbers) if by == "positions" else [17] * DRAWS
    got = draw_reference(LOGITS.expand(DRAWS, -1), pack(draws, positions))
    counts = torch.bincount(got.token, minlength=len(LOGITS)).double()
    keep = kept(LOGITS, d)
    assert counts[~keep].sum() == 0, "a token that a filter leaves out was drawn"
    expected = torch.where(keep, torch.softmax(LOGITS.double() / d.temperature, 0), 0)
    assert chi_square(counts, DRAWS * expected / expected.sum()) < 5
    assert (counts > 0).sum() > 1 or keep.sum() == 1


def test_the_statistic_finds_a_wrong_distribution():
    """Draws at another temperature, and a nucleus that is one token short, are far out."""
    right = torch.softmax(LOGITS.double(), 0) * DRAWS
    got = draw_reference(LOGITS.expand(DRAWS, -1), pack([Draw(1, 1.1)] * DRAWS, range(DRAWS)))
    assert chi_square(torch.bincount(got.token, minlength=12).double(), right) > 20


def test_ties_at_a_border_stay_together():
    row = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).expand(4000, -1)
    for d in (Draw(1, 1.0, top_k=2), Draw(1, 1.0, top_p=0.6)):
        seen = set(draw_reference(row, pack([d] * 4000, range(4000))).token.tolist())
        assert seen == {0, 1, 2, 3}


def random_rows(seed: int, rows: int, vocab: int) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2.5).bfloat16().float()


MIXED = [
    None, Draw(5, 0.7), Draw(6, 1.0, 20), Draw(-7, 0.9, 0, 0.9), Draw(8, 1.1, 0, 1.0, 0.1), Draw(9, 1.0, 30, 0.8, 0.02, 0.3),
    Draw(10, 0.0, 5, 0.5), Draw(2**63 - 1, 2.0),
]  # fmt: skip


def test_a_row_does_not_depend_on_its_neighbours():
    logits, positions = random_rows(1, len(MIXED), 500), list(range(30, 30 + len(MIXED)))
    together = draw(logits, pack(MIXED, positions))
    for i, d in enumerate(MIXED):
        alone = draw(logits[i : i + 1].clone(), pack([d], [positions[i]]))
        assert [a.item() for a in alone] == [t[i].item() for t in together]
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    other = draw(logits[order], pack([MIXED[i] for i in order], [positions[i] for i in order]))
    assert all(torch.equal(a, b[order]) for a, b in zip(other, together))


def test_greedy_rows_are_the_greedy_kernels():
    logits = random_rows(2, 8, 300)
    got = draw_reference(logits, pack([None, Draw(1, 0.0)] * 4, range(8)))
    want = top2_margin_reference(logits, torch.zeros(8))
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.second, want.second)
    assert torch.equal(got.margin, want.margin)


@pytest.mark.parametrize("top_p", [1e-300, 1e-12])
def test_the_smallest_share_keeps_the_best_token(top_p):
    assert draw_reference(LOGITS.unsqueeze(0), pack([Draw(1, 1.0, 0, top_p)], [3])).token.item() == 0


def test_no_filter_of_a_larger_vocabulary_is_no_filter():
    logits, plain = random_rows(3, 50, 40), draw_reference
    free = plain(logits, pack([Draw(1, 1.0)] * 50, range(50)))
    wide = plain(logits, pack([Draw(1, 1.0, top_k=41)] * 50, range(50)))
    assert all(torch.equal(a, b) for a, b in zip(free, wide))


@pytest.mark.parametrize(
    ("row", "d", "token"),
    [
        ([-INF, 2.0, -INF], Draw(1, 1.0), 1),
        ([-INF, 2.0, -INF], Draw(1, 1.0, 2, 0.9, 0.1), 1),
        ([NAN, 1.0, NAN], Draw(1, 1.0, 0, 0.9), 1),
        ([-INF, -INF, -INF], Draw(1, 1.0), 0),
        ([-INF, -INF, -INF], Draw(1, 1.0, 1, 0.5, 0.5), 0),
        ([0.0, INF, 0.0], Draw(1, 1.0), 1),
        ([0.0, INF, 0.0], Draw(1, 1.0, 2, 0.9), 1),
    ],
)
def test_edge_rows(row, d, token):
    got = draw_reference(torch.tensor([row]), pack([d], [3]))
    assert got.token.item() == token
    assert got.second.item() != token
    assert not got.margin.item() <= 0.5


@pytest.mark.parametrize(
    ("logits", "rows", "error"),
    [
        (torch.zeros(2, 1), 2, ValueError),
        (torch.zeros(4), 4, ValueError),
        (torch.zeros(2, 4, dtype=torch.float64), 2, TypeError),
        (torch.zeros(4, 2).T, 2, ValueError),
        (torch.zeros(2, 4), 3, ValueError),
    ],
)
def test_bad_input(logits, rows, error):
    with pytest.raises(error):
        draw(logits, pack([None] * rows, range(rows)))


# ---- the margin -----------------------------------------------------------------------------------------------------

ROWS = 48


@st.composite
def draws(drawing):
    temperature = drawing(st.sampled_from([0.0, 0.05, 0.5, 1.0, 2.5]))
    top_k = drawing(st.sampled_from([0, 0, 1, 2, 5, 11, 40]))
    top_p = drawing(st.sampled_from([1.0, 1.0, 0.95, 0.7, 0.3, 0.05]))
    min_p = drawing(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]))
    reach = drawing(st.sampled_from([0.01, 0.3, 1.0, 4.0]))
    return Draw(drawing(st.integers(0, 2**32)), temperature, top_k, top_p, min_p, reach)


def push(z: torch.Tensor, got, kind: str, d: float, generator: torch.Generator) -> torch.Tensor:
    """Change every logit by at most d: at random, or as an adversary would who knows winner and runner-up."""
    rows = torch.arange(len(z))
    if kind == "random":
        return (torch.rand(z.shape, generator=generator) * 2 - 1) * d
    change = torch.where(torch.rand(z.shape, generator=generator) < 0.5, -d, d)
    if kind != "signs":
        change[:] = {"up": d, "down": -d, "tops": 0.0}[kind]
        if kind == "tops":  # what is above the winner rises, what is below falls
            change = torch.where(z > z[rows, got.token].unsqueeze(1), d, -d)
        change[rows, got.token] = -d
        change[rows, got.second] = d
    return change


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    draws(), st.integers(0, 2**31), st.sampled_from([3, 12, 60]), st.sampled_from([0.5, 3.0]), st.booleans(),
    st.sampled_from(["random", "signs", "up", "down", "tops"]), st.sampled_from([0.0625, 0.25, 0.5, 2.0]),
)  # fmt: skip
def test_no_change_below_half_of_tau_changes_a_token_whose_margin_is_above_tau(
    d, seed, vocab, scale, coarse, kind, tau
):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(ROWS, vocab, generator=generator) * scale
    if coarse:
        z = (z * 8).round() / 8  # ties
    packed = pack([d] * ROWS, range(ROWS))
    before = draw_reference(z, packed)
    after = draw_reference(z + push(z, before, kind, tau / 2, generator), packed)
    sure = before.margin > tau + 1e-4  # the rounding of fp32
    assert torch.equal(before.token[sure], after.token[sure])


@pytest.mark.parametrize("reach", [0.01, 4.0])
def test_a_share_below_the_smallest_unit_still_counts(reach):
    """At a low temperature the other token has a share of 2e-17: raised by 1 beside a winner lowered by 1, it alone is kept."""
    z = torch.tensor([[-0.9480383, -6.3456583, 0.9668248]])
    packed = pack([Draw(2, 0.05, 0, 0.7, 0.0, reach)], [2])
    before = draw_reference(z, packed)
    after = draw_reference(z + torch.tensor([[1.0, 1.0, -1.0]]), packed)
    assert (before.token.item(), after.token.item()) == (2, 0)
    assert before.margin.item() <= 2.0


def test_the_margin_is_worth_having():
    """Most steps have one above a threshold as it is used, under common parameters; and changes of twice its size do flip."""
    z = random_rows(4, 500, 1000) * 1.6
    for d, least in (
        (Draw(1, 0.7), 0.8),
        (Draw(1, 0.7, 50), 0.8),
        (Draw(1, 0.7, 0, 0.9, 0.0, 0.3), 0.6),
        (Draw(1, 0.7, min_p=0.1), 0.7),
    ):
        packed = pack([d] * 500, range(500))
        got = draw_reference(z, packed)
        assert (got.margin > 0.125).float().mean() > least, d
        change = push(z, got, "up", 1.0, torch.Generator().manual_seed(1)) * (
            got.margin.clamp(max=20).unsqueeze(1) / 2 + 1e-3
        )
        flipped = draw_reference(z + change, packed).token != got.token
        assert flipped.float().mean() > (0.95 if not d.filtered else 0.3), d
