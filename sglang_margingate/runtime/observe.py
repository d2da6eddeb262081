"""What a forward's rows were seen to do, on its way to the host: one buffer on the device, one copy, no wait.

The columns of a forward lie behind one another in one buffer, so that one copy brings all of them. A kernel writes each
column where it belongs; nothing is put together afterwards. To add a column: a line of :data:`COLUMNS` and a field of
:class:`Numbers` of the same name, and whoever knows it fills ``packed.column(NAME)`` before ``send``.

A buffer of the host is given out to one forward and comes back when its numbers have been read, so however late that is,
no other forward writes into it. The device's buffer is made for each forward by torch's allocator: the tokens that SGLang
goes on with are a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

COLUMNS: dict[str, torch.dtype] = {
    "token": torch.int64,
    "second": torch.int64,
    "margin": torch.float32,
    "chosen": torch.int64,
}
"""What is brought of each row, by name: int64 or float32."""

_PLACE = {name: at for at, name in enumerate(COLUMNS)}
_FLOATS = frozenset(name for name, dtype in COLUMNS.items() if dtype == torch.float32)
LEAST_ROWS = 64


class Numbers(NamedTuple):
    """What was measured of a forward's rows, by row of the logits."""

    token: Sequence[int]
    second: Sequence[int]
    margin: Sequence[float]
    chosen: Sequence[int]


class _Landing:
    """A buffer of the host, pinned where there is a GPU: int64 [columns, room]."""

    def __init__(self, room: int, pinned: bool) -> None:
        self.tensor = torch.empty(len(COLUMNS), room, dtype=torch.int64, pin_memory=pinned)
        ints = self.tensor.numpy()
        floats = ints.view(np.float32)  # a float lies in the first half of its row
        self._rows: list[Any] = [(floats if name in _FLOATS else ints)[at] for name, at in _PLACE.items()]

    def read(self, rows: int, chosen: bool) -> Numbers:
        """Return the columns of the first ``rows`` rows; without ``chosen`` every row chose its best token."""
        columns = {
            name: column[:rows].tolist() for name, column in zip(COLUMNS, self._rows) if chosen or name != "chosen"
        }
        return Numbers(**columns) if chosen else Numbers(**columns, chosen=columns["token"])


class Packed:
    """The columns of one forward, on its device.

    Parameters
    ----------
    landings
        Where its numbers may land on the host.
    rows
        Rows of the forward.
    device
        Where its logits lie.
    """

    def __init__(self, landings: Landings, rows: int, device: torch.device) -> None:
        self._landings, self._rows = landings, rows
        self._room = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        self._buffer = torch.empty(len(COLUMNS), self._room, dtype=torch.int64, device=device)

    def column(self, name: str) -> torch.Tensor:
        """Return the rows of one column, to be filled; it lives as long as anybody holds it."""
        column = self._buffer[_PLACE[name]]
        return (column.view(torch.float32) if name in _FLOATS else column)[: self._rows]

    def send(self, chosen: torch.Tensor | None = None) -> Callable[[], Numbers]:
        """Start the copy to the host.

        Parameters
        ----------
        chosen
            The chosen tokens, [rows]; None where every row chose its best one.

        Returns
        -------
        Callable
            Gives the numbers, once, after the copy has arrived: the caller waits for a mark made after this call.
        """
        if chosen is not None:
            self.column("chosen").copy_(chosen)
        landing = self._landings.take(self._room)
        landing.tensor.copy_(self._buffer, non_blocking=True)
        room, rows, landings = self._room, self._rows, self._landings

        def read() -> Numbers:
            numbers = landing.read(rows, chosen is not None)
            landings.give_back(room, landing)
            return numbers

        return read


class Landings:
    """The host's buffers of one process: made when first needed, then used again.

    Parameters
    ----------
    pinned
        Whether copies come from a GPU.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: dict[int, list[_Landing]] = {}
        self.made = 0
        """Buffers made so far: as many as were ever on their way at once, for each size."""

    def take(self, room: int) -> _Landing:
        """Return a buffer that nothing is on its way to."""
        free = self._free.get(room)
        if free:
            return free.pop()
        self.made += 1
        return _Landing(room, self._pinned)

    def give_back(self, room: int, landing: _Landing) -> None:
        """Take back a buffer that has been read."""
        self._free.setdefault(room, []).append(landing)
