"""The kind of layer that is a product with a weight: how its sums are made to show any change of order.

Every kind (shape, dtype, method, bias) is run twice per M: with the probed row first and last among random companions,
and with the probed row in every place, since a kernel may sum some of its tiles in another order than others. Only 64-bit
digests of output rows are compared.

Random numbers make a blind probe: bf16 rounds away most differences between two orders of summation (with 256 inputs,
about one output in 4,000 shows one). So each layer's weight is lent other values while it is probed: every product
appears once with each sign, in random order. The exact sums are 0, and what comes out is nothing but rounding, which
shows any change of order, tile or split. The kernel that is chosen depends on shapes, not on values.

Weights of 8 bits are lent numbers of 8 bits, scales of 1, and a row whose groups of inputs all have one scale: its values are
quantised to what they were, and the products still cancel. Such a row cannot show that activations are *quantised* otherwise at
another M, so an ordinary one is run as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from margingate_kernels import row_digest

BASE_ROWS = 256
"""Different output rows of the lent weight; they repeat after that."""

GROUP = 128
"""Inputs that share a scale where activations are quantised in groups; the whole row is such a group otherwise."""

LARGER = 8
"""How many times larger, or smaller, the companions of an ordinary row are where scales are taken from what comes in."""

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
FP8_UNIT = 2.0**-8
"""The probed row's scale: a power of two, so that bf16 holds its values."""

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
    scales: tuple[tuple[torch.Tensor, float], ...] = ()
    """Scales of a quantised layer, of any shape, each with the one number that it is lent."""
    inputs_first: bool = False
    """The weight is stored as [inputs, outputs]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features)."""
        first, second = self.weight.shape
        return (second, first) if self.inputs_first else (first, second)

    def describe(self) -> str:
        """Return in words what chooses its kernel beside the shape; part of a kept map's key."""
        dtype = str(self.weight.dtype).removeprefix("torch.")
        return f"{dtype}, {self.method}, {'no bias' if self.bias is None else 'bias'}"

    def digests(self, rows: list[int], seconds: float = float("inf")) -> dict[int, list[int]]:
        """Run the layer at each M; return the digests of the probed row: first, last, and the extremes of all places."""
        end = time.perf_counter() + seconds
        with torch.no_grad(), _lent_weight(self.weight, self.scales, self.inputs_first) as probe:
            # A generator of its own: the server's random numbers must not depend on what was probed.
            generator = torch.Generator(probe.device).manual_seed(6)
            companions = torch.randn(max(rows), len(probe), generator=generator, device=probe.device).to(probe.dtype)
            everywhere = probe.expand(len(companions), -1).contiguous()
            bias = None if self.bias is None else torch.zeros_like(self.bias)
            digests = torch.zeros(len(rows), 4, dtype=torch.int64, device=probe.device)
            plain = torch.zeros(len(rows), 2, dtype=torch.int64, device=probe.device)
            ordinary = torch.randn(len(probe), generator=generator, device=probe.device).to(probe.dtype)
            done: list[int] = []
            for m in rows:
                if len(done) >= 2 and time.perf_counter() > end:
                    break
                at = len(done)
                digests[at, :2] = self._ends(companions[:m].clone(), probe, bias)
                found = row_digest(self.apply(everywhere[:m], bias))
                digests[at, 2:] = torch.stack([found.min(), found.max()])
                if self.scales:  # among larger companions and among smaller ones: a scale that they share would show
                    plain[at, 0] = self._ends(companions[:m] * LARGER, ordinary, bias)[0]
                    plain[at, 1] = self._ends(companions[:m] / LARGER, ordinary, bias)[1]
                done.append(m)
        return {
            m: [a * 31 + b for a, b in zip(found, ends * 2)]
            for m, found, ends in zip(done, digests.tolist(), plain.tolist())
        }

    def _ends(self, x: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Run the layer with a row first and last among its companions; return both digests."""
        x[0] = x[-1] = row
        return row_digest(self.apply(x, bias)[[0, len(x) - 1]])


@contextmanager
def _lent_weight(
    weight: torch.Tensor, scales: Sequence[tuple[torch.Tensor, float]], inputs_first: bool
) -> Iterator[torch.Tensor]:
    """Put the probe's values in the place of a weight's; give the input row whose products cancel.

    The storage is another one meanwhile, of the same shape, dtype and strides.
    """
    generator = torch.Generator().manual_seed(3)
    small = weight.dtype == FP8
    outputs, inputs = reversed(weight.shape) if inputs_first else weight.shape
    half = inputs // 2

    def draw(*size: int) -> torch.Tensor:
        values = torch.randn(size, generator=generator)
        return (values * 16).to(FP8).float() if small else values.to(weight.device, weight.dtype)

    order = torch.randperm(2 * half, generator=generator).to("cpu" if small else weight.device)
    base, signal = draw(min(BASE_ROWS, outputs), half), draw(half)
    if small:
        signal[order[::GROUP] % half] = FP8_MOST  # one in every group
    row = torch.zeros(inputs, dtype=base.dtype, device=base.device)
    row[: 2 * half] = torch.cat([signal, signal])[order]
    lent = torch.zeros_like(base[:, :1]).repeat(1, inputs)
    lent[:, : 2 * half] = torch.cat([base, -base], dim=1)[:, order]
    lent = lent.repeat(-(-outputs // len(lent)), 1)[:outputs]
    with ExitStack() as stack:
        stack.enter_context(lent_values(weight, lent.t() if inputs_first else lent))
        for scale, value in scales:
            stack.enter_context(lent_values(scale, torch.tensor(value)))
        yield (row * FP8_UNIT).to(weight.device, torch.bfloat16) if small else row


@contextmanager
def lent_values(weight: torch.Tensor, values: torch.Tensor, factors: torch.Tensor | None = None) -> Iterator[None]:
    """Put other values in the place of a tensor's, in storage of its own of the same shape, dtype and strides.

    Parameters
    ----------
    weight
        The tensor, of any dtype.
    values, factors
        What it holds meanwhile, their product where both are given; any shape that broadcasts.
    """
    own = weight.data
    lent = torch.empty_like(own).copy_(values.to(own.device).to(own.dtype))
    if factors is not None:
        lent.mul_(factors.to(own.device).to(own.dtype))
    weight.data = lent
    try:
        yield
    finally:
        weight.data = own
