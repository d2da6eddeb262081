"""Time decode attention over paged K/V against FlashInfer's (heads of 128, by default 32 and 8 of K/V; bfloat16, page size 1).

    python kernels/benchmarks/bench_decode_attention.py [--tune] [--heads 10,2] [--json FILE]

"stock" is FlashInfer's tensor-core decode with the plan it makes for the whole batch under a CUDA graph, "no split" the
same without K/V split, which is row-invariant too; "fa3" is FlashAttention-3 as SGLang calls it on Hopper, where there is one.
A context as 64-1216 says that the rows' lie evenly between. Bytes are those of K and V. --tune tries launch constants instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import common
import torch
from margingate_kernels import DecodeAttention, decode_attention_reference, fa3_available
from margingate_kernels.attention import decode_attention

Q_HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
SHAPES = (
    (1, 512, 512), (8, 512, 512), (32, 512, 512), (64, 512, 512), (24, 64, 1216), (41, 64, 1216), (48, 64, 1216),
    (64, 64, 1216), (1, 8192, 8192), (8, 8192, 8192), (1, 32000, 32000), (8, 32000, 32000),
)  # fmt: skip
"""Rows, and the shortest and longest context."""

GRAPH = 17
"""Rows of the smallest CUDA graph of a decode class: --tune fills up to it with rows of padding (a + behind the rows)."""


@dataclass(frozen=True)
class Inputs:
    """A batch, slots in random order as in a used pool, rows in no order of length."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indptr: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def of(cls, rows: int, least: int, most: int, padding: int = 0) -> Inputs:
        """Draw one; the lengths are the same each time. Rows of padding, of one token, come last."""
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
        lengths = least + order * (most - least) // max(rows - 1, 1)
        rows, lengths = rows + padding, torch.nn.functional.pad(lengths, (0, padding), value=1)
        slots = int(lengths.sum())

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        return cls(
            draw(rows, Q_HEADS, DIM), draw(slots, KV_HEADS, DIM), draw(slots, KV_HEADS, DIM),
            torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda(),
            torch.randperm(slots, device="cuda").int(),
        )  # fmt: skip

    @property
    def size(self) -> int:
        """Bytes of K and V."""
        return self.k.nbytes + self.v.nbytes


def ours(attend: DecodeAttention, x: Inputs) -> torch.Tensor:
    """Call the kernel; its plan was made, as for all layers of a forward but the first."""
    return attend(x.q, x.k, x.v, x.indices, SCALE)


