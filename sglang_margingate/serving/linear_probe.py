"""Probes the linear layers of the loaded model: which numbers of rows M give a row the same bits on this machine.

Every kind of layer (shape, dtype, bias) is run twice per M: with the probed row first and last among random companions,
and with the probed row in every place, since a kernel may sum some of its tiles in another order than others. Only 64-bit
digests of output rows are compared. The map is kept (map_store.py), so at most starts only a few values
of M are probed: those tell whether the kept map still holds.

Random numbers make a blind probe: bf16 rounds away most differences between two orders of summation (with 256 inputs,
about one output in 4,000 shows one). So each layer's weight is lent other values while it is probed: every product
appears once with each sign, in random order. The exact sums are 0, and what comes out is nothing but rounding, which
shows any change of order, tile or split. The kernel that is chosen depends on shapes, not on values.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from margingate_kernels import row_digest

from sglang_margingate.gate.invariance import InvarianceMap, LayerClasses

HEAD_LARGEST = 512
"""The head sees one row per request; more requests than this in a prefill count as outside the map."""

BASE_ROWS = 256
"""Different output rows of the lent weight; they repeat after that."""

SPOT_SECONDS = 4.0
"""A spot check starts no further product after this long; only large models on a CPU come near it."""

Apply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class LayerKind:
    """One layer that stands for all of its shape, dtype, method and bias, and how to run it."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    apply: Apply
    head: bool
    method: str = ""
    """What SGLang computes it with."""
    count: int = 1
    """Layers of this kind in the model."""

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        return self.weight.shape[0], self.weight.shape[1]

    def describe(self) -> str:
        """Return in words what chooses its kernel beside the shape; part of a kept map's key."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"{dtype}, {self.method}, {'no bias' if self.bias is None else 'bias'}"

    def wanted(self, rows: list[int]) -> list[int]:
        """Return those of ``rows`` that are probed of this kind."""
        return [m for m in rows if not self.head or m <= HEAD_LARGEST]


def layer_kinds(model: Any) -> list[LayerKind]:
    """Return one layer of every kind in SGLang's model module, the head last."""
    from sglang.srt.layers.linear import LinearBase

    found: dict[Any, LayerKind] = {}
    counts: Counter[Any] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        bias = getattr(module, "bias", None)
        method = type(module.quant_method).__name__
        key = (method, tuple(module.weight.shape), module.weight.dtype, bias is not None)
        counts[key] += 1
        if key not in found:
            found[key] = LayerKind(name, module.weight, bias, _method(module), False, method)
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "weight"):
        counts["head"] = 1
        found["head"] = LayerKind(
            "lm_head", head.weight, None, lambda x, _bias: torch.matmul(x, head.weight.T), True, "matmul"
        )
    return [replace(kind, count=counts[key]) for key, kind in found.items()]


def unknown_layers(model: Any) -> list[str]:
    """Return the layers whose products the probe cannot try, as ``name (type)``: what holds a matrix of another kind.

    Embeddings are looked up row by row and norms hold vectors: neither sums over a dimension that depends on M.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    known = (LinearBase, VocabParallelEmbedding, torch.nn.Embedding)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, known) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]


def probe_linear_layers(kinds: list[LayerKind], rows: list[int], environment: dict[str, Any]) -> InvarianceMap:
    """Return the map of every kind of linear layer.

    Parameters
    ----------
    kinds
        The model's (:func:`layer_kinds`).
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
        labels = _labels(kind, kind.wanted(rows)[::-1])
        layers.append(LayerClasses(kind.name, kind.shape, kind.count, labels, kind.head, kind.describe()))
    _free_memory(kinds)
    return InvarianceMap(layers, environment, time.perf_counter() - start)


def spot_check(kinds: list[LayerKind], found: InvarianceMap, rng: random.Random | None = None) -> dict[str, list[int]]:
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
        disagree = layer.disagreements(_labels(kind, layer.spot_rows(rng), share))
        if disagree:
            wrong[kind.name] = disagree
    _free_memory(kinds)
    return wrong


def _free_memory(kinds: list[LayerKind]) -> None:
    """Give the probe's memory back to the GPU: what comes next (graph capture) cannot take it out of torch's cache."""
    if any(kind.weight.is_cuda for kind in kinds):
        torch.cuda.empty_cache()


def _method(module: Any) -> Apply:
    return lambda x, bias: module.quant_method.apply(module, x, bias)


def _labels(kind: LayerKind, rows: list[int], seconds: float = float("inf")) -> dict[int, int | None]:
    """Return the class of each M, numbered from the smallest M; the last of ``rows`` are left out when the time is up."""
    end = time.perf_counter() + seconds
    with torch.no_grad(), _lent_weight(kind.weight) as probe:
        # A generator of its own: the server's random numbers must not depend on what was probed.
        generator = torch.Generator(probe.device).manual_seed(6)
        companions = torch.randn(max(rows), len(probe), generator=generator, device=probe.device).to(probe.dtype)
        everywhere = probe.expand(len(companions), -1).contiguous()
        bias = None if kind.bias is None else torch.zeros_like(kind.bias)
        digests = torch.zeros(len(rows), 4, dtype=torch.int64, device=probe.device)
        done: list[int] = []
        for m in rows:
            if len(done) >= 2 and time.perf_counter() > end:
                break
            x = companions[:m].clone()
            x[0] = x[m - 1] = probe
            digests[len(done), :2] = row_digest(kind.apply(x, bias)[[0, m - 1]])
            found = row_digest(kind.apply(everywhere[:m], bias))
            digests[len(done), 2:] = torch.stack([found.min(), found.max()])
            done.append(m)
    seen: dict[int, int] = {}
    return {
        m: seen.setdefault(each[0], len(seen)) if len(set(each)) == 1 else None
        for m, each in sorted(zip(done, digests.tolist()))
    }


@contextmanager
def _lent_weight(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Put the probe's values in the place of a weight's; give the input row whose products cancel.

    The storage is another one meanwhile, of the same shape, dtype and strides.
    """
    generator = torch.Generator().manual_seed(3)
    outputs, inputs = weight.shape
    half = inputs // 2

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(weight.device, weight.dtype)

    order = torch.randperm(2 * half, generator=generator).to(weight.device)
    base, signal = draw(min(BASE_ROWS, outputs), half), draw(half)
    row = torch.zeros(inputs, dtype=weight.dtype, device=weight.device)
    row[: 2 * half] = torch.cat([signal, signal])[order]
    lent = torch.zeros_like(base[:, :1]).repeat(1, inputs)
    lent[:, : 2 * half] = torch.cat([base, -base], dim=1)[:, order]
    own = weight.data
    weight.data = torch.empty_like(own).copy_(lent.repeat(-(-outputs // len(lent)), 1)[:outputs])
    try:
        yield row
    finally:
        weight.data = own
