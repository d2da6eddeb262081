"""The kind of layer that is a bank of fused experts: the same row among companions that go elsewhere, or all its way.

What a row of such a layer becomes may depend on how many rows go to its experts, and that depends on its companions: no
padding can fix it. So each number of rows M is tried with companions that

* are routed at random,
* all go to the probed row's experts (the largest counts),
* all go to other experts (each of the probed row's experts has one row),
* are the probed row itself, in every place.

Routing is part of what is put in, not of what is tried: the router is a linear layer of its own, and the choice of the
largest scores looks at one row.

Random numbers make a blind probe here too (canonical/linear_probe.py). So there are two passes: in one the weights of an expert's
first product are lent values whose products cancel, in the other those of the second, and the rounding that is left shows
any change of order. The outputs of the experts are lent factors so far apart, in pairs of both signs, that the order in which
they are added shows as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from margingate_kernels import row_digest

from sglang_margingate.canonical.layer_probe import DENSE
from sglang_margingate.canonical.linear_probe import lent_values

PERIOD = 128
"""Different intermediate values of the lent weights; they repeat after that."""

FACTOR_BITS = 6
"""Binary orders of magnitude between one pair of experts and the next: four pairs are farther apart than fp32 holds."""

SPREAD = 6
"""The lent values lie within as many binary orders of magnitude of 1, so that hardly any sum of their products is exact."""

PRODUCTS = ("up", "down")

TRIALS = 5
"""Digests of one number of rows."""

COARSE = 64
"""Beyond DENSE rows only multiples of this are probed, with fewer trials: prefills are padded to them, and less is compiled."""

Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Rows [M, hidden], weights [M, k] and experts [M, k] of their routing to outputs [M, hidden], as the server computes them."""


