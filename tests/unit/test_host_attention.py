"""Attention on a CPU: right, and a row's bits from its own context alone, whatever shares its forward."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from margingate_kernels import HostAttention, Part
from margingate_kernels.attention.host_attention import COLUMNS, TILE

from sglang_margingate.serving import cpu

HEADS, KV_HEADS, SIZE, LENGTH, REQUESTS = 4, 2, 16, 300, 5
SLOTS = REQUESTS * LENGTH + 1


class Pool:
    """Requests of random columns at scattered slots, and the queries of every position."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(3)
        self.table = (torch.randperm(SLOTS - 1, generator=generator) + 1).view(REQUESTS, LENGTH).int()
        self.keys, self.values = (torch.randn(SLOTS, KV_HEADS, SIZE, generator=generator).to(dtype) for _ in range(2))
        self.queries = torch.randn(REQUESTS, LENGTH, HEADS, SIZE, generator=generator).to(dtype)

    def run(self, parts: Sequence[Part], decode: bool) -> list[torch.Tensor]:
        """Return each part's rows."""
        q = torch.cat([self.queries[part.pool, part.first : part.end] for part in parts])
        attention = HostAttention(parts, self.table, decode)
        out = attention(q, self.keys, self.values, SIZE**-0.5, torch.full_like(q, float("nan")))
        assert torch.equal(out, attention(q, self.keys, self.values, SIZE**-0.5, torch.empty_like(q)))  # the next layer
        return list(out.split([part.end - part.first for part in parts]))

    def reference(self, part: Part) -> torch.Tensor:
        slots = self.table[part.pool].long()
        k, v = (x[slots].double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.keys, self.values))
        scores = torch.einsum("qhd,thd->hqt", self.queries[part.pool, part.first : part.end].double(), k) * SIZE**-0.5
        behind = torch.arange(LENGTH) > torch.arange(part.first, part.end)[:, None]
        return torch.einsum("hqt,thd->qhd", scores.masked_fill(behind, float("-inf")).softmax(-1), v)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_attends_to_the_columns_up_to_each_row(dtype: torch.dtype) -> None:
    pool, tolerance = Pool(dtype), 3e-2 if dtype is torch.bfloat16 else 1e-5
    parts = [Part(0, 0, 1), Part(3, 0, TILE), Part(1, 7, 150), Part(2, 2 * TILE, 2 * TILE + 1), Part(4, 0, LENGTH)]
    for part, found in zip(parts, pool.run(parts, False)):
        torch.testing.assert_close(found.double(), pool.reference(part), rtol=tolerance, atol=tolerance)
    rows = [Part(n % REQUESTS, end - 1, end) for n, end in enumerate((1, 2, COLUMNS, COLUMNS + 1, 200, LENGTH, LENGTH))]
    for part, found in zip(rows, pool.run(rows, True)):
        torch.testing.assert_close(found.double(), pool.reference(part), rtol=tolerance, atol=tolerance)


def test_neither_chunks_nor_companions_nor_a_cached_prefix_change_a_bit(pool: Pool) -> None:
    rng = random.Random(0)
    for length in (1, TILE - 1, TILE, TILE + 1, 100, 257, LENGTH):
        (whole,) = pool.run([Part(0, 0, length)], False)
        for _ in range(4):
            cut = rng.randrange(length)
            more = [Part(r, (first := rng.randrange(LENGTH)), rng.randrange(first, LENGTH) + 1) for r in (1, 2)]
            parts = [Part(0, cut, length), *more]
            rng.shuffle(parts)
            found = pool.run(parts, False)[[part.pool for part in parts].index(0)]
            assert torch.equal(whole[cut:], found), (length, cut, parts)


def test_a_decoding_row_does_not_see_who_else_decodes(pool: Pool) -> None:
    rng = random.Random(1)
    for end in (1, 2, 63, 64, 65, 128, 129, 299, LENGTH):
        (alone,) = pool.run([Part(0, end - 1, end)], True)
        for others in (1, 3, 15, 40):
            ends = [rng.randrange(1, LENGTH + 1) for _ in range(others)]
            parts = [Part(rng.randrange(1, REQUESTS), n - 1, n) for n in ends]
            at = rng.randrange(others + 1)
            parts.insert(at, Part(0, end - 1, end))
            assert torch.equal(alone, pool.run(parts, True)[at]), (end, others)


