"""Does a token's attention depend on its own context alone? Ask each prefill that could serve the canonical path.

    PYTHONPATH=.:kernels:SITE python3 tests/gpu/attention_bits.py [--json FILE] [--seconds 60] [--only fa3]

A prompt alone and whole, against the same prompt cut in many ways, behind prefixes of every kind, among companions, in
other slots of the pool, read through a table of slots as CUDA graphs do, and replayed from one among padding. Heads of 64 and 128, 4, 5, 7
and 8 query heads a K/V head, contexts of 17 to 32,000 columns. Then the same calls again and again beside a stream of other
work, counting results with other bits (a race shows only there). Exit status 1 where a candidate is wrong (against a plain
reference); whether its bits hold is what the table says. Cuts and companions are drawn anew until the time is over.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

from margingate_kernels import (  # noqa: E402
    Fa3PrefillAttention,
    PrefillAttention,
    fa3_available,
    prefill_attention_reference,
)

from sglang_margingate.bench.kernels.repeat import busy  # noqa: E402

SHAPES = {"32/8 of 128": (32, 8, 128), "28/4 of 128": (28, 4, 128), "32/4 of 128": (32, 4, 128),
          "40/8 of 128": (40, 8, 128), "32/8 of 64": (32, 8, 64)}  # fmt: skip
LENGTHS = (17, 64, 100, 127, 128, 129, 255, 513, 900, 1333, 2049, 4097, 8192, 32_000)
SLOTS = 80_000
WIDE = 40_000
"""Columns of a row of the table of slots."""

Part = tuple[int, int]
"""Of a request in a forward: cached columns, new tokens."""


@dataclass
class Pool:
    """K and V of all slots, and a table of slots."""

    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def of(cls, kv_heads: int, dim: int) -> Pool:
        """Draw one."""
        return cls(*(torch.randn(SLOTS, kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv"))


def indptr(lengths: Sequence[int]) -> torch.Tensor:
    """Return where each of these lengths begins and the last one ends."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


class Candidate:
    """One kind of attention, asked for one prompt's rows among others."""

    def __init__(self, make: Callable[..., Any], shape: tuple[int, int, int], graph_rows: dict[str, int]) -> None:
        self.make, self.shape, self.graph_rows = make, shape, graph_rows
        self.scale = shape[2] ** -0.5

    def ask(self, pool: Pool, q: torch.Tensor, slots: torch.Tensor, part: Part, others: Sequence[Part], at: int) -> Any:
        """Return the rows of ``part`` of a prompt whose columns lie in ``slots``, as request ``at`` among ``others``."""
        parts = [*others[:at], part, *others[at:]]
        rows = sum(new for _, new in parts)
        x = torch.randn(rows, *q.shape[1:], device="cuda", dtype=q.dtype)
        first = sum(new for _, new in parts[:at])
        x[first : first + part[1]] = q[part[0] : sum(part)]
        lists = [torch.randint(1, SLOTS, (sum(p),), device="cuda").int() for p in parts]
        lists[at] = slots[: sum(part)]
        attend = self.make(*self.shape, "cuda")
        indices = torch.cat(lists)
        attend.plan(indptr([new for _, new in parts]), indptr([sum(p) for p in parts]), len(indices))
        return attend(x, pool.k, pool.v, indices, self.scale)[first : first + part[1]]

    def replay(self, pool: Pool, q: torch.Tensor, slots: torch.Tensor, part: Part, padded: int) -> torch.Tensor:
        """Return the same from a CUDA graph of ``padded`` rows and 128 requests, read through a table."""
        size = max(padded, part[1])
        x = torch.zeros(size, *q.shape[1:], device="cuda", dtype=q.dtype)
        table = torch.zeros(3, WIDE, dtype=torch.int32, device="cuda")
        begins, ends = torch.zeros(2, 128, dtype=torch.int32, device="cuda").unbind()
        queries = torch.zeros(129, dtype=torch.int32, device="cuda")
        attend = self.make(*self.shape, "cuda", **{name: size for name in self.graph_rows})

        def run() -> torch.Tensor:
            attend.plan(queries, begins, size, ends)
            found: torch.Tensor = attend(x, pool.k, pool.v, table.view(-1), self.scale)
            return found

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        x[: part[1]] = q[part[0] : sum(part)]
        table[2, : sum(part)] = slots[: sum(part)]
        begins[0], ends[0], queries[1:] = 2 * WIDE, 2 * WIDE + sum(part), part[1]
        graph.replay()
        return out[: part[1]].clone()


