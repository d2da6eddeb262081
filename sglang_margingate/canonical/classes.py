"""The classes that a server keeps its forwards in, and what its trials found: values, made once at start-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
from sglang_margingate.canonical.shape import ForwardShape

GPU_LARGEST = 16_384
"""Largest number of rows that is probed on a GPU."""

NO_SIZES = RowSizes()

Prefill = Literal["batched", "grid"]


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
    """

    map: InvarianceMap
    decode: RowSizes = NO_SIZES
    prefill: RowSizes = NO_SIZES
    head: RowSizes = NO_SIZES
    verify_rows: int = 0
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: InvarianceMap, largest: int, verify_rows: int, unknown: list[str]) -> Classes:
        """Choose the classes of a map, for decode batches of up to ``largest`` rows."""
        decode = found.decode_class(largest)
        rows = decode.target(verify_rows) or verify_rows
        prefill = found.same_as(found.largest(), head=False)
        return cls(found, decode, prefill, found.head_same_as(rows), rows, tuple(unknown))

    def graph_sizes(self, wanted: Sequence[int]) -> list[int]:
        """Return the decode sizes inside the class that serve batches of the ``wanted`` sizes, rising.

        At some of them layers that do not hold so few rows are padded by themselves (:meth:`InvarianceMap.graph_size`).
        """
        return sorted({size for rows in wanted if (size := self.map.graph_size(self.decode, rows)) is not None})


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

    def shape(self, rows: int, size: int | None) -> ForwardShape:
        """Return what a decode of ``rows`` requests ran at in the graph of ``size`` rows; None: in none that is known."""
        if size is None:
            return ForwardShape(rows, None, False)
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

    def decode_in_class(self, rows: int) -> bool:
        """Return whether a decode of ``rows`` requests in a CUDA graph runs inside the class."""
        return self.decode_shape(rows).in_class

    def decode_shape(self, rows: int, seen: ForwardShape | None = None) -> ForwardShape:
        """Return the shape of a decode forward of ``rows`` requests, in its class only where the trials held too.

        Parameters
        ----------
        rows
            Requests of the batch.
        seen
            What was seen of a forward without a graph. None: it ran in the smallest captured graph that holds it, where
            no hook runs but the sizes are known.
        """
        if seen is None:
            seen = self.trial.graphs.shape(rows, self.trial.graphs.target(rows))
        return seen if self.trial.decode_ok else seen._replace(in_class=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for status page and manifest."""
        classes, trial = self.classes, self.trial
        return {
            "map": classes.map.to_dict(),
            "decode_rows": classes.decode.describe(),
            "prefill_rows": classes.prefill.describe(),
            "one_class": bool(classes.decode.sizes) and set(classes.decode.sizes) <= set(classes.prefill.sizes),
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
