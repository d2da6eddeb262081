"""Prefills in CUDA graphs, without CUDA: a capture is a plain call here, and the model a few lines. Sizes, batches, buffers, bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from margingate_kernels import PrefillAttention

from sglang_margingate.canonical.classes import Classes
from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
from sglang_margingate.canonical.prefill_graph_probe import COARSE, COARSE_FROM, FINE, graph_sizes
from sglang_margingate.runtime.view import SHAPE, ForwardShape
from sglang_margingate.serving import attention_hooks, shape_hooks
from sglang_margingate.serving.attention_hooks import PREFILL
from sglang_margingate.serving.prefill_graphs import (
    GraphAttention,
    Inputs,
    PrefillGraphs,
    capture_all,
    obstacle,
)

HEADS, KV_HEADS, DIM, VOCAB = 4, 2, 16, 50
SIZES = RowSizes((16, 24, 32))
CLASSES = Classes(InvarianceMap([]), SIZES, SIZES, SIZES, 16)


# ---- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_of_the_class_and_near_enough_to_pad_little() -> None:
    prefill = RowSizes((*range(192, 200), *range(201, 208), *range(241, 260), *range(264, 8193, 8)))
    sizes = graph_sizes(prefill, 4096)
    assert set(sizes) <= set(prefill.sizes)
    assert (sizes[0], sizes[-1], len(sizes)) == (192, 4096, 20)
    for small, large in itertools.pairwise(sizes):
        assert large - small <= max(FINE, small // 8 + (COARSE if small >= COARSE_FROM else FINE))


def test_a_whole_chunk_has_a_size_of_its_own() -> None:
    assert graph_sizes(RowSizes(tuple(range(256, 2001, 8))), 2000)[-1] == 2000
    assert graph_sizes(RowSizes((300, 1001)), 1000) == [300]


@pytest.mark.parametrize("prefill", [RowSizes(), RowSizes((512, 1024))])
def test_no_size_outside_the_class_is_captured(prefill: RowSizes) -> None:
    assert graph_sizes(prefill, 511) == []


def test_gaps_of_the_class_are_stepped_over() -> None:
    assert graph_sizes(RowSizes((100, 2000, 4000)), 4096) == [2000, 4000]


# ---- a server of a few lines -------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """One layer: tokens and positions in, attention over the pool, a linear layer, all through the hooks."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool
        draw = torch.Generator().manual_seed(0)
        self.embed = torch.randn(VOCAB, HEADS * DIM, generator=draw).bfloat16()
        self.weight = torch.randn(HEADS * DIM, HEADS * DIM, generator=draw).bfloat16() / 8

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        x = self.embed[ids] + (positions[:, None] * 0.01).bfloat16()
        k = x[:, : KV_HEADS * DIM].reshape(-1, KV_HEADS, DIM)
        layer = SimpleNamespace(tp_q_head_num=HEADS, head_dim=DIM, scaling=0.25, layer_id=0)
        backend = SimpleNamespace(token_to_kv_pool=self.pool)
        y = attention_hooks.extend(eager_attention, backend, x, k, k * 2, layer, batch)
        out: torch.Tensor = shape_hooks.linear(lambda _m, _l, wide: wide @ self.weight, None, None, y)
        return out


def eager_attention(
    backend: Any, q: torch.Tensor, k: Any, v: Any, _layer: Any, batch: Any, _save: bool
) -> torch.Tensor:
    """As SGLang with our kernel: indices and plan are built for the batch."""
    pool = backend.token_to_kv_pool
    pool.write(batch.out_cache_loc, k[: len(q)], v[: len(q)])
    attend = PrefillAttention(HEADS, KV_HEADS, DIM, "cpu")
    slots = torch.cat([pool.table[r, :n] for r, n in zip(batch.req_pool_indices, batch.seq_lens)])
    ends = torch.nn.functional.pad(batch.seq_lens.cumsum(0), (1, 0)).int()
    attend.plan(torch.nn.functional.pad(batch.extend_seq_lens.cumsum(0), (1, 0)).int(), ends, len(slots))
    return attend(q.view(-1, HEADS, DIM), *pool.get_kv_buffer(0), slots, 0.25).flatten(1)


