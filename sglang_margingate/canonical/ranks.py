"""Several processes that serve one model: what each rank found, compared before anything is claimed.

Every forward holds collectives, so ranks must run the same forwards in the same order, and a trial that ends on one rank and
goes on on another would hang both. So whatever is decided from bits is decided by all: :meth:`Ranks.agree`. Values go through
the key-value store that torch's process group was made with. It is no collective: a rank that never comes is a timeout with a
name, and a rank without this code cannot mistake our messages for its own.
"""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from hashlib import sha256
from typing import Any, Protocol

log = logging.getLogger(__name__)

SECONDS = 300.0
"""How long a rank may be behind: it may have to compile kernels that another one found compiled."""


class RankError(RuntimeError):
    """The ranks of a server are not one server: one is missing, or they differ. One line, with the rank."""


class Store(Protocol):
    """torch's key-value store (``torch.distributed.Store``)."""

    def set(self, key: str, value: str, /) -> None:
        """Put a value."""

    def get(self, key: str, /) -> bytes:
        """Return a value that is there."""

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        """Wait until the keys are there; raise RuntimeError when the time is up."""


class Ranks:
    """The ranks of one tensor-parallel group, as one of them sees them; by default there is only this one.

    Parameters
    ----------
    rank, size
        This rank, of how many.
    store
        What they share.
    seconds
        How long to wait for the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Store | None = None, seconds: float = SECONDS) -> None:
        if size > 1 and store is None:
            raise ValueError("several ranks share a store")
        self.rank, self.size, self._store, self._seconds = rank, size, store, seconds
        self._asked = 0

    def exchange(self, what: str, value: Any, seconds: float | None = None) -> list[Any]:
        """Return every rank's value, in the order of ranks; all ranks must ask the same questions in the same order.

        Parameters
        ----------
        what
            The question in a few words.
        value
            This rank's answer: what JSON holds.
        seconds
            How long to wait, where it is not the usual time.

        Raises
        ------
        RankError
            A rank did not answer in time.
        """
        if self._store is None or self.size == 1:
            return [value]
        self._asked += 1
        keys = [f"margingate/{self._asked}/{what}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        limit = self._seconds if seconds is None else seconds
        answers = []
        for rank, key in enumerate(keys):
            try:
                self._store.wait([key], timedelta(seconds=limit))
                answers.append(json.loads(self._store.get(key)))
            except RuntimeError:  # torch's DistStoreError: a timeout, or the store's owner (rank 0) is gone
                raise RankError(
                    f"rank {rank} of {self.size} did not answer within {limit:.0f} s ({what}): it ended, hangs, or runs "
                    "without margingate's plugin; its log says which"
                ) from None
        return answers

    def agree(self, what: str, holds: bool) -> bool:
        """Return whether something holds on every rank; the log names those on which it does not."""
        answers = self.exchange(what, bool(holds))
        against = [rank for rank, answer in enumerate(answers) if not answer]
        if against and len(against) < self.size:
            log.warning("margingate: %s does not hold on %s of %d", what, named(against), self.size)
        return not against

    def same(self, what: str, value: dict[str, Any], fix: str = "", seconds: float | None = None) -> None:
        """Check that all ranks have the same values.

        Raises
        ------
        RankError
            Names the first field that differs, with the values of the ranks; ``fix`` says what to do.
        """
        answers = self.exchange(what, value, seconds)
        for name in dict.fromkeys(name for answer in answers for name in answer):
            values = [answer.get(name) for answer in answers]
            other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
            if other is not None:
                raise RankError(
                    f"rank {other} of {self.size} differs from rank 0 in {name} ({what}): {_short(values[other])}, and "
                    f"{_short(values[0])} on rank 0{'. ' + fix if fix else ''}"
                )


def named(ranks: list[int]) -> str:
    """Return ``rank 1`` or ``ranks 1, 3``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def digest(value: Any) -> str:
    """Return a short digest of what JSON holds; equal on all ranks where their values are."""
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
