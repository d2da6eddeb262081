"""Time top2_margin against torch.argmax and the measured copy bandwidth.

    python kernels/benchmarks/bench_top2_margin.py [--json FILE] [--tune]

GB/s counts the bytes of logits read. "% of copy" divides by the copy bandwidth of the same run (bytes read plus bytes
written). "eager us" is one call from Python with a workspace, launch included.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import common
import torch
from margingate_kernels import Workspace, top2_margin, top2_margin_reference

VOCAB = 128256
# (block, unroll, warps) tried by --tune
CANDIDATES = [
    (128, 8, 1),
    (128, 16, 1),
    (128, 32, 1),
    (256, 8, 2),
    (256, 16, 2),
    (256, 32, 2),
    (512, 8, 4),
    (512, 16, 4),
    (512, 32, 4),
    (1024, 16, 8),
    (1024, 32, 8),
    (2048, 16, 8),
]


def measure(rows: int, vocab: int, dtype: torch.dtype, copy: float, *, argmax: bool = True) -> dict[str, object]:
    """Time one shape and check its result."""
    size = rows * vocab * dtype.itemsize
    inputs = [torch.randn(rows, vocab, device="cuda").to(dtype) for _ in range(common.input_sets(size))]
    thresholds = torch.full((rows,), 0.05, device="cuda")
    workspace = Workspace(rows, vocab, "cuda")
    got, want = top2_margin(inputs[0], thresholds, workspace=workspace), top2_margin_reference(inputs[0], thresholds)
    assert all(torch.equal(a, b) for a, b in zip(got, want)), "wrong result"
    ours = common.time_calls([functools.partial(top2_margin, x, thresholds, workspace=workspace) for x in inputs])
    result: dict[str, object] = {
        "B": rows,
        "V": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "us": ours.median,
        "p10-p90": f"{ours.low:.2f}-{ours.high:.2f}",
        "GB/s": round(size / ours.median / 1e3),
        "% of copy": round(100 * size / ours.median / 1e3 / copy, 1),
    }
    if argmax:
        out = torch.empty(rows, dtype=torch.int64, device="cuda")
        stock = common.time_calls([functools.partial(torch.argmax, x, dim=-1, out=out) for x in inputs])
        result["argmax us"] = stock.median
        result["ours / argmax"] = ours.median / stock.median
        result["eager us"] = common.eager_time(lambda: top2_margin(inputs[0], thresholds, workspace=workspace))
        result["argmax eager us"] = common.eager_time(lambda: torch.argmax(inputs[0], dim=-1, out=out))
    return result


def tune(copy: float) -> Iterable[dict[str, object]]:
    """Time every candidate split at the sizes that matter."""
    module: Any = importlib.import_module("margingate_kernels.choice.top2_margin")
    chosen = module._split
    for block, unroll, warps in CANDIDATES:
        module._split = lambda vocab, _rows, b=block, u=unroll, w=warps: module._Split(b, u, w, -(-vocab // (b * u)))
        row: dict[str, object] = {"block": block, "unroll": unroll, "warps": warps}
        for rows, dtype in ((64, torch.float32), (64, torch.bfloat16), (1, torch.float32)):
            name = f"B={rows} {str(dtype).removeprefix('torch.')} us"
            row[name] = measure(rows, VOCAB, dtype, copy, argmax=False)["us"]
        yield row
    module._split = chosen


def in_place(rows: int, vocab: int) -> dict[str, object]:
    """Time what the kernel adds where a server calls it: right after the logits are written in fp32."""
    narrow = [torch.randn(rows, vocab, device="cuda").bfloat16() for _ in range(common.input_sets(2 * rows * vocab))]
    logits, thresholds = torch.empty(rows, vocab, device="cuda"), torch.full((rows,), 0.05, device="cuda")
    workspace = Workspace(rows, vocab, "cuda")
    token = torch.empty(rows, dtype=torch.int64, device="cuda")

    def top2() -> object:
        return top2_margin(logits, thresholds, workspace=workspace)

    def argmax() -> object:
        return torch.argmax(logits, dim=-1, out=token)

    def after(*work: common.Call) -> float:
        def call(source: torch.Tensor) -> None:
            logits.copy_(source)
            for f in work:
                f()

        return common.time_calls([functools.partial(call, x) for x in narrow]).median

    cast = after()
    return {
        "B": rows,
        "V": vocab,
        "cast us": cast,
        "ours adds us": after(top2) - cast,
        "argmax adds us": after(argmax) - cast,
    }


def main() -> None:
    """Run the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="time other splits of a row instead")
    args = parser.parse_args()
    env, copy = common.start()
    torch.manual_seed(0)
    if args.tune:
        rows = list(tune(copy))
    else:
        shapes = [(b, VOCAB, d) for d in (torch.float32, torch.bfloat16) for b in (1, 8, 32, 64, 128)]
        rows = [measure(*shape, copy) for shape in [*shapes, (64, 151936, torch.float32), (64, 32000, torch.float32)]]
    common.finish(args.json, env, copy, rows)
    if not args.tune:
        print("\nRight after a cast to fp32 that writes the logits:")
        print(common.table([in_place(b, VOCAB) for b in (1, 8, 32, 64)]))


if __name__ == "__main__":
    main()
