"""The classes that a server keeps its forwards in, and what its trials found: values, made once at start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
from sglang_margingate.canonical.shape import ForwardShape

GPU_LARGEST = 16_384
"""Largest number of rows that is probed on a GPU."""

NO_SIZES = RowSizes()

Prefill = Literal["batched", "grid"]

SATURATED = 256
"""A prefill of fewer rows takes a GPU no less time: it reads the weights meanwhile."""

LEAST_OUTPUTS = 512
"""A product with fewer output features takes no less time either: it reads its input meanwhile. To copy that costs as much."""

APART_GAIN = 0.8
"""Layers are padded by themselves in prefills where no more of the work is left: below that the estimate is too rough."""


@dataclass(frozen=True)
class Classes:
    """What the probe found (:mod:`.layer_probe`).

    Parameters
    ----------
    map
        The invariance map of the model's layers.
    decode, prefill, head
        Numbers of rows that forwards, and the layer that makes logits, are padded to.
    verify_rows
        The M of verify passes: the wanted one, or the next that shares the decode class.
    unknown
        Layers that the probe does not know: with one of them nothing is structural.
    apart
        Places in the map of the layers that prefills pad by themselves: ``prefill`` is the class of the others.
    """

    map: InvarianceMap
    decode: RowSizes = NO_SIZES
    prefill: RowSizes = NO_SIZES
    head: RowSizes = NO_SIZES
    verify_rows: int = 0
    unknown: tuple[str, ...] = ()
    apart: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, found: InvarianceMap, largest: int, verify_rows: int, unknown: list[str], *, apart: bool = False
    ) -> Classes:
        """Choose the classes of a map.

        Parameters
        ----------
        found
            The map.
        largest
            Rows of the largest decode batch.
        verify_rows
            The wanted M of verify passes.
        unknown
            Layers that the probe does not know.
        apart
            Layers may be padded by themselves where that costs less than to pad all of them.
        """
        decode = found.decode_class(largest, verify_rows, apart=apart)
        rows = decode.target(verify_rows) or verify_rows
        alone = apart_in_prefills(found) if apart else ()
        prefill = found.same_as(found.largest(), head=False, but=alone)
        return cls(found, decode, prefill, found.head_same_as(rows), rows, tuple(unknown), alone)

    def own(self, decode: bool) -> list[RowSizes]:
        """Return for each kind of layer in the map every probed M that shares its own class, of decodes or of prefills."""
        # Any size of decodes stands for the class; of prefills the largest, which layers padded by themselves share too.
        at = self.decode.sizes[:1] if decode else self.prefill.sizes[-1:]
        return self.map.layers_same_as(next(iter(at), None))

    def one(self) -> bool:
        """Return whether decodes and prefills have one class: each layer of the body gives a row the same bits in both."""
        pairs = zip(self.map.layers, self.own(decode=True), self.own(decode=False))
        return bool(self.decode.sizes) and all(a.sizes and a == b for layer, a, b in pairs if not layer.head)

    def decode_graph_sizes(self, wanted: Sequence[int], most: int) -> list[int]:
        """Return the decode sizes inside the class, of at most ``most`` rows, that serve batches of the ``wanted`` sizes; rising.

        At some of them layers that do not hold so few rows are padded by themselves (:meth:`InvarianceMap.graph_size`).
        """
        sizes = {self.map.graph_size(self.decode, rows, most) for rows in wanted if rows <= most}
        return sorted(size for size in sizes if size is not None)


def apart_in_prefills(found: InvarianceMap) -> tuple[int, ...]:
    """Return which layers prefills should pad by themselves, by their places in the map.

    The class of the largest prefill may begin late: the router of a mixture, a product with 8 outputs, had its class of 8,192
    rows from 5,056 on, and a prompt of 100 tokens ran at so many. Every doubling of the prefill counts alike; what is counted
    are multiplications, with the floors above.
    """
    body = [(k, layer) for k, layer in enumerate(found.layers) if not layer.head]
    own = found.layers_same_as(found.largest())
    work = {
        k: layer.count * layer.shape[1] * max(layer.shape[0], LEAST_OUTPUTS) for k, layer in body if not layer.whole
    }
    copy = {k: layer.count * layer.shape[1] * LEAST_OUTPUTS for k, layer in body}
    batches = [1 << k for k in range(32) if 1 << k <= found.largest()]

    def left(apart: tuple[int, ...]) -> float:
        common = found.same_as(found.largest(), head=False, but=apart)
        share = 0.0
        for rows in batches:
            wide = common.target(rows)
            if wide is None:
                return float("inf")
            wider = {k: own[k].target(wide) for k in apart}
            at = {k: max(SATURATED, wider.get(k) or wide) for k in work}
            more = sum(copy[k] * max(SATURATED, wide) for k in apart)
            share += (sum(work[k] * at[k] for k in work) + more) / (sum(work.values()) * max(SATURATED, rows))
        return share / len(batches)

    together = left(())
    # Of the class of the largest prefill, which holds every smaller one: what has no class there is in no prefill's.
    narrow = [k for k, layer in body if k in work and 0 < len(own[k].sizes) < len(layer.labels)]
    best = min([(k,) for k in narrow] + list(combinations(narrow, 2)), key=left, default=())
    return best if left(best) < APART_GAIN * together else ()


@dataclass(frozen=True)
class DecodeGraphs(RowSizes):
    """The captured decode sizes, those beyond the class too; none without CUDA graphs.

    Parameters
    ----------
    widest
        Of the sizes at which every layer was seen to be captured inside its class: the rows of the widest one.
    """

    widest: Mapping[int, int] = field(default_factory=dict)

    def inside(self) -> list[int]:
        """Return the sizes inside the class."""
        return [size for size in self.sizes if size in self.widest]

    def whole(self) -> DecodeGraphs:
        """Return them without the sizes at which layers are padded by themselves."""
        whole = {size: rows for size, rows in self.widest.items() if rows == size}
        return DecodeGraphs(tuple(size for size in self.sizes if size in whole or size not in self.widest), whole)

    def shape(self, rows: int, size: int) -> ForwardShape:
        """Return what a decode of ``rows`` requests ran at in the graph of ``size`` rows."""
        return ForwardShape(rows, self.widest.get(size, size), size in self.widest)


NO_GRAPHS = DecodeGraphs()


@dataclass(frozen=True)
class Trial:
    """What the trials of the runners that serve found (:mod:`.path_probe`).

    Parameters
    ----------
    graphs
        The decode graphs.
    decode_ok
        Decode gives one row the same bits at every size of the class, and the verify's.
    prefill
        ``batched``: a prompt's bits depend on neither companions, chunking nor prefix hits. ``grid``: they are the same
        each time it is prefilled alone in chunks on the canonical grid, which ``batched`` includes. None: neither holds.
    notes
        What was tried and failed, in words.
    decode_attention, prefill_attention
        What attends in decode graphs, and in prefills.
    seconds
        What the trials took.
    prefill_graphs
        Captured prefill sizes at which graphs gave the bits of eager forwards; empty where prefills run eagerly.
    prompt_scores
        The log-probabilities of a prompt's tokens depend on it alone.
    """

    graphs: DecodeGraphs = NO_GRAPHS
    decode_ok: bool = False
    prefill: Prefill | None = None
    notes: tuple[str, ...] = ()
    decode_attention: str = "sglang"
    prefill_attention: str = "sglang"
    seconds: float = 0.0
    prefill_graphs: RowSizes = NO_SIZES
    prompt_scores: bool = False


@dataclass(frozen=True)
class FastPath:
    """The canonical fast path of this server."""

    classes: Classes
    trial: Trial = field(default_factory=Trial)

    def judged(self, seen: ForwardShape) -> ForwardShape:
        """Return what was seen of a decode forward, in its class only where the trials held too."""
        return seen if self.trial.decode_ok else seen._replace(in_class=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for status page and manifest."""
        classes, trial = self.classes, self.trial
        return {
            "map": classes.map.to_dict(),
            "decode_rows": classes.decode.describe(),
            "prefill_rows": classes.prefill.describe(),
            "prefill_apart": [classes.map.layers[k].name for k in classes.apart],
            "one_class": classes.one(),
            "verify_rows": classes.verify_rows,
            "graph_sizes": list(trial.graphs.sizes),
            "graph_rows": {str(size): trial.graphs.widest[size] for size in trial.graphs.inside()},
            "prefill_graph_sizes": list(trial.prefill_graphs.sizes),
            "decode_attention": trial.decode_attention,
            "prefill_attention": trial.prefill_attention,
            "decode_ok": trial.decode_ok,
            "prefill": trial.prefill,
            "notes": list(trial.notes),
        }
