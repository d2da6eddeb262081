"""Captured prefills on a GPU: attention over the buffers of serving/prefill_graphs.py, and a linear layer, bit for bit as eager.

    PYTHONPATH=.:kernels python3 -m pytest tests/gpu/test_prefill_graph_gpu.py

Needs a CUDA device and no SGLang. A whole server's graphs are tried at its start (canonical/prefill_graph_probe.py).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from margingate_kernels import PrefillAttention, prefill_attention_reference

from sglang_margingate.serving.prefill_graphs import GraphAttention, Inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(32, 8, 128), (40, 8, 128), (28, 4, 128), (32, 8, 64), (16, 16, 64)]
"""Query heads, K/V heads and their size: Llama-3.1-8B, Qwen2.5-14B, DeepSeek-R1-Distill-Qwen-7B, Llama-3.2-1B, no groups."""
SIZES = (192, 512, 1408, 4096)
REQUESTS, WIDE = 128, 9000


class World:
    """A pool, a table of slots, and requests drawn at random."""

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        self.shape, (q_heads, kv_heads, dim) = shape, shape
        self.draw = torch.Generator().manual_seed(seed)
        device = torch.Generator("cuda").manual_seed(seed)
        slots = 100_000
        self.k, self.v = (
            torch.randn(slots, kv_heads, dim, generator=device, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        # A pool of this size holds no 200 contexts of 9,000: they share slots, as prefix hits do.
        self.table = torch.randint(1, slots, (200, WIDE), generator=device, device="cuda", dtype=torch.int32)
        # Wider than needed and sliced, as the layer that makes queries, keys and values leaves it.
        wide = torch.randn(
            SIZES[-1], q_heads + 2 * kv_heads, dim, generator=device, device="cuda", dtype=torch.bfloat16
        )
        self.q = wide[:, :q_heads]

    def batch(self, tokens: int, most: int) -> Any:
        """Return a batch of ``tokens`` tokens: few or ``most`` requests, fresh, behind long prefixes, or of one token."""
        n = int(torch.randint(1, min(tokens, most) + 1, (1,), generator=self.draw)) if tokens > 1 else 1
        n = min(n, [1, 4, 16, most][int(torch.randint(0, 4, (1,), generator=self.draw))])
        cuts = torch.randperm(tokens - 1, generator=self.draw)[: n - 1].sort().values + 1
        new = torch.diff(torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]))
        cached = torch.randint(0, WIDE - 4200, (n,), generator=self.draw) * torch.randint(
            0, 2, (n,), generator=self.draw
        )
        return SimpleNamespace(
            batch_size=n, input_ids=torch.zeros(tokens, device="cuda"), positions=torch.zeros(tokens, device="cuda"),
            out_cache_loc=torch.zeros(tokens, device="cuda"), extend_seq_lens=new.int().cuda(),
            seq_lens=(new + cached).cuda(), req_pool_indices=torch.randperm(200, generator=self.draw)[:n].cuda(),
        )  # fmt: skip

    def eager(self, batch: Any) -> tuple[torch.Tensor, ...]:
        """Return the arguments of an eager call: indices built for the batch."""
        rows = zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist())
        slots = torch.cat([self.table[row, :length] for row, length in rows])
        queries, columns = (
            torch.nn.functional.pad(x.cumsum(0), (1, 0)).int() for x in (batch.extend_seq_lens, batch.seq_lens)
        )
        return queries, columns, slots


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_captured_attention_has_the_bits_of_eager_attention(shape: tuple[int, int, int], size: int) -> None:
    world, scale = World(shape), 1 / math.sqrt(shape[2])
    inputs = Inputs(SIZES[-1], REQUESTS, "cuda")
    attention = GraphAttention(PrefillAttention(*shape, "cuda"), inputs, world.table)
    eager = PrefillAttention(*shape, "cuda")

    def run() -> torch.Tensor:
        attention.plan(size)
        return attention(world.q[:size], world.k, world.v, scale)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run()
    lengths = [size, size - 1, size // 2 + 1, 1]
    for turn in range(40):
        tokens = lengths[turn] if turn < len(lengths) else int(torch.randint(1, size + 1, (1,), generator=world.draw))
        batch = world.batch(tokens, inputs.requests_at(size).shape[1])
        inputs.fill(batch, size)
        out.fill_(math.nan)
        graph.replay()
        queries, columns, slots = world.eager(batch)
        eager.plan(queries, columns, len(slots))
        # As the server's eager prefill: real tokens only, in a tensor of their own.
        wanted = eager(world.q[:tokens].contiguous(), world.k, world.v, slots, scale)
        what = f"turn {turn}: {batch.batch_size} requests, {tokens} of {size} tokens"
        differ = (out[:tokens] != wanted).flatten(1).any(1).sum().item()
        assert torch.equal(out[:tokens], wanted), f"{what}: {differ} tokens differ, {out[:tokens].isnan().sum()} NaN"
        assert not out[tokens:].any(), f"{what}: padding is not zero"
        if turn == 2:
            x = prefill_attention_reference(world.q[:tokens], world.k, world.v, queries, columns, slots, scale)
            torch.testing.assert_close(wanted, x, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("outputs", "inner"), [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)])
def test_a_captured_linear_layer_has_the_bits_of_an_eager_one(outputs: int, inner: int) -> None:
    """cuBLAS takes another workspace on another stream: it must not choose another kernel for it."""
    draw = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(outputs, inner, generator=draw, device="cuda", dtype=torch.bfloat16)
    for size in (192, 256, *SIZES[1:]):
        x = torch.randn(size, inner, generator=draw, device="cuda", dtype=torch.bfloat16)
        wanted, stream = torch.nn.functional.linear(x, weight), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.nn.functional.linear(x, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = torch.nn.functional.linear(x, weight)
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, wanted), f"{size} rows: {(out != wanted).sum().item()} elements differ"
