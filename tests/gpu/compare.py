"""Compare sequences alone and at several batch sizes on a running server; print one line per batch size.

``python3 tests/gpu/compare.py URL TAG PROMPTS [SIZES [ARM]]``; an arm is what the requests ask for: log, always, gate@X.
"""

from __future__ import annotations

import sys
import time

from sglang_margingate.bench.evidence.decode_cost import arm_params
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Client, run_alone, run_together


def main(url: str, tag: str, count: int, sizes: str = "2,8,20,33", arm: str = "stock") -> None:
    client = Client(url)
    prompts = demo_prompts(count)
    start = time.perf_counter()
    custom = arm_params(arm)
    alone = run_alone(client, prompts, custom=custom)
    print(f"{tag}: alone {time.perf_counter() - start:.1f} s, {sum(len(c.tokens) for c in alone)} tokens")
    for rows in map(int, sizes.split(",")):
        start = time.perf_counter()
        together = run_together(client, prompts, rows, custom=custom)
        same = sum(a.same_as(b) for a, b in zip(alone, together))
        seconds = time.perf_counter() - start
        total = {k: sum(c.margingate.get(k, 0) for c in together) for k in ("steps", "triggers", "flips", "missed")}
        largest = max(c.margingate.get("max_batch_rows", 0) for c in together)
        guarantees = sorted({c.margingate.get("guarantee", "none") for c in together})
        print(
            f"{tag}: {rows} in flight: {same}/{count} identical, largest batch {largest}, {total}, {guarantees}, {seconds:.1f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
