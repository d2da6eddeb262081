"""The invariance map: at which numbers of rows M a layer gives a row the same bits.

A GEMM library picks its kernel, tiles and split by M. Where two values of M get the same arithmetic, a row's bits are
equal; such values form a *class*. A forward whose rows, padded, stay inside one class of every layer is *structural*:
its result depends on the row alone. Only values that were probed are ever used: rows are padded up to one of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ROW_COST = 0.0015
"""Share of a decode step that a row of padding costs (H200, 8B: 64 rows for 1 take about 9% longer)."""

OUTSIDE_COST = 1.0
"""The same for a step outside the class: it may need a verify."""


@dataclass(frozen=True)
class LayerClasses:
    """What was probed of one kind of layer.

    Parameters
    ----------
    name
        The first layer of this kind.
    shape
        (output features, input features).
    count
        Layers of the model with this shape.
    labels
        Class of each probed M; equal numbers mean equal bits. None: at this M a row's place changes its bits.
    head
        The layer that makes logits: in a prefill it sees one row per request, not per token.
    """

    name: str
    shape: tuple[int, int]
    count: int
    labels: dict[int, int | None]
    head: bool = False

    def runs(self) -> list[tuple[int, int, int | None]]:
        """Return (first M, last M, class) of neighbouring probed values with one class."""
        out: list[tuple[int, int, int | None]] = []
        for m in sorted(self.labels):
            label = self.labels[m]
            if out and out[-1][2] == label:
                out[-1] = (out[-1][0], m, label)
            else:
                out.append((m, m, label))
        return out


@dataclass(frozen=True)
class RowSizes:
    """Numbers of rows at which every layer gives the same bits, and the padding onto them.

    Parameters
    ----------
    sizes
        Probed values of M in one class, ascending.
    """

    sizes: tuple[int, ...] = ()

    def target(self, rows: int) -> int | None:
        """Return the number of rows to pad to, or None where none was found inside the class."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else None

    def describe(self) -> str:
        """Return the sizes as ranges, such as ``17-120, 128``."""
        parts: list[list[int]] = []
        for size in self.sizes:
            if parts and size - parts[-1][1] == 1:
                parts[-1][1] = size
            else:
                parts.append([size, size])
        shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
        return ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]]) or "none"


@dataclass
class InvarianceMap:
    """The classes of one model on one machine, with what they were read on."""

    layers: list[LayerClasses]
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def same_as(self, rows: int, *, head: bool) -> RowSizes:
        """Return every probed M whose class is that of ``rows`` in each body layer, and in the head if asked for."""
        kinds = [layer for layer in self.layers if head or not layer.head]
        return self._sizes(kinds, rows)

    def decode_class(self, largest: int) -> RowSizes:
        """Return the class that serves decode batches of 1 to ``largest`` rows best; empty where none was found.

        Every doubling of the batch counts alike. A batch that fits is charged the rows it is padded by, one that does
        not is charged a verify, about a second forward.
        """
        batches = [b for b in (1 << k for k in range(32)) if b < largest] + [largest]
        classes: dict[tuple[int | None, ...], list[int]] = {}
        for m in sorted(set.intersection(*(set(layer.labels) for layer in self.layers))):
            classes.setdefault(tuple(layer.labels[m] for layer in self.layers), []).append(m)

        def cost(sizes: RowSizes) -> float:
            targets = [sizes.target(b) for b in batches]
            return sum(OUTSIDE_COST if t is None else ROW_COST * (t - b) for t, b in zip(targets, batches))

        found = [RowSizes(tuple(sizes)) for label, sizes in classes.items() if None not in label]
        return min(found, key=cost, default=RowSizes())

    def head_same_as(self, rows: int) -> RowSizes:
        """Return every probed M at which the head gives the bits it gives at ``rows``."""
        return self._sizes([layer for layer in self.layers if layer.head], rows)

    @staticmethod
    def _sizes(kinds: Sequence[LayerClasses], rows: int) -> RowSizes:
        if not kinds or any(layer.labels.get(rows) is None for layer in kinds):
            return RowSizes()
        common = set.intersection(*(set(layer.labels) for layer in kinds))
        fine = [m for m in common if all(layer.labels[m] == layer.labels[rows] for layer in kinds)]
        return RowSizes(tuple(sorted(fine)))

    def largest(self) -> int:
        """Return the largest M that was probed in every body layer."""
        return min(max(layer.labels) for layer in self.layers if not layer.head)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "environment": self.environment,
            "seconds": round(self.seconds, 3),
            "layers": [
                {"name": x.name, "shape": list(x.shape), "count": x.count, "head": x.head,
                 "classes": [list(run) for run in x.runs()]}
                for x in self.layers
            ],
        }  # fmt: skip


def rows_to_probe(dense: int, largest: int, step: int, coarse_from: int, coarse_step: int) -> list[int]:
    """Return every M to ``dense``, then multiples of ``step``, from ``coarse_from`` of ``coarse_step``, to ``largest``."""
    out = list(range(1, min(dense, largest) + 1))
    out += range((dense // step + 1) * step, min(coarse_from, largest) + 1, step)
    out += range((coarse_from // coarse_step + 1) * coarse_step, largest + 1, coarse_step)
    return out
