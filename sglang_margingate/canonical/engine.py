"""What trials and self-test ask of the server that they run in: forwards over made-up requests, and their K/V columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Bits = tuple[torch.Tensor, list[torch.Tensor]]
"""What one row gave: its logits, and K then V of each layer at its columns."""


@dataclass(frozen=True)
class Extend:
    """Part of one made-up prompt: positions [start, end) of table row ``row``."""

    row: int
    start: int
    end: int
    logprobs: bool = False
    """Ask for the log-probability of each of its tokens, so that the layer that makes logits sees them all."""


class Engine(Protocol):
    """The server's own runners, to be asked before it takes requests. Rows of the table stand for requests."""

    device: str
    rows: int
    """The M of a verify pass."""
    capacity: int
    """Tokens that the K/V pool holds, in slots 1 to this number."""
    vocab_size: int
    """Tokens are drawn below it."""
    table: torch.Tensor
    """[requests, tokens]: the pool slot of each column."""
    model: torch.nn.Module

    def extend(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        """Run one prefill forward as it will be served; return each part's last logits. ``tokens``: [requests, tokens]."""

    def scores(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        """Run one prefill forward; return the log-probability of each token after those of the parts that ask."""

    def decode(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one decode forward as it will be served; return its logits."""

    def verify(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one verify pass of at most M rows; return their logits."""

    def keep_graphs(self, sizes: Sequence[int]) -> None:
        """Replay decodes from graphs of these sizes only, from now on."""

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of K then V of each layer at ``slots``."""

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        """Put back what :meth:`read` returned."""

    def agree(self, what: str, holds: bool) -> bool:
        """Return whether something holds on every rank of the server (:class:`~.ranks.Ranks`).

        Each rank holds other heads' columns, and all must go the same way: no trial may end on one and go on on another.
        """


def slots(engine: Engine, request: int, positions: Sequence[int]) -> torch.Tensor:
    """Return the pool slots that hold ``positions`` of a request, int64."""
    return engine.table[request, torch.tensor(positions, dtype=torch.int64, device=engine.table.device)].long()


@contextmanager
def lent_table(table: torch.Tensor, wanted: torch.Tensor) -> Iterator[None]:
    """Point the first rows of the table at the slots ``wanted``, [rows, tokens]; restore it afterwards."""
    rows, tokens = wanted.shape
    saved = table[:rows, :tokens].clone()
    table[:rows, :tokens] = wanted.to(table.device, table.dtype)
    try:
        yield
    finally:
        table[:rows, :tokens] = saved


def same_bits(a: Bits, b: Bits) -> bool:
    """Return whether two rows' logits and K/V columns are equal bit for bit."""
    return torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
