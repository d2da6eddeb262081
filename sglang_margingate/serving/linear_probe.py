"""Probes the linear layers of the loaded model: which numbers of rows M give a row the same bits on this machine.

Every kind of layer (shape, dtype, bias) is run once per M, with the probed row first and last among random companions,
and only 64-bit digests of its output row come back. A whole map of an 8B model takes about a second, so it is made at
every start: it cannot be stale, and a cached map of other hardware cannot be used by mistake.

Random numbers make a blind probe: bf16 rounds away most differences between two orders of summation (with 256 inputs,
about one output in 4,000 shows one). So each layer's weight is lent other values while it is probed: every product
appears once with each sign, in random order. The exact sums are 0, and what comes out is nothing but rounding, which
shows any change of order, tile or split. The kernel that is chosen depends on shapes, not on values.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from margingate_kernels import row_digest

from sglang_margingate.gate.invariance import InvarianceMap, LayerClasses

HEAD_LARGEST = 512
"""The head sees one row per request; more requests than this in a prefill count as outside the map."""

BASE_ROWS = 256
"""Different output rows of the lent weight; they repeat after that."""

Apply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class _Kind:
    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    apply: Apply
    head: bool


def probe_linear_layers(model: Any, rows: list[int], environment: dict[str, Any]) -> InvarianceMap:
    """Return the map of every kind of linear layer in ``model``.

    Parameters
    ----------
    model
        SGLang's model module.
    rows
        Values of M to probe, ascending.
    environment
        What the map is read on; kept in it.
    """
    start = time.perf_counter()
    layers = []
    for kind, count in _kinds(model):
        wanted = [m for m in rows if not kind.head or m <= HEAD_LARGEST]
        shape = (kind.weight.shape[0], kind.weight.shape[1])
        layers.append(LayerClasses(kind.name, shape, count, _labels(kind, wanted), kind.head))
    return InvarianceMap(layers, environment, time.perf_counter() - start)


def _kinds(model: Any) -> list[tuple[_Kind, int]]:
    """Return one layer of every kind, and how many there are."""
    from sglang.srt.layers.linear import LinearBase

    found: dict[Any, _Kind] = {}
    counts: Counter[Any] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        bias = getattr(module, "bias", None)
        key = (type(module.quant_method).__name__, tuple(module.weight.shape), module.weight.dtype, bias is not None)
        counts[key] += 1
        if key not in found:
            found[key] = _Kind(name, module.weight, bias, _method(module), False)
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "weight"):
        counts["head"] = 1
        found["head"] = _Kind("lm_head", head.weight, None, lambda x, _bias: torch.matmul(x, head.weight.T), True)
    return [(kind, counts[key]) for key, kind in found.items()]


def _method(module: Any) -> Apply:
    return lambda x, bias: module.quant_method.apply(module, x, bias)


def _labels(kind: _Kind, rows: list[int]) -> dict[int, int | None]:
    """Return the class of each M; classes are numbered as they appear."""
    with torch.no_grad(), _lent_weight(kind.weight) as probe:
        companions = torch.randn(max(rows), len(probe), device=probe.device).to(probe.dtype)
        bias = None if kind.bias is None else torch.zeros_like(kind.bias)
        digests = torch.zeros(len(rows), 2, dtype=torch.int64, device=probe.device)
        for k, m in enumerate(rows):
            x = companions[:m].clone()
            x[0] = x[m - 1] = probe
            digests[k] = row_digest(kind.apply(x, bias)[[0, m - 1]])
    seen: dict[int, int] = {}
    return {
        m: seen.setdefault(first, len(seen)) if first == last else None
        for m, (first, last) in zip(rows, digests.tolist())
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
