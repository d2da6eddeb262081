"""Probes the layers of the loaded model: which numbers of rows M give a row the same bits on this machine.

A kind of layer takes rows and gives digests of what a probed row becomes (:class:`LayerKind`): linear layers are one
(:mod:`.linear_probe`). The map is kept (map_store.py), so at most starts only a few values of M are probed: those tell
whether the kept map still holds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses

HEAD_LARGEST = 512
"""The head sees one row per request; what has more rows is computed in blocks of a probed number."""

DENSE = 260
"""A kind that is ``coarse`` is probed at every number of rows up to this, and at multiples of ``coarse`` above."""

SPOT_SECONDS = 4.0
"""A spot check starts no further product after this long; only large models on a CPU come near it."""


class LayerKind(Protocol):
    """One layer that stands for all that the same kernels compute: rows in, digests out."""

    @property
    def name(self) -> str:
        """The layer's name in the model."""

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""

    @property
    def count(self) -> int:
        """Layers of this kind in the model."""

    @property
    def head(self) -> bool:
        """Whether it makes logits: in a prefill it sees one row per request, not per token."""

    def describe(self) -> str:
        """Return in words what chooses its kernel beside the shape; part of a kept map's key."""

    def digests(self, rows: list[int], seconds: float = float("inf")) -> dict[int, list[int]]:
        """Run the layer at each M; return the digests of the probed row in every place that was tried.

        The last of ``rows`` are left out when the time is up.
        """


def wanted(kind: LayerKind, rows: list[int]) -> list[int]:
    """Return those of ``rows`` that are probed of this kind."""
    coarse: int = getattr(kind, "coarse", 1)
    return [m for m in rows if (not kind.head or m <= HEAD_LARGEST) and (m <= DENSE or m % coarse == 0)]


def probe_layers(kinds: Sequence[LayerKind], rows: list[int], environment: dict[str, Any]) -> InvarianceMap:
    """Return the map of every kind of layer.

    Parameters
    ----------
    kinds
        The model's.
    rows
        Values of M to probe, ascending.
    environment
        What the map is read on; kept in it.
    """
    start = time.perf_counter()
    layers = []
    for kind in kinds:
        # From large to small, so that a GPU's allocator cuts every tensor out of the first ones. The other way round each
        # M needs larger blocks than all before, and the cache of those takes the memory that the graphs will need.
        found = labels(kind, wanted(kind, rows)[::-1])
        layers.append(LayerClasses(kind.name, kind.shape, kind.count, found, kind.head, kind.describe()))
    _free_memory()
    return InvarianceMap(layers, environment, time.perf_counter() - start)


def spot_check(
    kinds: Sequence[LayerKind], found: InvarianceMap, rng: random.Random | None = None
) -> dict[str, list[int]]:
    """Probe a few values of M of every layer; return those that disagree with a map, by the layer's name.

    Parameters
    ----------
    kinds
        The model's, in the map's order.
    found
        The map to check.
    rng
        Which values are tried; by default other ones at every call.
    """
    rng = rng or random.Random()
    end = time.perf_counter() + SPOT_SECONDS
    wrong = {}
    for k, (kind, layer) in enumerate(zip(kinds, found.layers, strict=True)):
        share = max(0.0, end - time.perf_counter()) / (len(kinds) - k)
        disagree = layer.disagreements(labels(kind, layer.spot_rows(rng), share))
        if disagree:
            wrong[kind.name] = disagree
    _free_memory()
    return wrong


def labels(kind: LayerKind, rows: list[int], seconds: float = float("inf")) -> dict[int, int | None]:
    """Return the class of each M, numbered from the smallest M; None where a row's place changes its bits."""
    seen: dict[int, int] = {}
    return {
        m: seen.setdefault(each[0], len(seen)) if len(set(each)) == 1 else None
        for m, each in sorted(kind.digests(rows, seconds).items())
    }


def _free_memory() -> None:
    """Give the probe's memory back to the GPU: what comes next (graph capture) cannot take it out of torch's cache."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
