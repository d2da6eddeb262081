"""The Triton kernels against their references, on a GPU or in Triton's interpreter.

    PYTHONPATH=kernels python3 -m pytest tests/gpu/test_kernels_gpu.py
    PYTHONPATH=kernels TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= python3 -m pytest tests/gpu/test_kernels_gpu.py

CI has no GPU: there tests/unit/test_kernels_interpreter.py starts the second command.
"""

from __future__ import annotations

import importlib
import math
import os

import pytest
import torch
from margingate_kernels import (
    DecodeAttention,
    KVColumns,
    PrefillAttention,
    Top2,
    Workspace,
    decode_attention_reference,
    max_abs_change_reference,
    prefill_attention_reference,
    restore_reference,
    row_digest,
    row_digest_reference,
    save_reference,
    top2_margin,
    top2_margin_reference,
)
from margingate_kernels._backend import has_triton, use_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
INF, NAN = math.inf, math.nan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_triton(), reason="Triton is not installed"),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
# The interpreter walks a reduction element by element, so there most tests cut rows into smaller programs; the chunks of
# a row, and the tests' sizes around them, keep their proportions.
CHUNK = 256 if INTERPRETED else 4096
needs_cuda = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU")


@pytest.fixture(autouse=True)
def small_programs(request, monkeypatch):
    module = importlib.import_module("margingate_kernels.choice.top2_margin")
    if INTERPRETED and "real_split" not in request.fixturenames:
        monkeypatch.setattr(module, "_split", lambda vocab, rows: module._Split(64, 4, 1, -(-vocab // 256)))


@pytest.fixture
def real_split():
    """Ask for the launch constants of production, also in the interpreter."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), device=DEVICE).to(dtype)


def assert_same_top2(got: Top2, want: Top2) -> None:
    assert torch.equal(got.token, want.token)
    assert torch.equal(got.second, want.second)
    torch.testing.assert_close(got.margin, want.margin, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.trigger, want.trigger)


def check_top2(logits: torch.Tensor, thresholds: torch.Tensor | None = None) -> Top2:
    if thresholds is None:
        thresholds = torch.rand(len(logits), generator=generator(1), device=DEVICE)
    assert use_triton(logits)
    got = top2_margin(logits, thresholds)
    # The reference runs on the CPU: PyTorch promises the first maximum, its GPU code is not what is under test.
    want = top2_margin_reference(logits.cpu(), thresholds.cpu())
    assert_same_top2(Top2(*(t.cpu() for t in got)), want)
    assert not torch.equal(got.token, got.second) or not len(logits)
    return got


# ---- top2_margin ------------------------------------------------------------------------------------------------------

VOCABS = [2, 3, 31, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK, 5 * CHUNK - 3]
LONG = 5 * CHUNK - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABS)
def test_top2_random(vocab, dtype):
    check_top2(normal(3 if INTERPRETED else 37, vocab, seed=vocab, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1025, 20011] if INTERPRETED else [32768, 128256, 151936, 262144])
def test_top2_random_in_real_programs(vocab, dtype, real_split):
    check_top2(normal(2 if INTERPRETED else 64, vocab, seed=vocab, dtype=dtype))


@pytest.mark.parametrize("vocab", [5, 1025, LONG])
def test_top2_ties(vocab):
    """Few distinct values: the top is shared by many places, in one lane, across lanes and across programs."""
    rows = 4 if INTERPRETED else 64
    check_top2(torch.randint(-2, 3, (rows, vocab), generator=generator(2), device=DEVICE).float())
    got = check_top2(torch.full((rows, vocab), 1.5, device=DEVICE), torch.zeros(rows, device=DEVICE))
    assert got.token.tolist() == [0] * rows
    assert got.second.tolist() == [1] * rows
    assert got.trigger.all()


@pytest.mark.parametrize("vocab", [5, 1025, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top2_special_values(vocab, dtype):
    logits = normal(12, vocab, dtype=dtype)
    logits[0] = -INF
    logits[1] = NAN
    logits[2] = -INF
    logits[2, vocab - 1] = 1.0
    logits[3] = -INF
    logits[3, 0] = -1e30
    logits[4, ::2] = NAN
    logits[5, 1::2] = -INF
    logits[6, 2] = INF
    logits[7, [1, vocab - 1]] = INF
    logits[8] = NAN
    logits[8, 1] = -INF
    logits[9, [0, vocab - 1]] = torch.tensor([-0.0, 0.0], device=DEVICE, dtype=dtype)
    logits[10] = torch.finfo(dtype).min
    logits[11] = INF
    got = check_top2(logits)
    assert got.token.tolist()[:4] == [0, 0, vocab - 1, 0]
    assert got.second.tolist()[:4] == [1, 1, 0, 1]
    assert got.margin[7].isnan()
    assert got.trigger[7]
    check_top2(logits, torch.full((12,), NAN, device=DEVICE))


@pytest.mark.parametrize("cut", [(64, 4, 1), (128, 8, 2), (256, 2, 4), (1024, 32, 8)])
def test_top2_does_not_depend_on_how_a_row_is_cut(cut, monkeypatch):
    """Few and many rows are cut in different ways, so this is what row-invariance rests on."""
    module = importlib.import_module("margingate_kernels.choice.top2_margin")
    block, unroll, _ = cut
    monkeypatch.setattr(module, "_split", lambda v, rows: module._Split(*cut, -(-v // (block * unroll))))
    check_top2(normal(3, LONG, seed=5))
    check_top2(torch.randint(-2, 3, (3, LONG), generator=generator(6), device=DEVICE).float())


def test_top2_strided_rows():
    wide = normal(4, LONG + 1)
    check_top2(wide[:, :LONG])
    check_top2(wide[:, 1 : LONG - 2])
    check_top2(wide[::2, 3:700])
    check_top2(wide, torch.zeros(1, device=DEVICE).expand(4))


def test_top2_no_rows():
    assert [len(t) for t in top2_margin(torch.empty(0, LONG, device=DEVICE), torch.empty(0, device=DEVICE))] == [0] * 4


def test_top2_workspace_is_reused():
    workspace = Workspace(5, LONG, DEVICE)
    for seed, rows in enumerate((5, 1, 3, 5)):
        logits, thresholds = normal(rows, LONG, seed=seed), torch.full((rows,), 0.1, device=DEVICE)
        for column in workspace.out(5):
            column.fill_(True)
        got = top2_margin(logits, thresholds, workspace=workspace)
        assert_same_top2(got, top2_margin_reference(logits, thresholds))
        assert got.token.data_ptr() == workspace.out(5).token.data_ptr()
        assert not workspace.counters.any()


def test_top2_row_invariance():
    """A row's result is the same alone, in any batch and at any place, ties included."""
    vocab = 1100 if INTERPRETED else 128256
    rows = 5 if INTERPRETED else 130
    pool = normal(rows, vocab, dtype=torch.bfloat16).float()
    thresholds = torch.full((rows,), 0.02, device=DEVICE)
    alone = [top2_margin(pool[i : i + 1], thresholds[:1]) for i in range(rows)]
    want = Top2(*(torch.cat(column) for column in zip(*alone)))
    for size in range(1, rows + 1):
        assert_same_top2(top2_margin(pool[:size], thresholds[:size]), Top2(*(t[:size] for t in want)))
    order = torch.randperm(rows, generator=generator(3), device=DEVICE)
    assert_same_top2(top2_margin(pool[order], thresholds), Top2(*(t[order] for t in want)))


@needs_cuda
def test_top2_graph_capture():
    logits, thresholds = normal(64, 128256), torch.full((64,), 0.05, device=DEVICE)
    workspace = Workspace(64, 128256, DEVICE)
    top2_margin(logits, thresholds, workspace=workspace)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    top2_margin(logits, thresholds, workspace=workspace)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = top2_margin(logits, thresholds, workspace=workspace)
    for seed in range(20):
        logits.copy_(normal(64, 128256, seed=seed, dtype=torch.bfloat16))
        graph.replay()
        assert_same_top2(got, top2_margin_reference(logits, thresholds))


# ---- kv_column --------------------------------------------------------------------------------------------------------


def pool_of(layers: int, slots: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> KVColumns:
    planes = [normal(slots, heads, dim, seed=seed + i, dtype=dtype) for i in range(2 * layers)]
    return KVColumns(planes[:layers], planes[layers:])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


KV_SHAPES = [(2, 8, 128), (3, 2, 24), (2, 1, 5)] + ([] if INTERPRETED else [(32, 8, 128), (48, 40, 128)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", KV_SHAPES)
def test_kv_column(shape, dtype):
    layers, heads, dim = shape
    index_dtype = torch.int32 if layers == 3 else torch.int64
    pool = pool_of(layers, 40, heads, dim, dtype)
    slots = torch.tensor([7, 39, -1, 0, 20], device=DEVICE, dtype=index_dtype)
    staging = pool.staging(5).fill_(3.0)
    want = staging.clone()
    save_reference(pool, slots, want)
    pool.save(slots, staging)
    assert torch.equal(bits(staging), bits(want))
    assert (staging[:, :, 2] == 3.0).all()
    assert not pool.max_abs_change(slots, staging).any()

    staging += normal(*staging.shape, seed=5, dtype=dtype)
    change = pool.max_abs_change(slots, staging)
    assert torch.equal(change, max_abs_change_reference(pool, slots, staging))
    assert (change > 0).tolist() == [[True, True, False, True, True]] * layers

    other = pool_of(layers, 40, heads, dim, dtype)
    pool.restore(slots, staging)
    restore_reference(other, slots, staging)
    for got, expected in zip(pool.k_buffers + pool.v_buffers, other.k_buffers + other.v_buffers):
        assert torch.equal(bits(got), bits(expected))


def test_kv_column_in_a_larger_staging_buffer():
    pool = pool_of(2, 10, 2, 24, torch.bfloat16)
    large = pool.staging(6).zero_()
    slots = torch.tensor([4, 9], device=DEVICE)
    out = torch.empty(2, 2, device=DEVICE)
    pool.save(slots, large[:, :, 1:3])
    assert pool.max_abs_change(slots, large[:, :, 1:3], out=out) is out
    assert not out.any()
    assert not large[:, :, [0, 3, 4, 5]].any()


def test_kv_column_special_values():
    """Equal bits are no change, even of NaN and inf; a new NaN is not hidden."""
    pool = pool_of(1, 4, 2, 24, torch.bfloat16)
    pool.k_buffers[0][1, 0, 3] = NAN
    pool.v_buffers[0][1, 1, 2] = INF
    slots = torch.tensor([0, 1, 2], device=DEVICE)
    staging = pool.staging(3)
    pool.save(slots, staging)
    assert not pool.max_abs_change(slots, staging).any()
    staging[0, 1, 2, 7] = NAN
    staging[0, 0, 0, 0] = INF
    assert pool.max_abs_change(slots, staging).cpu()[0].tolist()[:2] == [INF, 0.0]
    assert pool.max_abs_change(slots, staging)[0, 2].isnan()


def test_kv_column_staged_beyond_two_gigabytes():
    """A layer times its stride exceeds int32 where an audit stages much; the memory is only reserved, not touched."""
    layers, stride = 9, 1 << 28
    pool = pool_of(layers, 4, 1, 5, torch.bfloat16)
    flat = torch.empty(stride * (layers - 1) + 64, dtype=torch.bfloat16, device=DEVICE)
    staging = flat.as_strided((layers, 2, 2, 5), (stride, 16, 5, 1))
    slots = torch.tensor([3, 1], device=DEVICE)
    pool.save(slots, staging)
    want = pool.staging(2)
    save_reference(pool, slots, want)
    assert torch.equal(bits(staging), bits(want))
    assert not pool.max_abs_change(slots, staging).any()
    staging[layers - 1, 1, 0, 2] += 1
    assert (pool.max_abs_change(slots, staging) > 0).tolist() == [[False, False]] * (layers - 1) + [[True, False]]


def test_kv_column_no_slots():
    pool = pool_of(2, 4, 2, 24, torch.bfloat16)
    slots = torch.empty(0, dtype=torch.int64, device=DEVICE)
    pool.save(slots, pool.staging(0))
    pool.restore(slots, pool.staging(0))
    assert pool.max_abs_change(slots, pool.staging(0)).shape == (2, 0)


@needs_cuda
def test_kv_column_graph_capture():
    pool = pool_of(4, 100, 8, 128, torch.bfloat16)
    slots, staging = torch.arange(8, device=DEVICE), pool.staging(8)
    out = torch.empty(4, 8, device=DEVICE)
    pool.save(slots, staging)
    pool.max_abs_change(slots, staging, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pool.save(slots, staging)
        pool.max_abs_change(slots, staging, out=out)
    slots += 50
    graph.replay()
    want = pool.staging(8)
    save_reference(pool, slots, want)
    assert torch.equal(bits(staging), bits(want))
    assert not out.any()


# ---- row_digest -------------------------------------------------------------------------------------------------------


def check_digest(x: torch.Tensor) -> torch.Tensor:
    assert use_triton(x)
    got = row_digest(x)
    assert torch.equal(got.cpu(), row_digest_reference(x.cpu()))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 1), (4, 7), (2, 255), (3, 5, 8), (2, 2051), (1, 9000), (5,), (3, 0), (0, 4)])
def test_digest_equals_the_reference(shape, dtype):
    check_digest((normal(*shape) * 50).to(dtype))


@needs_cuda
def test_digest_of_large_rows():
    check_digest(normal(65, 128256))
    check_digest(normal(3, 4_000_001, dtype=torch.bfloat16))


def test_digest_depends_on_the_bytes_alone():
    """Offsets, strides and neighbours that force other load widths give the same number."""
    wide = normal(6, 1001, dtype=torch.bfloat16)
    for left, right in ((0, 1000), (1, 1001), (3, 500), (4, 1000)):
        part = wide[:, left:right]
        got = check_digest(part)
        assert torch.equal(got, row_digest(part.contiguous()))
        assert torch.equal(got, row_digest(part.contiguous().view(torch.uint8)))
        assert torch.equal(got[2:3], row_digest(part[2:3]))


def test_digest_sees_every_bit_and_the_order():
    x = torch.randint(0, 256, (8, 40), generator=generator(0), device=DEVICE, dtype=torch.uint8)
    base = check_digest(x)
    assert len(set(base.tolist())) == 8
    for byte in range(40):
        y = x.clone()
        y[:, byte] ^= 1 << (byte % 8)
        assert not (check_digest(y) == base).any()
    assert not (check_digest(x.flip(1)) == base).any()
    zeros = {row_digest(torch.zeros(1, n, device=DEVICE, dtype=torch.uint8)).item() for n in range(20)}
    assert len(zeros) == 20


@needs_cuda
def test_digest_graph_capture():
    x = normal(64, 4096)
    row_digest(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = row_digest(x)
    x.copy_(normal(64, 4096, seed=9))
    graph.replay()
    graph.replay()
    assert torch.equal(got, row_digest_reference(x))


# ---- decode_attention ------------------------------------------------------------------------------------------------

ATTENTION_SHAPES = [(8, 2, 32), (4, 4, 16)] if INTERPRETED else [(32, 8, 128), (28, 4, 128), (40, 8, 128), (8, 8, 64)]
# The interpreter's dot takes bfloat16's bits for integers.
ATTENTION_DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
LENGTHS = (
    [0, 1, 15, 16, 17, 64, 129, 200] if INTERPRETED else [0, 1, 63, 64, 65, 255, 256, 257, 512, 3000, 8192, 8193, 30000]
)


@pytest.fixture
def attention_module(monkeypatch):
    """In the interpreter chunks are small, so that short contexts still have several, and longer ones longer chunks."""
    module = importlib.import_module("margingate_kernels.attention.decode_attention")
    if INTERPRETED:
        small = {"CHUNK": 32, "CHUNKS": 2, "LONG_CHUNK": 48, "MOST_CHUNKS": 4, "BLOCK": 16, "SPAN": 2}
        for name, value in small.items():
            monkeypatch.setattr(module, name, value)
    return module


class Contexts:
    """A pool of K/V and rows of given lengths, each with slots of its own in random order."""

    def __init__(
        self, shape: tuple[int, int, int], lengths: list[int], dtype: torch.dtype = ATTENTION_DTYPES[0]
    ) -> None:
        q_heads, kv_heads, dim = shape
        slots = sum(lengths) + 7
        order = torch.randperm(slots, generator=generator(7), device=DEVICE).int()
        self.lengths = lengths
        self.q = normal(len(lengths), q_heads, dim, seed=1, dtype=dtype)
        self.k, self.v = (
            normal(slots, kv_heads, dim, seed=2, dtype=dtype),
            normal(slots, kv_heads, dim, seed=3, dtype=dtype),
        )
        self.slots = list(order[: sum(lengths)].split(lengths))
        self.scale = dim**-0.5

    def arguments(self, rows: list[int]) -> tuple:
        lengths = torch.tensor([0, *(self.lengths[r] for r in rows)], device=DEVICE)
        indices = torch.cat([self.slots[r] for r in rows])
        return self.q[rows].contiguous(), self.k, self.v, lengths.cumsum(0).int(), indices, self.scale


def attended(attend: DecodeAttention, q, k, v, indptr, indices, scale) -> torch.Tensor:
    attend.plan(indptr)
    return attend(q, k, v, indices, scale)


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_decode_attention(shape, dtype, attention_module):
    to = Contexts(shape, LENGTHS, dtype)
    attend = DecodeAttention(len(LENGTHS) + 3, *shape, DEVICE)
    arguments = to.arguments(list(range(len(LENGTHS))))
    want = decode_attention_reference(*arguments)
    assert use_triton(to.q)
    for _ in range(2):  # the counters are back at 0 after the first
        torch.testing.assert_close(attended(attend, *arguments), want, rtol=2e-2, atol=2e-3)


def test_decode_attention_row_invariance(attention_module, monkeypatch):
    shape = ATTENTION_SHAPES[0]
    to = Contexts(shape, LENGTHS[1:] * (1 if INTERPRETED else 2))
    rows = list(range(len(to.lengths)))
    attend = DecodeAttention(len(rows) + 1, *shape, DEVICE)
    alone = [attended(attend, *to.arguments([r]))[0] for r in rows]
    for seed in range(1, 2) if INTERPRETED else range(20):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[: 3 + 7 * seed]
        for r, got in zip(order, attended(attend, *to.arguments(order))):
            assert torch.equal(got, alone[r]), f"row of {to.lengths[r]} tokens among {len(order)}"
    # As many groups of programs as chunks, a few that each take several rows, or one for all: who works on what changes no bit.
    for groups in (1, 40) if INTERPRETED else (1, 3, 1000):
        monkeypatch.setattr(attend, "_shares", torch.zeros(groups, 4, dtype=torch.int32, device=DEVICE))
        for r, got in zip(rows, attended(attend, *to.arguments(rows))):
            assert torch.equal(got, alone[r]), f"row of {to.lengths[r]} tokens with {groups} groups of programs"
    # Could this fail? Another cut of the contexts is another order of summation, and shows.
    monkeypatch.setattr(attention_module, "CHUNK", 2 * attention_module.CHUNK)
    other = [attended(attend, *to.arguments([r]))[0] for r in rows]
    assert not all(torch.equal(a, b) for a, b in zip(alone, other))


@pytest.mark.parametrize("groups", [1, 4, 5, 12, 66])
@pytest.mark.parametrize(
    "chunks", [[3], [4] * 12, [1, 7, 2, 0, 5, 3, 8], [9, 1, 1, 1, 1, 1, 1, 1, 1, 1], [4, *[0] * 9], [0, 0, 4, 0]]
)
def test_decode_attention_shares(groups, chunks, attention_module, monkeypatch):
    """Every chunk is in one share, and no share takes a chunk longer than the equal one."""
    block = attention_module.BLOCK
    lengths = [max(0, n * attention_module.CHUNK - 3) for n in chunks]
    sizes = [attention_module.chunk_tokens(length, 4) for length in lengths]
    attend = DecodeAttention(len(chunks) + 2, 4, 4, 16, DEVICE)
    monkeypatch.setattr(attend, "_shares", torch.full((groups, 4), -1, dtype=torch.int32, device=DEVICE))
    attend.plan(torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int())
    line = [  # the last chunk of several counts as a whole one
        (row, chunk, max(1, -(-min(size, length) // block)))
        for row, (length, size) in enumerate(zip(lengths, sizes))
        for chunk in range(max(1, -(-length // size)))
    ]
    places, shares = [each[:2] for each in line], []
    for row, first, count, _ in attend._shares.tolist():
        begin = places.index((row, first)) if count else 0
        shares.append(line[begin : begin + count])
    assert [each for share in shares for each in share] == line
    costs = [[blocks for _, _, blocks in share] for share in shares]
    equal, longest = -(-sum(blocks for *_, blocks in line) // groups), max(blocks for *_, blocks in line)
    assert max(map(sum, costs)) < equal + longest
    if equal <= longest:
        held = [share.count(longest) for share in costs]
        assert max(held) == 1, "rows of padding do not put two of the longest chunks into one share"


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8, 32])
def test_decode_attention_chunks(kv_heads, attention_module):
    tokens = [attention_module.chunk_tokens(n, kv_heads) for n in range(0, 200_000, 7)]
    assert tokens == sorted(tokens), "a longer context has no shorter chunks"
    few, most = attention_module.most_chunks(kv_heads)
    assert few % attention_module.SPAN == most % attention_module.SPAN == 0
    assert few * min(kv_heads, 8) <= attention_module.CHUNKS * 8, "about as many programs as a row of 8 K/V heads has"
    for length in (1, 100, 10_000, 16_384, 16_385, 32_768, 131_072):
        tokens = attention_module.chunk_tokens(length, kv_heads)
        assert tokens % attention_module.BLOCK == 0
        assert -(-length // tokens) <= most


def test_decode_attention_bad_input():
    to = Contexts((4, 4, 16), [3, 5])
    attend = DecodeAttention(2, 4, 4, 16, DEVICE)
    q, k, v, indptr, indices, scale = to.arguments([0, 1])
    for bad, message in (
        ((q.float(), k, v, indptr, indices), "q must be"),
        ((q.repeat(2, 1, 1), k, v, indptr, indices), "2 rows as planned"),
        ((q, k[:, :2], v, indptr, indices), "k must be"),
        ((q, k, v, indptr.long(), indices), "indptr must be"),
        ((q, k, v, indptr, indices.cpu().repeat(2)[::2]), "contiguous"),
        ((q.transpose(1, 2).contiguous().transpose(1, 2), k, v, indptr, indices), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            attended(attend, *bad, scale)
    with pytest.raises(ValueError, match="not supported"):
        DecodeAttention(2, 4, 4, 80, DEVICE)


def test_decode_attention_of_a_slice(attention_module):
    to = Contexts(ATTENTION_SHAPES[0], LENGTHS)
    q, *rest = to.arguments(list(range(len(LENGTHS))))
    wide = torch.cat([q.flatten(1), q.flatten(1)], dim=1)[:, : q[0].numel()].view(q.shape)
    assert not wide.is_contiguous()
    attend = DecodeAttention(len(LENGTHS), *ATTENTION_SHAPES[0], DEVICE)
    assert torch.equal(attended(attend, wide, *rest), attended(attend, q, *rest))


@needs_cuda
def test_decode_attention_graph_capture():
    shape, lengths = (32, 8, 128), [5000, 1, 300, 700]
    to = Contexts(shape, lengths)
    attend = DecodeAttention(8, *shape, DEVICE)
    q, k, v, indptr, indices, scale = to.arguments([0, 1, 2, 3])
    attended(attend, q, k, v, indptr, indices, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attended(attend, q, k, v, indptr, indices, scale)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]):
        want = attended(attend, *to.arguments(order))
        q2, _, _, indptr2, indices2, _ = to.arguments(order)
        q.copy_(q2), indptr.copy_(indptr2), indices[: len(indices2)].copy_(indices2)
        graph.replay()
        assert torch.equal(out, want)


# ---- prefill_attention -----------------------------------------------------------------------------------------------

# Cached columns and new tokens of each request.
PROMPTS = (
    [(0, 1), (0, 40), (17, 5), (3, 70), (64, 1)]
    if INTERPRETED
    else [(0, 1), (0, 425), (63, 1), (64, 64), (0, 900), (700, 3), (5, 620), (8000, 1), (3000, 2000)]
)


@pytest.fixture
def prefill_module(monkeypatch):
    """In the interpreter tiles and blocks are small, so that short prompts still have several, and products are exact in
    what they promise here: NumPy's BLAS rounds a row by its place in the matrix, tensor cores do not.
    """
    module = importlib.import_module("margingate_kernels.attention.prefill_attention")
    if INTERPRETED:
        numpy = importlib.import_module("numpy")
        monkeypatch.setattr(
            numpy, "matmul", lambda a, b, dtype: numpy.einsum("ij,jk->ik", a.astype(dtype), b.astype(dtype))
        )
        for name, value in (("ROWS", 32), ("BLOCK", 16), ("PLAN", 2)):
            monkeypatch.setattr(module, name, value)
    return module


class Prompts:
    """A pool of K/V and whole prompts in it, of which any part may be asked for."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype = ATTENTION_DTYPES[0]) -> None:
        q_heads, kv_heads, dim = shape
        lengths = [cached + new for cached, new in PROMPTS]
        slots = sum(lengths) + 7
        self.q = list(normal(sum(lengths), q_heads, dim, seed=1, dtype=dtype).split(lengths))
        self.k, self.v = (normal(slots, kv_heads, dim, seed=seed, dtype=dtype) for seed in (2, 3))
        self.slots = list(
            torch.randperm(slots, generator=generator(7), device=DEVICE).int()[: sum(lengths)].split(lengths)
        )
        self.scale = dim**-0.5

    def arguments(self, parts: list[tuple[int, int, int]]) -> tuple:
        """Return the arguments for positions [first, last) of prompts; SGLang's indices are longer than needed."""
        new = torch.tensor([0, *(last - first for _, first, last in parts)], device=DEVICE).cumsum(0).int()
        columns = torch.tensor([0, *(last for *_, last in parts)], device=DEVICE).cumsum(0).int()
        q = torch.cat([self.q[r][first:last] for r, first, last in parts])
        indices = torch.cat([*(self.slots[r][:last] for r, _, last in parts), self.slots[0].new_zeros(5)])
        return q, self.k, self.v, new, columns, indices, self.scale


def prefilled(attend: PrefillAttention, q, k, v, queries, columns, indices, scale) -> torch.Tensor:
    attend.plan(queries, columns, len(indices))
    return attend(q, k, v, indices, scale)


@pytest.mark.parametrize("dtype", ATTENTION_DTYPES)
@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
def test_prefill_attention(shape, dtype, prefill_module):
    arguments = Prompts(shape, dtype).arguments([(r, c, c + n) for r, (c, n) in enumerate(PROMPTS)])
    got = prefilled(PrefillAttention(*shape, DEVICE), *arguments)
    # Weights are rounded to the values' dtype before the product, as in any flash attention.
    torch.testing.assert_close(got, prefill_attention_reference(*arguments), rtol=2e-2, atol=6e-3)


def test_prefill_attention_does_not_depend_on_companions_chunks_or_cache(prefill_module, monkeypatch):
    shape = ATTENTION_SHAPES[0]
    to, attend = Prompts(shape), PrefillAttention(*shape, DEVICE)
    lengths = [cached + new for cached, new in PROMPTS]
    alone = [prefilled(attend, *to.arguments([(r, 0, n)])) for r, n in enumerate(lengths)]
    for seed in range(2 if INTERPRETED else 20):
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(lengths), generator=draw).tolist()[: 2 + seed]
        cuts = [sorted(torch.randint(0, lengths[r] + 1, (2,), generator=draw).tolist()) for r in order]
        parts = [(r, a, b) if a < b else (r, 0, lengths[r]) for r, (a, b) in zip(order, cuts)]
        got = prefilled(attend, *to.arguments(parts)).split([b - a for _, a, b in parts])
        for (r, a, b), rows in zip(parts, got):
            assert torch.equal(rows, alone[r][a:b]), f"positions {a} to {b} of prompt {r} among {len(parts)}"
    # Could this fail? Blocks of another size are another order of summation, and show.
    monkeypatch.setattr(prefill_module, "BLOCK", prefill_module.BLOCK * 2)
    assert not all(torch.equal(prefilled(attend, *to.arguments([(r, 0, n)])), alone[r]) for r, n in enumerate(lengths))


def test_prefill_attention_of_a_slice(prefill_module):
    shape = ATTENTION_SHAPES[0]
    q, *rest = Prompts(shape).arguments([(1, 0, 40), (3, 2, 9)])
    wide = torch.cat([q.flatten(1), q.flatten(1)], dim=1)[:, : q[0].numel()].view(q.shape)
    assert not wide.is_contiguous()
    attend = PrefillAttention(*shape, DEVICE)
    assert torch.equal(prefilled(attend, wide, *rest), prefilled(attend, q, *rest))


class Captured:
    """What a CUDA graph of a padded prefill holds: buffers of one size, whatever is asked of it, and a table of slots."""

    def __init__(self, to: Prompts, shape: tuple[int, int, int], rows: int, requests: int) -> None:
        self.to, self.attend = to, PrefillAttention(*shape, DEVICE)
        wide = max(map(len, to.slots)) + 3
        self.table = torch.stack([torch.nn.functional.pad(slots, (0, wide - len(slots))) for slots in to.slots])
        self.q = torch.full((rows, shape[0], shape[2]), NAN, dtype=to.k.dtype, device=DEVICE)
        self.queries = torch.zeros(requests + 1, dtype=torch.int32, device=DEVICE)
        self.begins, self.ends = torch.zeros(2, requests, dtype=torch.int32, device=DEVICE)

    def fill(self, parts: list[tuple[int, int, int]]) -> int:
        new = torch.tensor([last - first for _, first, last in parts]).cumsum(0).int()
        tokens, n, wide = int(new[-1]), len(parts), self.table.shape[1]
        self.q.fill_(NAN)  # no row of a context reads the padding
        self.q[:tokens] = torch.cat([self.to.q[r][first:last] for r, first, last in parts])
        self.queries.fill_(tokens)[0] = 0
        self.queries[1 : n + 1] = new.to(DEVICE)
        self.begins.zero_()[:n] = torch.tensor([r * wide for r, *_ in parts], device=DEVICE)
        self.ends.zero_()[:n] = torch.tensor([r * wide + last for r, _, last in parts], device=DEVICE)
        return tokens

    def run(self) -> torch.Tensor:
        self.attend.plan(self.queries, self.begins, len(self.q), self.ends)
        return self.attend(self.q, self.to.k, self.to.v, self.table.view(-1), self.to.scale)


def parts_of(seed: int) -> list[tuple[int, int, int]]:
    """Draw parts of some of the prompts: whole, a chunk, behind a cached prefix, one token."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [cached + new for cached, new in PROMPTS]
    order = torch.randperm(len(lengths), generator=draw).tolist()[: 1 + seed % len(lengths)]
    cuts = [sorted(torch.randint(0, lengths[r] + 1, (2,), generator=draw).tolist()) for r in order]
    return [(r, a, b) if a < b else (r, 0, lengths[r]) for r, (a, b) in zip(order, cuts)]


def test_prefill_attention_of_a_padded_batch_with_contexts_in_a_table(prefill_module):
    """The grid is that of the padded size and of most requests; a row has the bits that it has alone, padding is zero."""
    shape = ATTENTION_SHAPES[0]
    to, attend = Prompts(shape), PrefillAttention(*shape, DEVICE)
    most = sum(cached + new for cached, new in PROMPTS)
    for seed in range(4 if INTERPRETED else 40):
        parts = parts_of(seed)
        tokens = sum(b - a for _, a, b in parts)
        for rows, requests in ((tokens, len(parts)), (tokens + 1, len(parts) + 1), (most + 40, len(PROMPTS) + 3)):
            captured = Captured(to, shape, rows, requests)
            assert captured.fill(parts) == tokens
            got = captured.run()
            assert torch.equal(got[:tokens], prefilled(attend, *to.arguments(parts))), f"{parts} in {rows} rows"
            assert not got[tokens:].any(), f"{parts}: padding of {rows} rows"


def test_prefill_attention_bad_input():
    shape = ATTENTION_SHAPES[0]
    attend = PrefillAttention(*shape, DEVICE)
    q, k, v, queries, columns, indices, scale = Prompts(shape).arguments([(1, 0, 40), (3, 2, 9)])
    for bad, message in (
        ((q.float(), k, v, queries, columns, indices), "q must be"),
        ((q, k[:, :1], v, queries, columns, indices), "k must be"),
        ((q, k, v, queries.long(), columns, indices), "queries must be"),
        ((q, k, v, queries, columns[:2], indices), "columns must be"),
        ((q, k, v, queries, columns, indices.repeat(2)[::2]), "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            prefilled(attend, *bad, scale)
    for begins, ends, message in (
        (columns, columns, "one shorter"),
        (columns[:-1], columns[2:], "one shorter"),
        (columns[:-1], columns[1:].long(), "int32"),
    ):
        with pytest.raises(ValueError, match=message):
            attend.plan(queries, begins, len(q), ends)
    with pytest.raises(ValueError, match="not supported"):
        PrefillAttention(4, 4, 80, DEVICE)
