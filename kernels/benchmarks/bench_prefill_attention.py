"""Time prefill attention over paged K/V against FlashInfer's fa3 (32 query and 8 K/V heads of 128, bfloat16, page size 1).

    python kernels/benchmarks/bench_prefill_attention.py [--tune] [--json FILE]

"paged" is FlashInfer over pages, "contiguous" its faster kernel that SGLang uses where nothing is cached; neither is
repeatable (tests/gpu/repeat_kernels.py). Operations are those of the causal half. --tune tries launch constants instead.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import common
import torch
from margingate_kernels import PrefillAttention, prefill_attention, prefill_attention_reference

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
BATCHES: dict[str, list[tuple[int, int]]] = {  # of each request: cached tokens, new ones
    "64 prompts of 100 to 900": [(0, 100 + 800 * i // 63) for i in range(64)],
    "16 half cached of 500": [(250, 250)] * 16,
    "1 of 8192": [(0, 8192)],
    "8192 behind 24576": [(24576, 8192)],
    "32 of 1 behind 1000": [(1000, 1)] * 32,
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

    @classmethod
    def of(cls, requests: list[tuple[int, int]]) -> Inputs:
        """Draw one."""
        new, slots = sum(n for _, n in requests), sum(c + n for c, n in requests)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        def ends(lengths: list[int]) -> torch.Tensor:
            return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")

        pairs = sum(n * c + n * (n + 1) // 2 for c, n in requests)
        return cls(
            draw(new, Q_HEADS, DIM), draw(slots, KV_HEADS, DIM), draw(slots, KV_HEADS, DIM),
            ends([n for _, n in requests]), ends([c + n for c, n in requests]), torch.randperm(slots, device="cuda").int(),
            4.0 * pairs * Q_HEADS * DIM,
        )  # fmt: skip


def ours(x: Inputs) -> functools.partial[torch.Tensor]:
    """Return a call of the kernel, planned."""
    attend = PrefillAttention(Q_HEADS, KV_HEADS, DIM, "cuda")
    attend.plan(x.queries, x.columns, len(x.indices))
    return functools.partial(attend, x.q, x.k, x.v, x.indices, SCALE)


def flashinfer(x: Inputs, *, paged: bool) -> functools.partial[torch.Tensor]:
    """Return a call of FlashInfer's fa3 prefill, planned."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
    shape, dtypes = (Q_HEADS, KV_HEADS, DIM), {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    if paged:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa3")
        last = torch.ones(len(x.queries) - 1, dtype=torch.int32, device="cuda")
        wrapper.plan(x.queries, x.columns, x.indices, last, *shape, 1, causal=True, sm_scale=SCALE, **dtypes)
        return functools.partial(wrapper.run, x.q, (x.k, x.v))
    ragged = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
    ragged.plan(x.queries, x.columns, *shape, causal=True, sm_scale=SCALE, **dtypes)
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
    args = arguments.parse_args()
    env, copy = common.start()
    torch.manual_seed(0)
    data = {name: Inputs.of(requests) for name, requests in BATCHES.items()}
    if args.tune:
        calls = {name.replace(" ", "_"): lambda x=x: [ours(x)] for name, x in data.items()}
        common.tune(prefill_attention, ("ROWS", "BLOCK", "WARPS", "STAGES"), TRIALS, calls)
        return
    rows: list[dict[str, object]] = []
    for name, x in data.items():
        call = ours(x)
        if len(x.indices) < 10_000:
            want = prefill_attention_reference(x.q, x.k, x.v, x.queries, x.columns, x.indices, SCALE)
            torch.testing.assert_close(call(), want, rtol=2e-2, atol=6e-3)
        times = [
            common.time_calls([one], rounds=4, replays=20)
            for one in (call, flashinfer(x, paged=True), flashinfer(x, paged=False))
        ]
        rows.append(
            {"batch": name, "us": times[0].median, "p10-p90": f"{times[0].low:.1f}-{times[0].high:.1f}",
             "TFLOP/s": round(x.flops / times[0].median / 1e6), "paged us": times[1].median,
             "contiguous us": times[2].median, "ours / contiguous": times[0].median / times[2].median}
        )  # fmt: skip
    common.finish(args.json, env, copy, rows)


if __name__ == "__main__":
    main()
