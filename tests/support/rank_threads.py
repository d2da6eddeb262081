"""Ranks of a server as threads of this process: they share a store as processes do, and add up where all can see it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed import HashStore

from sglang_margingate.canonical.ranks import Ranks

Add = Callable[[list[torch.Tensor], int], torch.Tensor]
"""Adds up the parts of all ranks, in their order; told which rank asks."""


def run_ranks(size: int, work: Callable[[Ranks], Any], seconds: float = 30.0) -> list[Any]:
    """Run ``work`` on every rank at once; return what each returned, or the error that it raised."""
    store = HashStore()

    def run(rank: int) -> Any:
        try:
            return work(Ranks(rank, size, store, seconds))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


class SharedSum:
    """A sum over ranks that are threads.

    Parameters
    ----------
    size
        How many.
    add
        How they add up.
    in_graph
        The same inside a CUDA graph, where that differs; None: as outside.
    """

    def __init__(self, size: int, add: Add, in_graph: Add | None = None) -> None:
        self._add, self._in_graph = add, in_graph or add
        self._parts: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size, timeout=300)

    def of(self, rank: int) -> RankSum:
        """Return it as one rank asks for it."""
        return RankSum(self, rank)

    def sum(self, rank: int, x: torch.Tensor, graph: bool) -> torch.Tensor:
        """Wait for all parts and add them up."""
        self._parts[rank] = x
        self._barrier.wait()
        out = (self._in_graph if graph else self._add)([part.clone() for part in self._parts], rank)
        self._barrier.wait()
        return out


class RankSum:
    """One rank's :class:`~sglang_margingate.canonical.reduce_probe.Reduce`."""

    def __init__(self, shared: SharedSum, rank: int) -> None:
        self._shared, self._rank, self._graph = shared, rank, False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._shared.sum(self._rank, x, self._graph)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self._graph = True
            try:
                run()
            finally:
                self._graph = False

        return replay
