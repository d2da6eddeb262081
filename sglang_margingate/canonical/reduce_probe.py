"""Probes the sum over ranks (all-reduce): at which numbers of rows it adds up a row in the same order, in graphs and outside.

What adds up is chosen by bytes, so by rows: one kernel below some size, another above, NCCL's rings and trees beyond, and other
ones in CUDA graphs. Two numbers have one sum; from three ranks on the order shows. All ranks run the probe together, at every
start: it takes under a second, and a library that chooses by size may choose otherwise tomorrow.

Each rank's part of the probed row is drawn from its number, so every rank knows all parts and the sum in the order of ranks,
accumulated in fp32 and rounded once: class 0 of the map. In each column two ranks hold one large number with either sign and
the others small ones: an addend is rounded away or not, by who comes first, so that a changed order shows. A sum of zeros may
have either sign (a kernel may keep +0 as "nothing yet"), which no later result depends on: digests do not see it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from margingate_kernels import row_digest

from sglang_margingate.canonical.invariance import LayerClasses, RowSizes
from sglang_margingate.canonical.ranks import Ranks

log = logging.getLogger(__name__)

NAME = "all-reduce"
LARGE = 2.0**24
"""fp32 keeps 24 bits: beside such a number a small one is rounded away."""

Run = Callable[[], None]


class Reduce(Protocol):
    """How the server adds up over its ranks."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over ranks of [rows, hidden]; ``x`` may be overwritten."""

    def record(self, run: Run) -> Run | None:
        """Capture what ``run`` launches in a CUDA graph, as decode graphs are; return what replays it. None: no graphs."""


@dataclass(frozen=True)
class ReduceProbe:
    """What was found.

    Parameters
    ----------
    ranks
        How many add up.
    hidden
        Features of a row.
    labels
        Order of summation at each number of rows: 0 is the order of ranks in fp32; equal numbers are equal bits. None: it
        depends on the row's place, or a graph adds up otherwise than an eager forward.
    graphs
        Numbers of rows that were tried in a CUDA graph, too.
    count
        Sums of one forward.
    """

    ranks: int
    hidden: int
    labels: dict[int, int | None]
    graphs: tuple[int, ...] = ()
    count: int = 1
    odd: dict[int, str] = field(default_factory=dict)
    """Why a number of rows has no class."""

    def layer(self, dtype: torch.dtype) -> LayerClasses:
        """Return it as a layer of the map, so that classes are chosen among sizes with one order of summation."""
        kind = f"{str(dtype).removeprefix('torch.')}, sum over {self.ranks} ranks"
        return LayerClasses(NAME, (self.hidden, self.ranks), self.count, dict(self.labels), False, kind, whole=True)

    def describe(self) -> str:
        """Return in a line at which rows which order was seen."""
        parts = []
        for label in sorted({x for x in self.labels.values() if x is not None}):
            rows = RowSizes(tuple(m for m, found in sorted(self.labels.items()) if found == label))
            parts.append(
                f"{'in the order of ranks' if label == 0 else f'in another order ({label})'} at {rows.describe()} rows"
            )
        if self.odd:
            first = min(self.odd)
            parts.append(f"not used at {RowSizes(tuple(sorted(self.odd))).describe()} rows ({self.odd[first]})")
        return f"{NAME} over {self.ranks} ranks: " + "; ".join(parts)

    def holds_to(self, most: int) -> bool:
        """Return whether every number of rows up to ``most`` gives the same bits."""
        found = {label for m, label in self.labels.items() if m <= most}
        return len(found) == 1 and None not in found

    @property
    def holds(self) -> bool:
        """Whether every number of rows gives the same bits."""
        return len(set(self.labels.values())) == 1 and not self.odd


def probe_reduce(
    reduce: Reduce, ranks: Ranks, hidden: int, dtype: torch.dtype, device: torch.device | str, rows: Sequence[int],
    graphs: Sequence[int] = (), count: int = 1,
) -> ReduceProbe:  # fmt: skip
    """Probe the sum over ranks; every rank must call this with the same arguments.

    Parameters
    ----------
    reduce
        The server's.
    ranks
        All of them.
    hidden, dtype, device
        Of the rows that a layer adds up.
    rows
        Numbers of rows to probe, ascending.
    graphs
        Those to probe in a CUDA graph, too.
    count
        Sums of one forward.

    Raises
    ------
    RankError
        Ranks hold other sums than rank 0: a row's bits would depend on who computes it.
    """
    parts = [_part(rank, ranks.size, hidden) for rank in range(ranks.size)]
    wanted = _digests(in_rank_order([part.to(dtype) for part in parts])[None].to(device)).tolist()[0]
    mine = parts[ranks.rank].to(device, dtype).expand(max(rows), -1).contiguous()
    with torch.no_grad():
        eager = _tried(reduce, mine, rows)
        captured: torch.Tensor | None = None
        if graphs:
            into = torch.zeros(len(graphs), 2, dtype=torch.int64, device=device)

            def run() -> None:
                into.copy_(_tried(reduce, mine, graphs))

            replay = reduce.record(run)
            if replay is not None:
                into.zero_()
                replay()
                captured = into
    in_graph = {} if captured is None else dict(zip(graphs, captured.tolist()))
    labels: dict[int, int | None] = {}
    seen, odd = {wanted: 0}, {}
    for m, ends in zip(rows, eager.tolist()):
        if ends[0] != ends[1]:
            labels[m], odd[m] = None, "a row's place changes its sum"
        elif m in in_graph and in_graph[m] != ends:
            labels[m], odd[m] = None, "a CUDA graph adds up otherwise than an eager forward"
        else:
            labels[m] = seen.setdefault(ends[0], len(seen))
    found = ReduceProbe(ranks.size, hidden, labels, tuple(in_graph), count, odd)
    # Digests, not labels: two ranks may each be consistent and hold other sums.
    bits = {f"the sum of {m} rows": ends for m, ends in zip(rows, eager.tolist())}
    bits |= {f"the sum of {m} rows in a CUDA graph": ends for m, ends in in_graph.items()}
    ranks.same(NAME, bits, "The sum over ranks must be one number: see the log of SGLang's all-reduce")
    return found


def in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of rows in the order given, accumulated in fp32 and rounded once to their dtype."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def _part(rank: int, size: int, hidden: int) -> torch.Tensor:
    """Return one rank's part of the probed row: see the module."""
    generator = torch.Generator().manual_seed(9)
    small = torch.randn(size, hidden, generator=generator)
    if size > 2:
        large = LARGE * (1 + torch.rand(hidden, generator=generator))
        order = torch.rand(size, hidden, generator=generator).argsort(0)
        columns = torch.arange(hidden)
        small[order[0], columns], small[order[1], columns] = large, -large
    return small[rank]


def _tried(reduce: Reduce, mine: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return the smallest and the largest digest of the rows of each sum, int64 [len(rows), 2]."""
    ends = []
    for m in rows:
        found = _digests(reduce(mine[:m].clone()))
        ends.append(torch.stack([found.min(), found.max()]))
    return torch.stack(ends)


def _digests(rows: torch.Tensor) -> torch.Tensor:
    return row_digest(rows + 0.0)  # -0 becomes +0
