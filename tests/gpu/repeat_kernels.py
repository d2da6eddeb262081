"""Look for races: run each kind of kernel of a forward on the same input very often, and count results with other bits.

    PYTHONPATH=.:kernels:SITE python3 tests/gpu/repeat_kernels.py [--seconds 5] [--only NAME] [--json FILE]

What depends on a shape shows in one comparison; what depends on time shows in one of many thousands. Calls and their
comparisons run inside CUDA graphs: alone, beside another stream that keeps the GPU busy, and beside another process, with
which the GPU is shared by time slices (a kernel is stopped wherever it is, which moves its warps apart as nothing else
does). Attention of a Llama-3.1-8B (32 query and 8 K/V heads of 128), requests with and without a cached prefix; its
linear layers as cuBLAS runs them. Kernels that cannot be imported are named and left out. The last line says how many
results differed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from margingate_kernels import DecodeAttention, Fa3PrefillAttention, PrefillAttention, fa3_available, top2_margin

Q_HEADS, KV_HEADS, DIM, HIDDEN, INNER = 32, 8, 128, 4096, 14336
SLOTS = 40_000
CALLS = 25
"""Calls in one CUDA graph."""
TURN = 0.5
"""Seconds of a kernel's turn."""
PREFILLS = {  # of each request: cached tokens, new ones
    "half warm pair": ((210, 215), (64, 130)),
    "cold pair": ((0, 425), (0, 194)),
    "eight, mixed": ((0, 100), (450, 1), (300, 500), (0, 900), (96, 97), (700, 3), (128, 128), (5, 620)),
}

Call = Callable[[], torch.Tensor]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def indptr(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def prefill_kernels(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Call]]:
    """Ours, sgl_kernel's FlashAttention-3, and FlashInfer's fa3 over pages and over contiguous columns."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

    for name, requests in PREFILLS.items():
        new, all_of = [n for _, n in requests], [p + n for p, n in requests]
        q, slots = draw(sum(new), Q_HEADS, DIM), torch.randperm(SLOTS, device="cuda")[: sum(all_of)].int()
        queries, columns = indptr(new), indptr(all_of)
        attend = PrefillAttention(Q_HEADS, KV_HEADS, DIM, "cuda")
        attend.plan(queries, columns, len(slots))
        yield f"prefill ours, {name}", lambda a=attend, x=q, s=slots: a(x, k, v, s, DIM**-0.5)
        if fa3_available(Q_HEADS, KV_HEADS, DIM):
            fa3 = Fa3PrefillAttention(Q_HEADS, KV_HEADS, DIM, "cuda")
            fa3.plan(queries, columns, len(slots))
            yield f"prefill sgl fa3, {name}", lambda a=fa3, x=q, s=slots: a(x, k, v, s, DIM**-0.5)
        last = torch.ones(len(new), dtype=torch.int32, device="cuda")
        shape, dtypes = (Q_HEADS, KV_HEADS, DIM), {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        paged = BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="fa3")
        paged.plan(queries, columns, slots, last, *shape, 1, causal=True, **dtypes)
        yield f"prefill fa3 paged, {name}", lambda w=paged, x=q: w.run(x, (k, v))
        ragged = BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend="fa3")
        ragged.plan(queries, columns, *shape, causal=True, **dtypes)
        own = k[slots.long()], v[slots.long()]
        yield f"prefill fa3 ragged, {name}", lambda w=ragged, x=q, kv=own: w.run(x, *kv)


def workspace() -> torch.Tensor:
    return torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")


def decode_kernels(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Call]]:
    for rows, contexts in ((17, [431, 207] + [1] * 15), (33, list(range(60, 1050, 30))), (17, [9000] + [1] * 16)):
        attend = DecodeAttention(64, Q_HEADS, KV_HEADS, DIM, "cuda")
        attend.plan(indptr(contexts))
        q, slots = draw(rows, Q_HEADS, DIM), torch.randint(0, SLOTS, (sum(contexts),), device="cuda").int()
        yield f"decode, {rows} rows, longest {max(contexts)}", lambda a=attend, x=q, s=slots: a(x, k, v, s, DIM**-0.5)


def other_kernels() -> Iterator[tuple[str, Call]]:
    weights = {"qkv": (HIDDEN, 6144), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
    for name, (inner, outer) in weights.items():
        weight = draw(outer, inner) * 0.02
        for rows in (17, 64, 352, 648):
            x = draw(rows, inner)
            yield f"linear {name}, {rows} rows", lambda a=x, w=weight: torch.nn.functional.linear(a, w)
    logits = torch.randn(17, 128_256, device="cuda")
    zeros = torch.zeros(17, device="cuda")
    yield "top2_margin, 17 rows", lambda: torch.stack(top2_margin(logits, zeros)[:2])


def norm_kernels() -> Iterator[tuple[str, Call]]:
    from sgl_kernel import fused_add_rmsnorm, rmsnorm, silu_and_mul

    x, weight, wide = draw(352, HIDDEN), draw(HIDDEN), draw(352, 2 * INNER)
    yield "rmsnorm", lambda: rmsnorm(x, weight)
    yield "silu_and_mul", lambda: silu_and_mul(wide)

    def fused() -> torch.Tensor:
        out, residual = x.clone(), x.clone()
        fused_add_rmsnorm(out, residual, weight)
        return out

    yield "fused_add_rmsnorm", fused


class Repeated:
    """A kernel, its first result, and a CUDA graph of many calls that counts those with other bits.

    The graph reads what the call and the first result hold, so both are kept.
    """

    def __init__(self, name: str, call: Call) -> None:
        self.name, self._call, first = name, call, call().clone()
        self._bits = bits = first.view(torch.int16) if first.dtype == torch.bfloat16 else first
        self._differed, self._elements = torch.zeros(2, dtype=torch.int64, device="cuda").unbind()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(CALLS):
                wrong = (call().view(bits.dtype) != bits).sum()
                self._differed += wrong > 0
                self._elements += wrong

    def run(self, seconds: float, load: torch.cuda.CUDAGraph | None, side: torch.cuda.Stream) -> list[int]:
        """Return how often the kernel ran, how many of its results differed, and in how many elements."""
        before, calls, end = self._counts(), 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                if load is not None:
                    with torch.cuda.stream(side):
                        load.replay()
                self._graph.replay()
                calls += CALLS
            torch.cuda.synchronize()
        return [calls, *(now - then for now, then in zip(self._counts(), before))]

    def _counts(self) -> list[int]:
        return [int(self._differed), int(self._elements)]


def busy() -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """Return a graph of other work, products and copies, and the tensors that it uses."""
    a, b = draw(640, 4096), draw(4096, 4096)
    source = torch.empty(2**24, dtype=torch.int32, device="cuda")
    target, out = torch.empty_like(source), torch.empty(640, 4096, dtype=torch.bfloat16, device="cuda")
    torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(6):
            torch.mm(a, b, out=out)
            target.copy_(source)
    return graph, [a, b, source, target, out]


@contextmanager
def other_process(wanted: bool) -> Iterator[None]:
    """Keep the GPU busy from another process meanwhile."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, __file__, "--busy"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "busy\n":
            raise RuntimeError("the other process did not start")
        yield
    finally:
        process.kill()
        process.wait()


