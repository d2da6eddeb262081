"""Time prefill attention over paged K/V against FlashAttention-3's (32 query and 8 K/V heads of 128, bfloat16, page size 1).

    python kernels/benchmarks/bench_prefill_attention.py [--heads 28,4,128] [--flashinfer] [--tune] [--json FILE]

"fa3" is sgl_kernel's, pinned as the canonical path pins it; with --flashinfer, "paged" is FlashInfer's fa3 over pages and
"contiguous" its faster kernel that SGLang uses where nothing is cached, neither of which is repeatable
(tests/gpu/repeat_kernels.py). Operations are those of the causal half. --tune tries launch constants instead.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import common
import torch
from margingate_kernels import (
    Fa3PrefillAttention,
    PrefillAttention,
    fa3_available,
    prefill_attention_reference,
)
from margingate_kernels.attention import prefill_attention

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
Heads = tuple[int, int, int]
BATCHES: dict[str, list[tuple[int, int]]] = {  # of each request: cached tokens, new ones
    "64 prompts of 100 to 900": [(0, 100 + 800 * i // 63) for i in range(64)],
    "16 half cached of 500": [(250, 250)] * 16,
    "1 of 200": [(0, 200)],
    "1 of 500": [(0, 500)],
    "1 of 1024": [(0, 1024)],
    "1 of 4096": [(0, 4096)],
    "1 of 8192": [(0, 8192)],
    "1 of 32000": [(0, 32000)],
    "8192 behind 24576": [(24576, 8192)],
    "32 of 1 behind 1000": [(1000, 1)] * 32,
    "8 of 1 behind 8192": [(8192, 1)] * 8,
}


@dataclass(frozen=True)
class Inputs:
    """A batch, slots in random order as in a used pool."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: torch.Tensor
    columns: torch.Tensor
    indices: torch.Tensor
    flops: float
    heads: Heads

    @classmethod
    def of(cls, requests: list[tuple[int, int]], heads: Heads) -> Inputs:
        """Draw one."""
        new, slots = sum(n for _, n in requests), sum(c + n for c, n in requests)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        def ends(lengths: list[int]) -> torch.Tensor:
            return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")

        pairs = sum(n * c + n * (n + 1) // 2 for c, n in requests)
        return cls(
            draw(new, heads[0], heads[2]), *(draw(slots, *heads[1:]) for _ in "kv"),
            ends([n for _, n in requests]), ends([c + n for c, n in requests]), torch.randperm(slots, device="cuda").int(),
            4.0 * pairs * heads[0] * heads[2], heads,
        )  # fmt: skip


def ours(
    x: Inputs, kind: type[PrefillAttention] | type[Fa3PrefillAttention] = PrefillAttention
) -> functools.partial[torch.Tensor]:
    """Return a call of the kernel, planned."""
    attend = kind(*x.heads, "cuda")
    attend.plan(x.queries, x.columns, len(x.indices))
    return functools.partial(attend, x.q, x.k, x.v, x.indices, x.heads[2] ** -0.5)


def flashinfer(x: Inputs, *, paged: bool) -> functools.partial[torch.Tensor]:
    """Return a call of FlashInfer's fa3 prefill, planned."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    shape, scale, dtypes = x.heads, x.heads[2] ** -0.5, {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if paged:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
        last = torch.ones(len(x.queries) - 1, dtype=torch.int32, device="cuda")
        wrapper.plan(x.queries, x.columns, x.indices, last, *shape, 1, causal=True, sm_scale=scale, **dtypes)
        return functools.partial(wrapper.run, x.q, (x.k, x.v))
    ragged = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
    ragged.plan(x.queries, x.columns, *shape, causal=True, sm_scale=scale, **dtypes)
    return functools.partial(ragged.run, x.q, x.k, x.v)


TRIALS = [  # rows, block, warps, stages
    (128, 32, 4, 5), (128, 32, 4, 4), (128, 32, 4, 6), (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3), (64, 32, 4, 5),
    (64, 64, 4, 3), (256, 32, 8, 4), (256, 64, 8, 2),
]  # fmt: skip
"""Launch constants that --tune tries."""


def main() -> None:
    """Run the benchmark."""
    arguments = common.parser(__doc__)
    arguments.add_argument("--tune", action="store_true", help="try launch constants")
    arguments.add_argument("--heads", default=f"{Q_HEADS},{KV_HEADS},{DIM}", help="query heads, K/V heads, their size")
    arguments.add_argument("--flashinfer", action="store_true", help="FlashInfer's kernels too")
    args = arguments.parse_args()
    q_heads, kv_heads, dim = map(int, args.heads.split(","))
    env, copy = common.start()
    torch.manual_seed(0)
    data = {name: Inputs.of(requests, (q_heads, kv_heads, dim)) for name, requests in BATCHES.items()}
    if args.tune:
        calls = {name.replace(" ", "_"): lambda x=x: [ours(x)] for name, x in data.items()}
        common.tune(prefill_attention, ("ROWS", "BLOCK", "WARPS", "STAGES"), TRIALS, calls)
        return
    rows: list[dict[str, object]] = []
    for name, x in data.items():
        calls = {"ours": ours(x)}
        if fa3_available(*x.heads):
            calls["fa3"] = ours(x, Fa3PrefillAttention)
        if len(x.indices) < 10_000:
            for call in calls.values():
                want = prefill_attention_reference(x.q, x.k, x.v, x.queries, x.columns, x.indices, dim**-0.5)
                torch.testing.assert_close(call(), want, rtol=2e-2, atol=6e-3)
        if args.flashinfer:
            calls |= {"paged": flashinfer(x, paged=True), "contiguous": flashinfer(x, paged=False)}
        times = {who: common.time_calls([call], rounds=4, replays=20) for who, call in calls.items()}
        took = times["ours"]
        row: dict[str, object] = {"batch": name, "us": took.median, "p10-p90": f"{took.low:.1f}-{took.high:.1f}"}
        row["TFLOP/s"] = round(x.flops / took.median / 1e6)
        row |= {f"{who} us": time.median for who, time in times.items() if who != "ours"}
        row |= {f"ours / {who}": took.median / time.median for who, time in times.items() if who != "ours"}
        rows.append(row)
    common.finish(args.json, env, copy, rows)


if __name__ == "__main__":
    main()
