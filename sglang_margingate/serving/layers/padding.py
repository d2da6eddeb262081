"""A forward whose layers are padded into their classes while it runs: where their rows go, and what was seen of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_margingate.canonical.invariance import RowSizes
from sglang_margingate.canonical.shape import ForwardShape

# State of this process (hook_table.py lists all of it): rows that stay behind those of a batch, never given back, since graphs
# that were captured go on writing in front of them.
_wide: dict[tuple[Any, ...], torch.Tensor] = {}


class Running:
    """The one forward that runs in this process, under construction.

    Parameters
    ----------
    sizes, head
        Where the rows of its linear layers, and of the layer that makes logits, go.
    rows
        Requests of a decode, tokens of a prefill.
    own
        For each layer that may be padded by itself, by its ``id``, where its rows go instead.
    """

    def __init__(self, sizes: RowSizes, head: RowSizes, rows: int, own: Mapping[int, RowSizes] | None = None) -> None:
        self.sizes, self.head, self.rows, self.own = sizes, head, rows, own or {}
        self.padded: int | None = None
        """Rows of the widest linear layer or bank of experts so far."""
        self.together: int | None = None
        """The same of those that have no sizes of their own."""
        self.seen: set[int] = set()
        """The layers that ran, by their ``id``."""
        self.escaped = False

    def escape(self) -> None:
        """Note that something ran at a shape that was never probed."""
        self.escaped = True

    def ran(self, rows: int) -> None:
        """Note the rows that a layer really ran with."""
        self.together = max(rows, self.together or 0)
        self._note(rows, self.sizes)

    def replayed(self, shape: ForwardShape) -> None:
        """Note what a graph's layers were captured at."""
        self.padded = shape.padded
        self.escaped |= not shape.in_class

    def rows_of(self, layer: Any, have: int) -> int:
        """Return at how many rows ``layer`` is to run, which has ``have``; note it."""
        self.seen.add(id(layer))
        own = self.own.get(id(layer))
        if own is None:
            rows = self.sizes.target(have) or have
            self.ran(rows)
        else:
            rows = own.target(have) or have
            self._note(rows, own)
        return rows

    def _note(self, rows: int, sizes: RowSizes) -> None:
        self.padded = max(rows, self.padded or 0)
        if rows not in sizes.sizes:
            self.escape()

    def widen(self, layer: Any, x: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the input of a layer, [have, features], with rows of padding behind it.

        A layer that is padded by itself has its input copied in front of rows that stay as they are. What stands there,
        zeros or rows of an earlier forward, changes no row of this one: that is what a class says.
        """
        if id(layer) not in self.own:
            return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))
        key, most = self.behind(layer, x, rows)
        wide = _wide.get(key)
        if wide is None:  # at the warm-up, so that a graph does not clear it
            wide = _wide[key] = x.new_zeros(most, x.shape[1])
        wide[: len(x)].copy_(x)
        return wide[:rows]

    def behind(self, layer: Any, x: torch.Tensor, _rows: int) -> tuple[tuple[Any, ...], int]:
        """Return which memory a layer is padded in, and its rows.

        Layers of one kind share it: they run one after another, and a prefill has many rows.
        """
        most = self.own[id(layer)].sizes[-1]
        return (type(self), tuple(layer.weight.shape), x.dtype, most), most

    def sent(self, dispatch_output: Any) -> Any:
        """Return what a bank of experts is given, with padding sent along where there is any."""
        return dispatch_output

    def shape(self) -> ForwardShape:
        """Return what the forward did."""
        return ForwardShape(self.rows, self.padded, self.padded is not None and not self.escaped)