class Pool:
    def __init__(self) -> None:
        self.k, self.v = (torch.zeros(200, KV_HEADS, DIM).bfloat16() for _ in range(2))
        order = torch.randperm(199, generator=torch.Generator().manual_seed(1)).int() + 1
        self.table = order[:180].view(6, 30).contiguous()

    def write(self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k[slots], self.v[slots] = k, v

    def set_kv_buffer(self, _layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.write(where.loc, k, v)

    def get_kv_buffer(self, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k, self.v


def plain(run: Callable[[], None]) -> Callable[[], None]:
    run()
    return run


class Server:
    """SGLang's side: a model with layers and a head, and an eager runner."""

    def __init__(self, requests: int = 4) -> None:
        self.pool = Pool()
        self.layers = Layers(self.pool)
        self.model = SimpleNamespace(forward=self.forward)
        self.inputs = Inputs(32, requests, "cpu")
        attend = PrefillAttention(HEADS, KV_HEADS, DIM, "cpu")
        attention = GraphAttention(attend, self.inputs, self.pool.table)
        hidden = torch.zeros(32, HEADS * DIM).bfloat16()
        self.graphs = PrefillGraphs(self, self.inputs, attention, hidden, plain)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        hidden = self.layers(ids, positions, batch)
        last = hidden[batch.extend_seq_lens.cumsum(0) - 1]
        out: torch.Tensor = shape_hooks.head(lambda _p, rows: rows @ self.layers.embed.T, None, last)
        return out

    def batch(self, inputs: Inputs, size: int) -> Any:
        ids, positions, out = inputs.tokens[:, :size]
        return SimpleNamespace(input_ids=ids, positions=positions, out_cache_loc=out)

    def timed(self) -> Any:
        return nullcontext()

    def serving(self) -> Any:
        return nullcontext()

    def run(self, batch: Any) -> torch.Tensor:
        """Run a batch as SGLang would, through the hook on its eager runner."""
        out: torch.Tensor = shape_hooks.run_eagerly(
            lambda _runner, b: self.forward(b.input_ids, b.positions, b), None, batch
        )
        return out


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    memory_pool = SimpleNamespace(KVWriteLoc=lambda loc, _swa: SimpleNamespace(loc=loc))
    monkeypatch.setitem(__import__("sys").modules, "sglang.srt.mem_cache.memory_pool", memory_pool)
    monkeypatch.setattr(shape_hooks, "_classes", CLASSES)
    monkeypatch.setattr(shape_hooks, "_prefill_graphs", None)
    return Server()


def batch_of(parts: list[tuple[int, int, int]], table: torch.Tensor, **more: Any) -> Any:
    """Return a batch as SGLang's ``ForwardBatch``: positions [first, last) of the requests in rows of the table."""
    tokens = torch.randint(0, VOCAB, (6, 30), generator=torch.Generator().manual_seed(2))
    lengths = [b - a for _, a, b in parts]
    fields: dict[str, Any] = {
        "forward_mode": SimpleNamespace(name="EXTEND", is_decode=lambda: False),
        "batch_size": len(parts),
        "input_ids": torch.cat([tokens[r, a:b] for r, a, b in parts]),
        "positions": torch.cat([torch.arange(a, b) for _, a, b in parts]),
        "out_cache_loc": torch.cat([table[r, a:b] for r, a, b in parts]).long(),
        "extend_num_tokens": sum(lengths),
        "extend_seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "seq_lens": torch.tensor([b for *_, b in parts]),
        "req_pool_indices": torch.tensor([r for r, *_ in parts]),
        "capture_hidden_mode": SimpleNamespace(name="NULL"),
    }
    return SimpleNamespace(**{**fields, **more})


WHOLE = [(0, 0, 9), (3, 0, 4)]
BEHIND = [(1, 0, 3), (0, 5, 20), (5, 1, 2)]


def test_a_replay_gives_the_bits_of_an_eager_forward_and_says_what_it_ran_at(server: Server) -> None:
    for size in SIZES.sizes:
        server.graphs.capture(size)
    table = server.pool.table
    server.run(batch_of([(0, 0, 5), (5, 0, 1)], table))  # cached columns of what follows
    for parts, size in ((WHOLE, 16), (BEHIND, 24), ([(2, 0, 30)], 32), ([(4, 7, 8)], 16)):
        batch = batch_of(parts, table)
        shape_hooks.replay_prefills(None)
        wanted, columns = server.run(batch), server.pool.k.clone()
        server.pool.k[batch.out_cache_loc] = 7.0
        shape_hooks.replay_prefills(server.graphs)
        found = server.run(batch)
        assert torch.equal(found, wanted)
        assert torch.equal(server.pool.k[1:], columns[1:]), "and the same columns, and no other"
        assert getattr(batch, SHAPE) == ForwardShape(len(batch.input_ids), size, True)
    assert server.graphs.replays == 4
    assert "forward" not in vars(server.layers), "the model's own forward is in its place again"


def test_buffers_keep_nothing_of_the_batch_before(server: Server) -> None:
    inputs, table = server.inputs, server.pool.table
    inputs.fill(batch_of([(2, 0, 20), (0, 0, 3), (1, 0, 4)], table), 32)
    inputs.fill(batch_of([(3, 2, 12)], table), 16)
    assert inputs.tokens[2, :10].tolist() == table[3, 2:12].tolist()
    assert not inputs.tokens[:, 10:16].any(), "padding writes slot 0"
    assert inputs.requests.tolist() == [[10, 0, 0, 0], [12, 0, 0, 0], [3, 0, 0, 0]]


@pytest.mark.parametrize(
    "more",
    [
        {"forward_mode": SimpleNamespace(name="MIXED")},
        {"forward_mode": SimpleNamespace(name="TARGET_VERIFY")},
        {"input_embeds": torch.zeros(2)},
        {"mrope_positions": torch.zeros(1)},
        {"spec_info": object()},
        {"lora_ids": [None, "adapter"]},
        {"capture_hidden_mode": SimpleNamespace(name="FULL")},
        {"return_pooled_hidden_states": True},
        {"extend_num_tokens": 12},
        {"input_ids": None},
    ],
)
def test_what_a_graph_has_no_buffer_for_runs_eagerly(server: Server, more: dict[str, Any]) -> None:
    server.graphs.capture(16)
    table = server.pool.table
    assert server.graphs.size_for(batch_of(WHOLE, table, lora_ids=[None, None], mm_inputs=[None, None])) == 16
    assert server.graphs.size_for(batch_of(WHOLE, table, **more)) is None


def test_what_does_not_fit_or_is_off_runs_eagerly(server: Server) -> None:
    server.graphs.capture(16)
    server.graphs.capture(24)
    table = server.pool.table
    fits = batch_of(WHOLE, table)
    assert server.graphs.size_for(batch_of([(0, 0, 25)], table)) is None, "too long"
    assert server.graphs.size_for(batch_of([(r, 0, 1) for r in range(5)], table)) is None, "too many requests"
    with server.graphs.off():
        assert server.graphs.size_for(fits) is None
    server.graphs.drop(16)
    assert server.graphs.sizes == (24,)
    assert server.graphs.size_for(fits) == 24


def test_a_small_graph_holds_few_requests_and_more_go_to_a_larger_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request that a graph has room for costs an attention program in every layer, though nobody came."""
    monkeypatch.setattr("sglang_margingate.serving.prefill_graphs.FEW_REQUESTS", 2)
    monkeypatch.setattr("sglang_margingate.serving.prefill_graphs.TOKENS_A_REQUEST", 6)
    server.graphs.capture(16)
    server.graphs.capture(24)
    table = server.pool.table
    two, three = ([(r, 0, 3) for r in range(n)] for n in (2, 3))
    assert server.graphs.size_for(batch_of(two, table)) == 16
    assert server.graphs.size_for(batch_of(three, table)) == 24
    shape_hooks.replay_prefills(server.graphs)
    wanted = None
    for graphs in (server.graphs, None):
        shape_hooks.replay_prefills(graphs)
        found = server.run(batch_of(three, table))
        wanted = found if wanted is None else wanted
        assert torch.equal(found, wanted)
    assert server.graphs.replays == 1


def test_a_size_outside_the_class_is_refused(server: Server) -> None:
    with pytest.raises(RuntimeError, match="its layers ran at 24 rows"):
        server.graphs.capture(20)  # the hook on linear layers pads it, which a graph must not need
    original = server.layers.forward
    # A layer of another shape than any that was probed.
    server.layers.forward = lambda *a: shape_hooks.linear(lambda _m, _l, x: x, None, None, original(*a)[None])[0]  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="at 16 rows, outside the class"):
        server.graphs.capture(16)
    assert server.graphs.sizes == ()


def test_layers_that_give_more_than_hidden_states_are_not_captured(server: Server) -> None:
    server.layers.forward = lambda *_: (torch.zeros(16, 64), [])  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the layers give tuple"):
        server.graphs.capture(16)


def test_an_obstacle_is_named() -> None:
    args = SimpleNamespace(tp_size=2, pp_size=1)
    pool = SimpleNamespace(req_to_token=torch.zeros(2, 8, dtype=torch.int32))
    runner = SimpleNamespace(
        server_args=args, req_to_token_pool=pool, attn_backend=SimpleNamespace(), model=SimpleNamespace()
    )
    assert obstacle(runner, Classes(InvarianceMap([]), unknown=("x",))) == "the probe does not know all of its layers"
    assert obstacle(runner, Classes(InvarianceMap([]))) == "no class holds a prefill"
    assert obstacle(runner, CLASSES) == "our attention does not prefill it"


def test_the_capture_marks_its_batch(server: Server) -> None:
    seen: list[Any] = []
    original = server.batch
    server.batch = lambda *a: seen.append(original(*a)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    server.graphs.capture(16)
    assert getattr(seen[0], PREFILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_capturing_where_one_cannot(rank: int) -> None:
    asked: list[str] = []

    class Captured:
        """Graphs of a rank; the second one cannot capture 128 tokens."""

        sizes: tuple[int, ...] = ()

        def capture(self, size: int) -> None:
            if rank == 1 and size == 128:
                raise RuntimeError("out of memory")
            self.sizes += (size,)

        def drop(self, size: int) -> None:
            self.sizes = tuple(s for s in self.sizes if s != size)

    def agree(what: str, holds: bool) -> bool:
        asked.append(what)
        return holds and "128" not in what

    graphs: Any = Captured()
    (note,) = capture_all(graphs, [64, 128, 256], agree)
    assert graphs.sizes == (256,)
    assert asked == ["the prefill graph of 256 tokens", "the prefill graph of 128 tokens"]
    assert ("another rank" in note) is (rank == 0)


def test_a_captured_size_is_timed_without_being_counted(server: Server) -> None:
    server.graphs.capture(24)
    assert server.graphs.milliseconds(24) > 0
    assert server.graphs.replays == 0
