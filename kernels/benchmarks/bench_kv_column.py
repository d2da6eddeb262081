"""Time saving, restoring and comparing K/V columns of an 8B Llama's pool (32 layers, 8 heads of 128, bfloat16).

    python kernels/benchmarks/bench_kv_column.py [--json FILE]

Bytes: save and restore read and write each element, the comparison reads it twice. "torch us" is one indexed copy a
plane, as the pool's own layout allows it, in a CUDA graph as well.
"""

from __future__ import annotations

import functools

import common
import torch
from margingate_kernels import KVColumns, max_abs_change_reference, save_reference

LAYERS, HEADS, DIM, SLOTS = 32, 8, 128, 65536


def torch_save(pool: KVColumns, slots: torch.Tensor, staging: torch.Tensor) -> None:
    """Save with one index_select a plane."""
    for half, buffers in enumerate((pool.k_buffers, pool.v_buffers)):
        for layer, buffer in enumerate(buffers):
            torch.index_select(buffer.view(SLOTS, -1), 0, slots, out=staging[layer, half])


def main() -> None:
    """Run the benchmark."""
    args = common.parser(__doc__).parse_args()
    env, copy = common.start()
    torch.manual_seed(0)
    planes = [torch.randn(SLOTS, HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2 * LAYERS)]
    pool = KVColumns(planes[:LAYERS], planes[LAYERS:])
    rows: list[dict[str, object]] = []
    for n in (1, 8, 64, 256, 1024):
        size = 2 * LAYERS * n * HEADS * DIM * 2
        sets = common.input_sets(2 * size)
        slots = list(torch.randperm(SLOTS, device="cuda")[: n * sets].split(n))
        stages = [pool.staging(n) for _ in slots]
        out = torch.empty(LAYERS, n, device="cuda")
        pool.save(slots[0], stages[0])
        want = torch.empty_like(stages[0])
        save_reference(pool, slots[0], want)
        assert torch.equal(stages[0], want), "wrong save"
        stages[0] += torch.randn_like(stages[0])
        got = pool.max_abs_change(slots[0], stages[0])
        assert torch.equal(got, max_abs_change_reference(pool, slots[0], stages[0])), "wrong change"
        pairs = list(zip(slots, stages))
        stock = common.time_calls([functools.partial(torch_save, pool, s, t) for s, t in pairs[:4]], rounds=1)
        for name, calls in (
            ("save", [functools.partial(pool.save, s, t) for s, t in pairs]),
            ("restore", [functools.partial(pool.restore, s, t) for s, t in pairs]),
            ("max_abs_change", [functools.partial(pool.max_abs_change, s, t, out=out) for s, t in pairs]),
        ):
            time = common.time_calls(calls)
            rate = 2 * size / time.median / 1e3
            rows.append(
                {
                    "operation": name,
                    "columns": n,
                    "MB moved": 2 * size / 1e6,
                    "us": time.median,
                    "p10-p90": f"{time.low:.2f}-{time.high:.2f}",
                    "GB/s": round(rate),
                    "% of copy": round(100 * rate / copy, 1),
                    "torch us": stock.median if name == "save" else "",
                }
            )
    common.finish(args.json, env, copy, rows)


if __name__ == "__main__":
    main()
