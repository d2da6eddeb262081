"""The kind of layer that is a product with a weight: how its sums are made to show any change of order.

Every kind (shape, dtype, method, bias) is run twice per M: with the probed row first and last among random companions,
and with the probed row in every place, since a kernel may sum some of its tiles in another order than others. Only 64-bit
digests of output rows are compared.

Random numbers make a blind probe: bf16 rounds away most differences between two orders of summation (with 256 inputs,
about one output in 4,000 shows one). So each layer's weight is lent other values while it is probed: every product
appears once with each sign, in random order. The exact sums are 0, and what comes out is nothing but rounding, which
shows any change of order, tile or split. The kernel that is chosen depends on shapes, not on values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from margingate_kernels import row_digest

BASE_ROWS = 256
"""Different output rows of the lent weight; they repeat after that."""

Apply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Rows and bias to products, as the server computes them."""


@dataclass(frozen=True)
class LinearKind:
    """One linear layer that stands for all of its shape, dtype, method and bias, and how to run it."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    apply: Apply
    head: bool
    method: str = ""
    """What the server computes it with."""
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

    def digests(self, rows: list[int], seconds: float = float("inf")) -> dict[int, list[int]]:
        """Run the layer at each M; return the digests of the probed row: first, last, and the extremes of all places."""
        end = time.perf_counter() + seconds
        with torch.no_grad(), _lent_weight(self.weight) as probe:
            # A generator of its own: the server's random numbers must not depend on what was probed.
            generator = torch.Generator(probe.device).manual_seed(6)
            companions = torch.randn(max(rows), len(probe), generator=generator, device=probe.device).to(probe.dtype)
            everywhere = probe.expand(len(companions), -1).contiguous()
            bias = None if self.bias is None else torch.zeros_like(self.bias)
            digests = torch.zeros(len(rows), 4, dtype=torch.int64, device=probe.device)
            done: list[int] = []
            for m in rows:
                if len(done) >= 2 and time.perf_counter() > end:
                    break
                x = companions[:m].clone()
                x[0] = x[m - 1] = probe
                digests[len(done), :2] = row_digest(self.apply(x, bias)[[0, m - 1]])
                found = row_digest(self.apply(everywhere[:m], bias))
                digests[len(done), 2:] = torch.stack([found.min(), found.max()])
                done.append(m)
        return dict(zip(done, digests.tolist()))


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