def keep_busy() -> None:
    """Be that process."""
    load, _kept = busy()
    print("busy", flush=True)
    while True:
        for _ in range(20):
            load.replay()
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kernel in each way")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--busy", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.busy:
        keep_busy()
    torch.manual_seed(0)
    k, v = draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM)
    side, (load, _kept) = torch.cuda.Stream(), busy()
    repeated = []
    for kernels in (prefill_kernels(k, v), decode_kernels(k, v), other_kernels(), norm_kernels()):
        try:
            repeated += [Repeated(name, call) for name, call in kernels if args.only in name]
        except ImportError as error:
            print(f"left out: {error}", flush=True)
    rows, total = [], 0
    for how in ("alone", "beside a stream", "beside a process"):
        counts = {kernel.name: [0, 0, 0] for kernel in repeated}
        with other_process(how == "beside a process"):
            for _ in range(max(1, round(args.seconds / TURN))):  # in turns: what else runs meanwhile meets all alike
                for kernel in repeated:
                    found = kernel.run(TURN, load if how == "beside a stream" else None, side)
                    counts[kernel.name] = [a + b for a, b in zip(counts[kernel.name], found)]
        for name, (calls, differed, elements) in counts.items():
            total += differed
            rows.append({"kernel": name, "how": how, "calls": calls, "differed": differed, "elements": elements})
            where = f", in {elements / differed:.0f} elements each" if differed else ""
            print(f"{name:36} {how:16} {calls:9,} calls, {differed} differed{where}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1))
    print(f"{total} results differed, of {sum(int(row['calls']) for row in rows):,}")


if __name__ == "__main__":
    main()