@dataclass(frozen=True)
class ExpertKind:
    """One bank of fused experts that stands for all of its shape and method, and how to run it.

    Parameters
    ----------
    name
        The layer's name in the model.
    up, down
        [experts, 2 * inner, hidden] and [experts, hidden, inner]: gate and up projection of all experts, and their way back.
    top_k
        Experts of each row.
    apply
        Runs them. It may overwrite its rows.
    method
        What the server computes it with, configurations included.
    count
        Banks of this kind in the model.
    """

    name: str
    up: torch.Tensor
    down: torch.Tensor
    top_k: int
    apply: Apply
    method: str = ""
    count: int = 1
    head: bool = False

    @property
    def coarse(self) -> int:
        """What numbers of rows beyond DENSE must be a multiple of."""
        return COARSE

    @property
    def shape(self) -> tuple[int, int]:
        """(output features of an expert's first product, input features)."""
        return self.up.shape[1], self.up.shape[2]

    def describe(self) -> str:
        """Return in words what chooses its kernels beside the shape; part of a kept map's key."""
        dtype = str(self.up.dtype).removeprefix("torch.")
        return f"{dtype}, {self.method}, {self.top_k} of {self.up.shape[0]} experts"

    def digests(self, rows: list[int], seconds: float = float("inf")) -> dict[int, list[int]]:
        """Run the bank at each M; return the digests of the probed row in each of the trials."""
        done, found = self._pass("up", rows, seconds / 2)
        again, more = self._pass("down", done, seconds / 2)
        return {m: _joined(found[m], more[m]) for m in again}

    def bits_of(self, settings: Sequence[Callable[[], None]], rows: Sequence[int]) -> list[int | None]:
        """Run the bank with each of several settings; return what the probed row became, None where not always the same.

        Parameters
        ----------
        settings
            Each is called once before the bank runs with it.
        rows
            Values of M.
        """
        found: list[list[list[int]]] = []
        for product in PRODUCTS:
            with self._trials(product, max(rows)) as run:
                each = []
                for settle in settings:
                    settle()
                    each.append([digest for m in rows for digest in run(m).tolist()])
                found.append(each)
        joined = [set(_joined(*both)) for both in zip(*found)]
        return [each.pop() if len(each) == 1 else None for each in joined]

    def _pass(self, product: str, rows: list[int], seconds: float) -> tuple[list[int], dict[int, list[int]]]:
        """Run the bank at each M with one of its products cancelling; return the M that were run, and the digests."""
        end = time.perf_counter() + seconds
        done: list[int] = []
        with self._trials(product, max(rows)) as run:
            digests = torch.zeros(len(rows), TRIALS, dtype=torch.int64, device=self.up.device)
            for m in rows:
                if len(done) >= 2 and time.perf_counter() > end:
                    break
                digests[len(done)] = run(m)
                done.append(m)
        return done, dict(zip(done, digests.tolist()))

    @contextmanager
    def _trials(self, product: str, most: int) -> Iterator[Callable[[int], torch.Tensor]]:
        """Lend the weights; give what runs all trials at one M of up to ``most`` and returns their digests."""
        experts, device = self.up.shape[0], self.up.device
        # A generator of its own: the server's random numbers must not depend on what was probed.
        generator = torch.Generator(device).manual_seed(8)
        with torch.no_grad(), lent_experts(self.up, self.down, product) as probe:
            companions = torch.randn(most, len(probe), generator=generator, device=device).to(probe.dtype)
            scores = torch.rand(most, experts, generator=generator, device=device)
            own = chosen_experts(self.top_k, device)
            anywhere = scores.topk(self.top_k, dim=1).indices.to(torch.int32)
            scores[:, own.long()] = -1.0  # last, where there are others
            elsewhere = scores.topk(self.top_k, dim=1).indices.to(torch.int32)

            def run(m: int) -> torch.Tensor:
                found = [self._one(probe, companions, own, anywhere[:m], m - 1)]
                if m <= DENSE:
                    found.append(self._one(probe, companions, own, own.expand(m, -1), m // 2))
                    found.append(self._one(probe, companions, own, elsewhere[:m], 0))
                else:
                    found += found * 2
                # A copy: one row that is expanded to one is the row itself, and a bank may write over what it is given.
                same = row_digest(self._run(probe.repeat(m, 1), own.repeat(m, 1)))
                return torch.stack([*found, same.min(), same.max()])

            yield run

    def _one(
        self, probe: torch.Tensor, companions: torch.Tensor, own: torch.Tensor, routing: torch.Tensor, place: int
    ) -> torch.Tensor:
        """Run the probed row at ``place`` among companions with this routing; return its digest."""
        x, experts = companions[: len(routing)].clone(), routing.clone()
        x[place], experts[place] = probe, own
        return row_digest(self._run(x, experts)[place : place + 1])[0]

    def _run(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        # Equal weights: the probed row's experts must cancel in pairs.
        weights = torch.full(experts.shape, 1.0 / self.top_k, dtype=torch.float32, device=x.device)
        return self.apply(x, weights, experts)


def _joined(up: list[int], down: list[int]) -> list[int]:
    """Return one number for what both passes gave in each trial."""
    return [a * 31 + b for a, b in zip(up, down)]


def chosen_experts(top_k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the probed row's experts, int32 [top_k]: the first ones, one of each pair before the others."""
    return torch.cat([torch.arange(0, top_k, 2), torch.arange(1, top_k, 2)]).to(device, torch.int32)


@contextmanager
def lent_experts(up: torch.Tensor, down: torch.Tensor, product: str) -> Iterator[torch.Tensor]:
    """Put the probe's values in the place of a bank's weights; give the probed row.

    All experts are one, but for a factor of their second product (:func:`_factor`).

    Parameters
    ----------
    up, down
        The bank's weights.
    product
        ``up`` or ``down``: whose products cancel. Those of the other are plain random numbers.
    """
    generator = torch.Generator().manual_seed(9)
    experts, both, hidden = up.shape
    inner = both // 2
    kinds = (torch.arange(inner) % min(PERIOD, max(1, inner // 2)))[torch.randperm(inner, generator=generator)]
    row, first = _cancelling(hidden, 2 * inner, generator)
    if product == "down":
        # A column's intermediate value is that of its kind, so that columns of one kind can cancel.
        row, first = torch.randn(hidden, generator=generator), torch.randn(2, inner, hidden, generator=generator)
        first = (first[:, kinds] / hidden**0.5).flatten(0, 1)
        second = torch.zeros(hidden, inner)
        for kind in kinds.unique():
            columns = (kinds == kind).nonzero()[:, 0]
            pairs = len(columns) // 2
            second[:, columns[:pairs]] = _spread(hidden, pairs, generator=generator)
            second[:, columns[pairs : 2 * pairs]] = -second[:, columns[:pairs]]
    else:
        second = torch.randn(hidden, inner, generator=generator)
    factors = torch.tensor([_factor(e) if product == "up" else 1.0 for e in range(experts)])
    with ExitStack() as stack:
        stack.enter_context(lent_values(up, first[None]))
        stack.enter_context(lent_values(down, second[None], factors[:, None, None]))
        yield row.to(up.device, up.dtype)


def _spread(*size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator) * 2.0 ** torch.randint(-SPREAD, SPREAD, size, generator=generator)


def _cancelling(inputs: int, outputs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a row and weights, [outputs, inputs], in whose products every term appears once with each sign."""
    half = inputs // 2
    order = torch.randperm(2 * half, generator=generator)
    signal, base = _spread(half, generator=generator), _spread(min(2 * PERIOD, outputs), half, generator=generator)
    row, weights = torch.zeros(inputs), torch.zeros(len(base), inputs)
    row[: 2 * half] = torch.cat([signal, signal])[order]
    weights[:, : 2 * half] = torch.cat([base, -base], dim=1)[:, order]
    return row, weights.repeat(-(-outputs // len(weights)), 1)[:outputs]


def _factor(expert: int) -> float:
    """Return an expert's factor: large powers of two, in pairs of both signs that take bits from the first pair's sum."""
    pair = expert // 2 % 4
    return (-1.0 if expert % 2 and pair else 1.0) * 2.0 ** (FACTOR_BITS * pair)
