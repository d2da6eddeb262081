"""The invariance map: at which numbers of rows M a layer gives a row the same bits.

A GEMM library picks its kernel, tiles and split by M. Where two values of M get the same arithmetic, a row's bits are
equal; such values form a *class*. A forward whose rows, padded, stay inside one class of every layer is *structural*:
its result depends on the row alone. Only values that were probed are ever used: rows are padded up to one of them.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import multimode
from typing import Any

ROW_COST = 0.0015
"""Share of a decode step that a row of padding costs, at most (H100 and H200, 8B: 0.0006 to 0.0015)."""

APART_COST = 0.01
"""The same for padding one layer of every block by itself, beside its share of the rows: its input is copied, about 1.5 us of a
block's 80 to 170."""

OUTSIDE_COST = 1.0
"""The same for a step outside the class: it may need a verify."""

SPOT_ROWS = 24
"""Values of M that a spot check probes of each kind of layer, at most."""

SPOT_SAMPLE = 8
"""Those of them that are drawn from the inside of runs."""

MOST_ROWS = 1 << 16
"""More probed values than any map has: a file that claims them is damaged, and would fill the memory."""


class MapError(ValueError):
    """A stored map cannot be used; one line that says why."""


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
    kind
        What else chooses its kernel, in words: dtype, method, bias.
    whole
        It is never padded by itself: a sum over ranks, of what another layer gave.
    """

    name: str
    shape: tuple[int, int]
    count: int
    labels: dict[int, int | None]
    head: bool = False
    kind: str = ""
    whole: bool = False

    @property
    def work(self) -> int:
        """Multiplications for one row in all layers of this kind."""
        return self.count * self.shape[0] * self.shape[1]

    def same_as(self, rows: int | None) -> RowSizes:
        """Return every probed M that shares the class of ``rows``; none where that has no class."""
        label = None if rows is None else self.labels.get(rows)
        return RowSizes(tuple(sorted(m for m, found in self.labels.items() if label is not None and found == label)))

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

    def spot_rows(self, rng: random.Random) -> list[int]:
        """Return a few probed M that tell best whether the classes still hold, the most telling first.

        The smallest and the largest, the ends of runs (where there are many, other ones each time), and values drawn
        evenly over the doublings of M: a plain draw would hardly ever meet the small M that decode runs at.
        """
        rows = sorted(self.labels)
        picked = dict.fromkeys((rows[0], rows[-1]))
        ends = sorted({m for first, last, _ in self.runs() for m in (first, last)} - set(picked))
        rng.shuffle(ends)
        picked |= dict.fromkeys(ends[: SPOT_ROWS - SPOT_SAMPLE - len(picked)])
        doublings: dict[int, list[int]] = {}
        for m in rng.sample(rows, len(rows)):
            if m not in picked:
                doublings.setdefault(m.bit_length(), []).append(m)
        while doublings and len(picked) < SPOT_ROWS:
            for size in rng.sample(sorted(doublings), len(doublings))[: SPOT_ROWS - len(picked)]:
                picked[doublings[size].pop()] = None
                if not doublings[size]:
                    del doublings[size]
        return list(picked)

    def disagreements(self, found: Mapping[int, int | None]) -> list[int]:
        """Return each M of ``found`` that shares bits with other M than it does here.

        Classes are numbered as they were met, so numbers are compared only through who shares one.
        """
        theirs: dict[int, int] = {}
        ours: dict[int, int] = {}
        wrong = []
        for m, label in found.items():
            known = self.labels[m]
            if known is None or label is None:
                same = known is label
            else:
                same = theirs.setdefault(known, label) == label and ours.setdefault(label, known) == known
            if not same:
                wrong.append(m)
        return wrong

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON: the runs of one class, and as [first, last, step] which M were probed."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "kind": self.kind,
            "count": self.count,
            "head": self.head,
            "probed": spans(sorted(self.labels)),
            "classes": [list(run) for run in self.runs()],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerClasses:
        """Read what :meth:`to_dict` returned; anything else raises :class:`MapError`, KeyError, TypeError or ValueError."""
        name = str(data["name"])
        outputs, inputs = data["shape"]
        ranges = [range(first, last + 1, step) for first, last, step in data["probed"]]
        if not ranges or sum(map(len, ranges)) > MOST_ROWS:
            raise MapError(f"{name}: probed names no value of M, or too many")
        rows = [m for each in ranges for m in each]
        labels: dict[int, int | None] = {}
        for first, last, label in data["classes"]:
            if label is not None and not isinstance(label, int):
                raise MapError(f"{name}: {label!r} is not the number of a class")
            labels |= dict.fromkeys(rows[bisect_left(rows, first) : bisect_right(rows, last)], label)
        layer = cls(name, (outputs, inputs), data["count"], labels, data["head"], data["kind"])
        # Written back it must be the same: that leaves no gap, no overlap, no wrong order and no field unread.
        if layer.to_dict() != data:
            raise MapError(f"{name}: classes and probed do not fit each other, or a field is unknown")
        return layer


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
    """What the probe took."""
    file: str | None = None
    """Where it is kept; None where it is not."""
    checked_seconds: float | None = None
    """What the spot check of a map read from ``file`` took; None where it was probed at this start."""

    def origin(self) -> str:
        """Return in words whether this map was read from disk or probed."""
        if self.checked_seconds is not None:
            return f"read from {self.file}, spot check {self.checked_seconds:.1f} s"
        return f"probed in {self.seconds:.1f} s, " + ("not kept" if self.file is None else f"kept in {self.file}")

    def same_as(self, rows: int, *, head: bool, but: Sequence[int] = ()) -> RowSizes:
        """Return every probed M whose class is that of ``rows`` in each body layer, and in the head if asked for.

        Layers whose places are in ``but`` are left out.
        """
        kinds = [layer for k, layer in enumerate(self.layers) if (head or not layer.head) and k not in but]
        return self._sizes(kinds, rows)

    def decode_class(self, largest: int, verify_rows: int = 1, *, apart: bool = False) -> RowSizes:
        """Return the class that serves decode batches of 1 to ``largest`` rows best; empty where none was found.

        Every doubling of the batch counts alike, and verify passes of ``verify_rows`` rows as one more. A batch that fits is
        charged its padding, as :meth:`graph_size` does with ``apart``; one that does not is charged a verify, about a second
        forward.
        """
        batches = [b for b in (1 << k for k in range(32)) if b < largest] + [largest]
        classes: dict[tuple[int | None, ...], list[int]] = {}
        for m in sorted(set.intersection(*(set(layer.labels) for layer in self.layers))):
            classes.setdefault(tuple(layer.labels[m] for layer in self.layers), []).append(m)

        def cost(sizes: RowSizes) -> float:
            layers = self.layers_same_as(sizes.sizes[0]) if apart else []
            target = sizes.target(verify_rows)
            verify = OUTSIDE_COST if target is None else ROW_COST * (target - verify_rows)
            return verify + sum(self._graph(sizes, layers, b)[1] for b in batches)

        found = [RowSizes(tuple(sizes)) for label, sizes in classes.items() if None not in label]
        return min(found, key=cost, default=RowSizes())

    def layers_same_as(self, rows: int | None) -> list[RowSizes]:
        """Return for each kind of layer by itself every probed M that shares the class of ``rows``."""
        return [layer.same_as(rows) for layer in self.layers]

    def graph_size(self, decode: RowSizes, rows: int, most: int | None = None) -> int | None:
        """Return at how many rows decode batches of ``rows`` requests are to be captured; None: at no size inside the class.

        Either all of the forward is padded to a size of the class, of at most ``most`` rows, or it has ``rows`` rows and the
        layers that do not hold so few are padded by themselves: whichever costs less.
        """
        return self._graph(decode, self.layers_same_as(next(iter(decode.sizes), None)), rows, most)[0]

    def _graph(
        self, decode: RowSizes, layers: Sequence[RowSizes], rows: int, most: int | None = None
    ) -> tuple[int | None, float]:
        """Return that size, and the share of a step that the padding costs; without ``layers`` as a whole only."""
        target = decode.target(rows)
        if target is not None and most is not None and target > most:
            target = None
        cost = OUTSIDE_COST if target is None else ROW_COST * (target - rows)
        apart = [(x, sizes.target(rows)) for x, sizes in zip(self.layers, layers) if sizes.target(rows) != rows]
        if target == rows or not apart:
            return target, cost
        # Most kinds have one layer in each block; two layers of one shape are one kind.
        blocks = max(multimode(layer.count for layer in self.layers if not layer.whole))
        work = sum(layer.work for layer in self.layers if not layer.whole)
        alone = 0.0
        for layer, wider in apart:
            if layer.whole or wider is None:
                return target, cost
            alone += APART_COST * layer.count / blocks + ROW_COST * (wider - rows) * layer.work / work
        return (rows, alone) if alone < cost else (target, cost)

    def head_same_as(self, rows: int) -> RowSizes:
        """Return every probed M at which the head gives the bits it gives at ``rows``."""
        return self._sizes([layer for layer in self.layers if layer.head], rows)

    @staticmethod
    def _sizes(kinds: Sequence[LayerClasses], rows: int) -> RowSizes:
        own = [set(layer.same_as(rows).sizes) for layer in kinds]
        return RowSizes(tuple(sorted(set.intersection(*own)))) if own else RowSizes()

    def largest(self) -> int:
        """Return the largest M that was probed in every body layer."""
        return min(max(layer.labels) for layer in self.layers if not layer.head)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {
            "environment": self.environment,
            "seconds": round(self.seconds, 3),
            "file": self.file,
            "checked_seconds": None if self.checked_seconds is None else round(self.checked_seconds, 3),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    @classmethod
    def from_dict(cls, data: object) -> InvarianceMap:
        """Read what :meth:`to_dict` returned; ``file`` and ``checked_seconds`` may be missing.

        Raises
        ------
        MapError
            One line: a field is missing, unknown or does not fit the others.
        """
        if not isinstance(data, dict):
            raise MapError("not an object with fields")
        try:
            if not isinstance(data["environment"], dict):
                raise MapError("environment is not an object with fields")
            layers = [LayerClasses.from_dict(layer) for layer in data["layers"]]
            return cls(
                layers, data["environment"], float(data["seconds"]), data.get("file"), data.get("checked_seconds")
            )
        except MapError:
            raise
        except KeyError as error:
            raise MapError(f"the field {error} is missing") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise MapError(f"a field has a wrong value ({error})") from None


def rows_to_probe(dense: int, largest: int, step: int, coarse_from: int, coarse_step: int) -> list[int]:
    """Return every M to ``dense``, then multiples of ``step``, from ``coarse_from`` of ``coarse_step``, to ``largest``."""
    out = list(range(1, min(dense, largest) + 1))
    out += range((dense // step + 1) * step, min(coarse_from, largest) + 1, step)
    out += range((coarse_from // coarse_step + 1) * coarse_step, largest + 1, coarse_step)
    return out


def spans(rows: Sequence[int]) -> list[list[int]]:
    """Return ascending numbers as [first, last, step]: 1 to 64 and every 32nd to 128 are [1, 64, 1], [96, 128, 32]."""
    out: list[list[int]] = []
    for m in rows:
        if out and out[-1][0] == out[-1][1]:
            out[-1][1:] = [m, m - out[-1][0]]  # the second number of a span says its step
        elif out and m - out[-1][1] == out[-1][2]:
            out[-1][1] = m
        else:
            out.append([m, m, 1])
    return out