def test_nothing_is_read_behind_a_row(pool: Pool) -> None:
    """What lies there is another request's by now; a mask alone would let its NaN through."""
    part, row = Part(0, 3, 40), Part(0, 69, 70)
    before = pool.run([part], False)[0], pool.run([row], True)[0]
    other = Pool()
    other.keys[other.table[0, 70:].long()] = float("nan")
    other.values[other.table[0, 70:].long()] = float("nan")
    assert torch.equal(before[1], other.run([row], True)[0])
    other.keys[other.table[0, 40:].long()] = float("nan")
    other.values[other.table[0, 40:].long()] = float("nan")
    assert torch.equal(before[0], other.run([part], False)[0])


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("part", [Part(0, 4, 4), Part(0, 5, 4), Part(0, -1, 0)])
def test_a_part_without_rows_is_refused(part: Part, decode: bool) -> None:
    with pytest.raises(ValueError, match=r"Part\(pool=0.* is not"):
        HostAttention([part], torch.zeros(1, 8, dtype=torch.int32), decode)


def test_rows_that_do_not_fit_the_forward_are_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match="not one position"):
        HostAttention([Part(0, 4, 6)], pool.table, True)
    q = pool.queries[0, :3]
    with pytest.raises(ValueError, match=r"q \(3, 4, 16\) and out \(3, 4, 16\) must be \[2, heads, head_dim\]"):
        HostAttention([Part(0, 0, 2)], pool.table, False)(q, pool.keys, pool.values, 1.0, torch.empty_like(q))


# ---- its place in SGLang ------------------------------------------------------------------------------------------------


class Mode:
    def __init__(self, name: str) -> None:
        self.is_decode, self.is_extend = (lambda: name == "decode"), (lambda: name == "extend")


def forward(mode: str, ends: list[int], firsts: list[int] | None = None) -> Any:
    return SimpleNamespace(
        forward_mode=Mode(mode), seq_lens=torch.tensor(ends), req_pool_indices=torch.arange(len(ends)),
        extend_prefix_lens=None if firsts is None else torch.tensor(firsts),
    )  # fmt: skip


def asked(*args: Any, **kwargs: Any) -> Any:
    return "sglang", args, kwargs


@pytest.fixture
def backend(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Any:
    backend = SimpleNamespace(req_to_token_pool=SimpleNamespace(req_to_token=pool.table))
    monkeypatch.setattr("sglang_margingate.serving.attention_hooks.is_plain", lambda runner: runner == "plain")
    cpu.set_up_attention(None, backend, "plain")
    return backend


def test_a_forward_attends_as_it_was_laid_out(pool: Pool, backend: Any) -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return cpu.attend(asked, backend, q, torch.empty_like(q), pool.keys, pool.values, pool.table, scaling=0.25)

    cpu.plan_attention(None, backend, forward("extend", [9, 40], [0, 35]))
    parts = [Part(0, 0, 9), Part(1, 35, 40)]
    q = torch.cat([pool.queries[p.pool, p.first : p.end] for p in parts])
    assert torch.equal(attend(q), torch.cat(pool.run(parts, False)))
    cpu.plan_attention(None, backend, forward("decode", [9, 40]))
    q = torch.stack([pool.queries[0, 8], pool.queries[1, 39]])
    assert torch.equal(attend(q), torch.cat(pool.run([Part(0, 8, 9), Part(1, 39, 40)], True)))


def test_sglang_attends_where_ours_does_not_fit_and_in_idle_forwards(pool: Pool, backend: Any) -> None:
    cpu.plan_attention(None, backend, forward("decode", [9, 40]))
    cpu.plan_attention(None, backend, forward("idle", []))  # the forward before it is not this one
    who, args, kwargs = cpu.attend(asked, backend, 1, 2, 3, 4, 5, scaling=0.5, causal=True)
    assert who == "sglang"
    assert args == (backend, 1, 2, 3, 4, 5)
    assert kwargs == {"scaling": 0.5, "causal": True}
    runner = SimpleNamespace(attn_backend=backend)
    assert cpu.attention_kind(runner) == "margingate"
    cpu.set_up_attention(None, backend, "a model with a window")
    cpu.plan_attention(None, backend, forward("decode", [9, 40]))
    assert cpu.attend(asked, backend, 1, 2, 3, 4)[0] == "sglang"
    assert cpu.attention_kind(runner) == "sglang"
