"""Look for races: run each kind of kernel of a forward on the same input very often, and count results with other bits.

    PYTHONPATH=.:kernels:SITE python3 tests/gpu/repeat_kernels.py [--seconds 5] [--only NAME] [--json FILE]

How that is done says ``sglang_margingate/bench/kernels/repeat.py``, which ``margingate doctor`` uses too; here it is for a
Llama-3.1-8B, longer, and beside FlashInfer's Hopper prefill. Kernels that cannot be imported are named and left out. The last
line says how many results differed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from sglang_margingate.bench.kernels.cases import (
    PREFILLS,
    Call,
    Case,
    Prefill,
    Shape,
    normal,
    of_a_gpu,
    prefill_inputs,
    prefills,
)
from sglang_margingate.bench.kernels.repeat import PROCESS, STREAM, WAYS, Repeated, other_process, stream_load

SHAPE = Shape()
_, KV_HEADS, DIM = SHAPE.heads
SLOTS = 40_000
TURN = 0.5
"""Seconds of a kernel's turn."""


def draw(*shape: int) -> torch.Tensor:
    return normal("cuda", *shape)


def prefill_kernels(k: torch.Tensor, v: torch.Tensor) -> Iterator[tuple[str, Call]]:
    """Ours, sgl_kernel's FlashAttention-3, and FlashInfer's fa3 over pages and over contiguous columns, on the same inputs."""
    for name, requests in PREFILLS.items():
        to = prefill_inputs(SHAPE, requests, k, v)
        yield from ((case.name, case.call) for case in prefills(SHAPE, name, to))
        yield from flashinfer_prefills(name, to)


def flashinfer_prefills(name: str, to: Prefill) -> Iterator[tuple[str, Call]]:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper

    last = torch.ones(len(to.queries) - 1, dtype=torch.int32, device="cuda")
    dtypes = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    paged = BatchPrefillWithPagedKVCacheWrapper(workspace(), "NHD", backend="fa3")
    paged.plan(to.queries, to.columns, to.slots, last, *SHAPE.heads, 1, causal=True, **dtypes)
    yield f"prefill fa3 paged, {name}", partial(paged.run, to.q, (to.k, to.v))
    ragged = BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend="fa3")
    ragged.plan(to.queries, to.columns, *SHAPE.heads, causal=True, **dtypes)
    yield f"prefill fa3 ragged, {name}", partial(ragged.run, to.q, to.k[to.slots.long()], to.v[to.slots.long()])


def workspace() -> torch.Tensor:
    return torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")


def all_kernels() -> Iterator[tuple[str, Call]]:
    for case in of_a_gpu(SHAPE):
        if isinstance(case, Case):
            yield case.name, case.call
        else:
            print(f"left out: {case.name}: {case.why}", flush=True)
    k, v = draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM)
    try:
        for name, requests in PREFILLS.items():
            yield from flashinfer_prefills(name, prefill_inputs(SHAPE, requests, k, v))
    except ImportError as error:
        print(f"left out: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kernel in each way")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    repeated = [Repeated(name, call) for name, call in all_kernels() if args.only in name]
    rows, total = [], 0
    with stream_load("cuda") as load:
        for how in WAYS["cuda"]:
            counts = {kernel.name: [0, 0, 0] for kernel in repeated}
            with other_process(how == PROCESS):
                for _ in range(
                    max(1, round(args.seconds / TURN))
                ):  # in turns: what else runs meanwhile meets all alike
                    for kernel in repeated:
                        found = kernel.run(TURN, load if how == STREAM else None)
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