def flashinfer(x: Inputs, *, split: bool) -> functools.partial[torch.Tensor]:
    """Return a call of FlashInfer's decode, planned."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    rows = len(x.q)
    workspace = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")  # its own: the plan lies in it
    last = torch.ones(rows, dtype=torch.int32, device="cuda")
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=x.indptr,
        paged_kv_indices_buffer=x.indices, paged_kv_last_page_len_buffer=last,
    )  # fmt: skip
    wrapper.plan(x.indptr, x.indices, last, Q_HEADS, KV_HEADS, DIM, 1, data_type=torch.bfloat16, q_data_type=torch.bfloat16,
                 sm_scale=SCALE, disable_split_kv=not split)  # fmt: skip
    return functools.partial(wrapper.run, x.q, (x.k, x.v))


def fa3(x: Inputs) -> functools.partial[torch.Tensor] | None:
    """Return a call of FlashAttention-3 with its own choice of splits; None where this machine has none."""
    if not fa3_available(Q_HEADS, KV_HEADS, DIM):
        return None
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    lengths = x.indptr.diff()
    table = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.int32, device="cuda")
    for row, slots in enumerate(x.indices.split(lengths.tolist())):
        table[row, : len(slots)] = slots
    ends = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
    return functools.partial(
        flash_attn_with_kvcache, q=x.q, k_cache=x.k.unsqueeze(1), v_cache=x.v.unsqueeze(1), page_table=table,
        cache_seqlens=lengths, cu_seqlens_q=ends, max_seqlen_q=1, softmax_scale=SCALE, causal=True,
    )  # fmt: skip


def sets_of(rows: int, least: int, most: int, padding: int = 0) -> list[Inputs]:
    """Return inputs to rotate among, so that none of them stays in the L2 cache."""
    first = Inputs.of(rows, least, most, padding)
    return [
        first,
        *(Inputs.of(rows, least, most, padding) for _ in range(common.input_sets(first.size, at_least=2) - 1)),
    ]


TRIALS = [  # block, warps, stages, programs a multiprocessor, chunk, chunks, tokens of a long chunk, most chunks, loaded before joining, span
    (64, 2, 3, 4, 128, 32, 512, 64, 8, 8), (64, 2, 3, 4, 128, 32, 512, 64, 8, 16), (64, 2, 3, 4, 128, 64, 512, 64, 8, 8),
    (64, 2, 3, 4, 128, 32, 512, 128, 8, 8), (64, 2, 3, 4, 128, 64, 512, 128, 8, 8), (64, 2, 3, 4, 128, 64, 256, 128, 8, 16),
    (64, 2, 3, 3, 128, 32, 512, 64, 8, 8),
]  # fmt: skip
"""Launch constants that --tune tries."""

CONSTANTS = (
    "BLOCK", "WARPS", "STAGES", "PROGRAMS_PER_SM", "CHUNK", "CHUNKS", "LONG_CHUNK", "MOST_CHUNKS", "WIDE", "SPAN",
)  # fmt: skip


def planned(xs: list[Inputs]) -> list[functools.partial[torch.Tensor]]:
    """Return calls of a kernel made and planned for these inputs."""
    attend = DecodeAttention(64, Q_HEADS, KV_HEADS, DIM, "cuda")
    attend.plan(xs[0].indptr)
    return [functools.partial(ours, attend, x) for x in xs]


def main() -> None:
    """Run the benchmark."""
    global Q_HEADS, KV_HEADS
    arguments = common.parser(__doc__)
    arguments.add_argument("--tune", action="store_true", help="try launch constants")
    arguments.add_argument("--heads", default=f"{Q_HEADS},{KV_HEADS}", help="query and K/V heads (%(default)s)")
    args = arguments.parse_args()
    Q_HEADS, KV_HEADS = map(int, args.heads.split(","))
    env, copy = common.start()
    torch.manual_seed(0)
    if args.tune:
        data = {
            f"{rows}{'+' * (rows < GRAPH)}x{least if least == most else f'{least}-{most}'}": sets_of(
                rows, least, most, max(0, GRAPH - rows)
            )
            for rows, least, most in SHAPES
        }
        common.tune(decode_attention, CONSTANTS, TRIALS, {name: lambda xs=xs: planned(xs) for name, xs in data.items()})
        return
    attend = DecodeAttention(64, Q_HEADS, KV_HEADS, DIM, "cuda")
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        inputs = sets_of(*shape)
        x = inputs[0]
        attend.plan(x.indptr)
        want = decode_attention_reference(x.q, x.k, x.v, x.indptr, x.indices, SCALE)
        torch.testing.assert_close(ours(attend, x), want, rtol=2e-2, atol=2e-3)
        times = [common.time_calls([functools.partial(ours, attend, x) for x in inputs])]
        for split in (True, False):
            times.append(common.time_calls([flashinfer(x, split=split) for x in inputs]))
        theirs = [call for x in inputs if (call := fa3(x)) is not None]
        fa3_us = common.time_calls(theirs).median if theirs else float("nan")
        rate = x.size / times[0].median / 1e3
        rows.append(
            {"rows": shape[0], "context": str(shape[1]) if shape[1] == shape[2] else f"{shape[1]}-{shape[2]}", "us": times[0].median, "p10-p90": f"{times[0].low:.1f}-{times[0].high:.1f}",
             "GB/s": round(rate), "% of copy": round(100 * rate / copy, 1), "stock us": times[1].median,
             "ours / stock": times[0].median / times[1].median, "no split us": times[2].median, "fa3 us": fa3_us,
             "ours / fa3": times[0].median / fa3_us}
        )  # fmt: skip
    common.finish(args.json, env, copy, rows)


if __name__ == "__main__":
    main()