def cuts(n: int, draw: random.Random) -> list[int]:
    """Return where chunks of a prompt end."""
    kind = draw.randrange(4)
    if kind == 0:
        return [n - 1, n]
    step = (draw.choice((64, 100, 128, 256, 512)), draw.randrange(1, n), max(1, n // 3))[kind - 1]
    step = max(step, n // 12)  # no more than a dozen forwards
    return [*range(step, n, step), n]


def companions(draw: random.Random) -> list[Part]:
    """Return requests that share a forward."""
    kind = draw.randrange(3)
    if kind == 0:
        return [(draw.randrange(2000), 1) for _ in range(draw.randrange(1, 64))]
    if kind == 1:
        return [(draw.randrange(700), draw.randrange(1, 900)) for _ in range(draw.randrange(1, 9))]
    return [(0, draw.randrange(1, 3000)), (draw.randrange(5000), draw.randrange(1, 40)), (0, 0)]


def trials(c: Candidate, pool: Pool, q: torch.Tensor, slots: torch.Tensor, draw: random.Random) -> Iterator[Any]:
    """Yield (name, first row, rows) of the same prompt computed otherwise."""
    n = len(slots)
    begin = 0
    pieces = []
    for end in cuts(n, draw):
        pieces.append(c.ask(pool, q, slots, (begin, end - begin), [], 0))
        begin = end
    yield "chunks", 0, torch.cat(pieces)
    others = companions(draw)
    yield "companions", 0, c.ask(pool, q, slots, (0, n), others, draw.randrange(len(others) + 1))
    prefix = draw.choice([p for p in (1, 64, 127, 128, 129, n // 3, n - 1, draw.randrange(n)) if 0 < p < n])
    others = companions(draw)
    yield "prefix, companions", prefix, c.ask(pool, q, slots, (prefix, n - prefix), others, len(others) // 2)
    moved = torch.randperm(SLOTS - 1, device="cuda")[:n].int() + 1
    other = Pool(pool.k.clone(), pool.v.clone())
    other.k[moved.long()], other.v[moved.long()] = pool.k[slots.long()], pool.v[slots.long()]
    yield "other slots", 0, c.ask(other, q, moved, (0, n), [], 0)
    yield "graph, table", prefix, c.replay(pool, q, slots, (prefix, n - prefix), n - prefix + draw.randrange(300))


def correct(c: Candidate, pool: Pool) -> str | None:
    """Return how the candidate is wrong against the reference, or None."""
    parts: list[Part] = [(0, 300), (130, 1), (77, 200), (0, 1), (1000, 129)]
    rows, columns = [new for _, new in parts], [sum(p) for p in parts]
    q = torch.randn(sum(rows), *(c.shape[0], c.shape[2]), device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(SLOTS, device="cuda")[: sum(columns)].int()
    attend = c.make(*c.shape, "cuda")
    attend.plan(indptr(rows), indptr(columns), len(slots))
    got = attend(q, pool.k, pool.v, slots, c.scale)
    want = prefill_attention_reference(q, pool.k, pool.v, indptr(rows), indptr(columns), slots, c.scale)
    try:
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
    except AssertionError as error:
        return " ".join(str(error).split())[:200]
    return None


def races(c: Candidate, pool: Pool, seconds: float) -> tuple[int, int]:
    """Return how often one batch was attended to beside other work, and how many results had other bits."""
    parts: list[Part] = [(0, 100), (450, 1), (300, 500), (0, 900), (96, 97), (700, 3), (128, 128), (5, 620), (9000, 64)]
    rows, columns = [new for _, new in parts], [sum(p) for p in parts]
    q = torch.randn(sum(rows), *(c.shape[0], c.shape[2]), device="cuda", dtype=torch.bfloat16)
    slots = torch.randint(0, SLOTS, (sum(columns),), device="cuda").int()
    attend = c.make(*c.shape, "cuda")
    attend.plan(indptr(rows), indptr(columns), len(slots))
    first = attend(q, pool.k, pool.v, slots, c.scale).clone().view(torch.int16)
    differed = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(25):
            differed += (attend(q, pool.k, pool.v, slots, c.scale).view(torch.int16) != first).any()
    side, (load, _kept) = torch.cuda.Stream(), busy()
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(8):
            with torch.cuda.stream(side):
                load.replay()
            graph.replay()
            calls += 25
        torch.cuda.synchronize()
    return calls, int(differed)


def main() -> int:
    """Ask every candidate; print one row for each of its shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it; each length is tried at least once")
    parser.add_argument("--only", default="", help="candidates whose name holds this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    made = {"ours": (PrefillAttention, {}), "fa3": (Fa3PrefillAttention, {"rows": 0})}
    made = {name: value for name, value in made.items() if args.only in name}
    if "fa3" in made and not fa3_available(32, 8, 128):
        print("fa3 is not available here")
        del made["fa3"]
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    share = args.seconds / max(1, len(made) * len(SHAPES))
    for name, (make, graph_rows) in made.items():
        for shape_name, shape in SHAPES.items():
            pool, draw, began = Pool.of(*shape[1:]), random.Random(3), time.monotonic()
            c = Candidate(make, shape, graph_rows)
            tried: dict[str, int] = defaultdict(int)
            changed: dict[str, list[Any]] = defaultdict(list)
            wrong, turn = correct(c, pool), 0
            while wrong is None and (turn < len(LENGTHS) or time.monotonic() - began < share * 0.7):
                n = LENGTHS[turn % len(LENGTHS)]
                turn += 1
                q = torch.randn(n, shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
                slots = torch.randperm(SLOTS - 1, device="cuda")[:n].int() + 1
                whole = c.ask(pool, q, slots, (0, n), [], 0)
                for trial, first, rows in trials(c, pool, q, slots, draw):
                    tried[trial] += 1
                    unequal = int((rows.view(torch.int16) != whole[first:].view(torch.int16)).flatten(1).any(1).sum())
                    if unequal:
                        changed[trial].append({"length": n, "first": first, "rows": len(rows), "unequal": unequal})
            repeats = races(c, pool, share * 0.3) if wrong is None else (0, 0)
            found.append({"candidate": name, "shape": shape_name, "wrong": wrong, "trials": dict(tried),
                          "changed": dict(changed), "calls": repeats[0], "other_bits": repeats[1]})  # fmt: skip
            said = wrong or ", ".join(f"{t} {tried[t] - len(changed[t])}/{tried[t]}" for t in tried)
            print(f"{name:5} {shape_name:12} {said}; repeated {repeats[0]:,}, other bits {repeats[1]}", flush=True)
            del pool
    if args.json:
        args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "found": found}, indent=1) + "\n")
    return int(any(row["wrong"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
