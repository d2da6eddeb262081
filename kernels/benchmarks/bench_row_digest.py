"""Time row_digest on the tensors of an invariance test. GB/s counts the bytes read.

python kernels/benchmarks/bench_row_digest.py [--json FILE]
"""

from __future__ import annotations

import functools

import common
import torch
from margingate_kernels import row_digest, row_digest_reference

SHAPES = [
    (64, 4096, torch.bfloat16, 0),
    (64, 14336, torch.bfloat16, 0),
    (64, 128256, torch.bfloat16, 0),
    (64, 128256, torch.float32, 0),
    (1024, 28672, torch.bfloat16, 0),
    (64, 128256, torch.bfloat16, 1),  # rows that start at odd addresses: loads of one element
]


def main() -> None:
    """Run the benchmark."""
    args = common.parser(__doc__).parse_args()
    env, copy = common.start()
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for count, width, dtype, offset in SHAPES:
        size = count * width * dtype.itemsize
        sets = [
            torch.randn(count, width + offset, device="cuda").to(dtype)[:, offset:]
            for _ in range(common.input_sets(size))
        ]
        assert torch.equal(row_digest(sets[0]), row_digest_reference(sets[0])), "wrong digest"
        time = common.time_calls([functools.partial(row_digest, x) for x in sets])
        rate = size / time.median / 1e3
        rows.append(
            {
                "rows": count,
                "elements": width,
                "dtype": str(dtype).removeprefix("torch."),
                "aligned": "yes" if not offset else "no",
                "us": time.median,
                "p10-p90": f"{time.low:.2f}-{time.high:.2f}",
                "GB/s": round(rate),
                "% of copy": round(100 * rate / copy, 1),
            }
        )
    common.finish(args.json, env, copy, rows)


if __name__ == "__main__":
    main()
