"""Chooses the sizes of prefill graphs, and tries each against eager forwards: a row must have the same bits in both.

That companions, chunks and cached prefixes change nothing is tried by path_probe.py, with whatever serves each forward: its
prompts are replayed where they fit a graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from sglang_margingate.canonical.engine import Engine, Extend, lent_table, slots
from sglang_margingate.canonical.invariance import RowSizes
from sglang_margingate.canonical.ranks import Ranks

REQUESTS = 4
LEAST_TOKENS = 16
PREFIX = 130
"""Most cached columns of a prompt."""


ROUNDS, SLOWER = 3, 1.05
"""How often each captured size is timed, and how much longer than a larger one it must take not to be used."""

FINE, COARSE, COARSE_FROM = 64, 128, 512
"""Sizes are multiples of the first up to the last, of the second above it, and an eighth apart: padding costs GPU time."""


def graph_sizes(prefill: RowSizes, largest: int) -> list[int]:
    """Return the padded sizes to capture, all of the class: few enough to capture, near enough to pad little.

    Parameters
    ----------
    prefill
        The prefill class.
    largest
        Tokens of the largest prefill that a graph may hold.
    """
    inside = [size for size in prefill.sizes if size <= largest]
    if not inside:
        return []
    found: list[int] = []
    wanted = _multiple(inside[0], FINE)
    while (size := prefill.target(wanted)) is not None and size <= largest:
        found.append(size)
        wanted = _multiple(max(size + FINE, size * 9 // 8), FINE if size < COARSE_FROM else COARSE)
    if not found or found[-1] < inside[-1]:
        found.append(inside[-1])  # whole chunks of a long prompt have just this size
    return found


def _multiple(n: int, step: int) -> int:
    return -(-n // step) * step


class Sizes(Protocol):
    """Captured prefills by their size."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Padded sizes in use, rising."""

    def drop(self, size: int) -> None:
        """Use this size no more."""


class Graphs(Sizes, Protocol):
    """Captured prefills that can be tried."""

    @property
    def replays(self) -> int:
        """Forwards that were replayed so far."""

    def off(self) -> AbstractContextManager[None]:
        """Run prefills eagerly meanwhile."""


class Timed(Sizes, Protocol):
    """Captured prefills that can be timed."""

    def milliseconds(self, size: int) -> float:
        """Return the least time of a few replays."""


def drop_slow(graphs: Timed, ranks: Ranks) -> dict[int, float]:
    """Drop every size that takes longer than a larger one; return what each dropped one took, in ms.

    A matrix product chooses its kernel by its rows, and at some sizes badly: 448 rows took a third longer than 512 on one
    GPU. Sizes of the class give a row the same bits, so time may choose among them. All ranks drop the same: the slowest
    rank's times count.
    """
    # In rounds: somebody else's work on the GPU passes.
    rounds = [[graphs.milliseconds(size) for size in graphs.sizes] for _ in range(ROUNDS)]
    took = {size: max(ranks.exchange(f"ms of {size} tokens", min(ms))) for size, ms in zip(graphs.sizes, zip(*rounds))}
    slow: dict[int, float] = {}
    least = float("inf")
    for size in reversed(graphs.sizes):
        if took[size] > SLOWER * least:
            graphs.drop(size)
            slow[size] = took[size]
        least = min(least, took[size])
    return slow


def try_prefill_graphs(engine: Engine, graphs: Graphs) -> tuple[str, ...]:
    """Drop every size at which a graph does not give the bits of eager forwards; return in words which, and why.

    Each size is filled with whole prompts to the last token, then with one token more than the size below it takes, behind
    cached prefixes: eager forwards then run at another size of the class, with padding of their own.

    Parameters
    ----------
    engine
        The server's runners.
    graphs
        Its captured prefills.
    """
    sizes = graphs.sizes
    if not sizes:
        return ()
    if len(engine.table) < REQUESTS:
        for size in sizes:
            graphs.drop(size)
        return (f"prefill graphs are not used: {REQUESTS} requests are needed to try them, of {len(engine.table)}",)
    length = min(max(_shares(sizes[-1])) + PREFIX, engine.table.shape[1] - 1, engine.capacity // REQUESTS)
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, engine.vocab_size, (REQUESTS, length + 1), generator=generator)
    places = 1 + torch.randperm(REQUESTS * length, generator=generator).view(REQUESTS, length)
    notes = []
    with lent_table(engine.table, places):
        for below, size in zip((0, *sizes), sizes):
            broken = _broken(engine, graphs, tokens, size, below)
            if broken is not None:
                graphs.drop(size)
                notes.append(f"the prefill graph of {size} tokens is not used: {broken}")
    return tuple(notes)


def _broken(engine: Engine, graphs: Graphs, tokens: torch.Tensor, size: int, below: int) -> str | None:
    """Return what differs from an eager forward at one size, or None."""
    length = tokens.shape[1] - 1
    if max(_shares(size)) > length or size < LEAST_TOKENS:
        return f"what could not be tried: pool and table hold {REQUESTS} prompts of {length} tokens"
    fewest = max(below + 1, LEAST_TOKENS)
    cached = [min(length - n, PREFIX - 41 * r) for r, n in enumerate(_shares(fewest))]
    whole = [Extend(r, 0, n) for r, n in enumerate(_shares(size))]
    behind = [Extend(r, c, c + n, logprobs=r == 1) for r, (c, n) in enumerate(zip(cached, _shares(fewest)))]
    for name, before, parts in (("whole prompts", [], whole), ("prompts behind cached columns", cached, behind)):
        with graphs.off():
            if any(before):
                engine.extend([Extend(r, 0, n) for r, n in enumerate(before) if n], tokens)
            wanted = _bits(engine, parts, tokens)
        replayed = graphs.replays
        found = _bits(engine, parts, tokens)
        if graphs.replays != replayed + 1:
            return f"{name} of {size if parts is whole else fewest} tokens did not run in it"
        if not engine.agree(f"{name} in a graph", all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))):
            return f"{name} have other bits in it"
    return None


def _shares(total: int) -> list[int]:
    """Cut a number of tokens into uneven prompts."""
    each, rest = divmod(total, REQUESTS)
    more = each // 16
    return [each + rest, each - more, each, each + more]


def _bits(engine: Engine, parts: list[Extend], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Run one prefill; return all of its last logits, and the columns of its first request and the last one's new ones."""
    for part in parts:  # what an earlier forward left there must not stand for what this one writes
        mine = slots(engine, part.row, range(part.start, part.end))
        engine.write(mine, [torch.full_like(columns, 0.5) for columns in engine.read(mine)])
    logits = engine.extend(parts, tokens).clone()
    places = torch.cat([slots(engine, p.row, range(p.start, p.end)) for p in (parts[0], parts[-1])])
    return [logits, *engine.read(places)]
