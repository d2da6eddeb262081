"""Tries a kind of prefill attention by itself, before it may serve: is it right, and do a token's bits depend on its context alone?

The trial end to end (path_probe.py) asks the same of whatever serves, on prompts of one length. Here a kernel is asked at lengths
around its blocks, with heads as the model has them, in some tens of milliseconds, so that a second kind is tried only where it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from margingate_kernels import prefill_attention_reference


class Attend(Protocol):
    """Prefill attention over paged K/V, as :class:`margingate_kernels.PrefillAttention`."""

    def plan(
        self, queries: torch.Tensor, columns: torch.Tensor, most_tokens: int, ends: torch.Tensor | None = None
    ) -> None:
        """Note the requests of the next calls."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention's output."""


Make = Callable[[int, int, int, torch.device | str], Attend]
"""Called with query heads, K/V heads, their size, and the device."""

Part = tuple[int, int]
"""Of a request in a forward: cached columns, new tokens."""

SMALL: tuple[Part, ...] = ((0, 70), (40, 1), (33, 20))
"""Requests that are compared with the reference."""

ASKED = ((17, 17), (129, 129), (700, 700), (2100, 2100), (5000, 300))
"""Prompts whose bits are compared: columns, and how many of the last tokens are asked for."""

OTHERS: tuple[Part, ...] = ((0, 33), (1500, 1), (200, 260), (3, 1))
"""Their companions."""

PADDING = 70
SLOTS = 12_000


def wrong(make: Make, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return how a kind of attention disagrees with its reference, or what it raises; None where it is right."""
    q_heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(6)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    new, columns = [n for _, n in SMALL], [sum(part) for part in SMALL]
    slots = torch.randperm(sum(columns), generator=generator).int().to(device)
    q, k, v = draw(sum(new), q_heads, dim), draw(sum(columns), kv_heads, dim), draw(sum(columns), kv_heads, dim)
    queries, context = _indptr(new, device), _indptr(columns, device)
    try:
        attend = make(*shape, device)
        attend.plan(queries, context, len(slots))
        got = attend(q, k, v, slots, dim**-0.5)
        want = prefill_attention_reference(q, k, v, queries, context, slots, dim**-0.5)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
    except Exception as error:  # a compiler's own errors share no class: too little shared memory, an unknown GPU
        return " ".join(str(error).split())[:300]
    return None


def changed(make: Make, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return what a token's bits depend on that is not its context, in words; None where it is nothing.

    Raises
    ------
    RuntimeError
        What the kernel raises, or the device has too little memory left.
    """
    trial = _Trial(make, shape, dtype, device)
    found: dict[str, list[int]] = {}
    for columns, asked in ASKED:
        first = columns - asked
        whole = trial.ask([(first, asked)], 0)
        for name, begin, rows in trial.otherwise(first, asked):
            if not torch.equal(rows.view(torch.int16), whole[begin - first :].view(torch.int16)):
                found.setdefault(name, []).append(columns)
    return "; ".join(f"{name} at {', '.join(map(str, at))} columns" for name, at in found.items()) or None


class _Trial:
    """One prompt, asked for again and again: its tokens are drawn once, and its columns lie in slots of a pool."""

    def __init__(self, make: Make, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self._make, self._shape, self._device = make, shape, device
        self._random = torch.Generator(device).manual_seed(7)
        longest = max(columns for columns, _ in ASKED)
        self._dtype = dtype
        self._q = self._draw(longest, shape[0], shape[2])
        self._pool = [self._draw(SLOTS, *shape[1:]) for _ in "kv"]
        self._slots = (torch.randperm(SLOTS // 2, device=device, generator=self._random)[:longest]).int()
        """In the first half of the pool; companions read all of it."""

    def ask(self, parts: Sequence[Part], at: int, padding: int = 0, moved: bool = False) -> torch.Tensor:
        """Run one forward; return the rows of request ``at``, which is the prompt, the others being anyone's.

        ``padding`` rows follow, and the columns are read through a table; ``moved``: they lie in other slots.
        """
        pool, slots = self._pool, self._slots
        if moved:
            pool = [torch.cat([x[: SLOTS // 2], x[: SLOTS // 2]]) for x in pool]
            slots = slots + SLOTS // 2
        cached, new = parts[at]
        first = sum(n for _, n in parts[:at])
        rows = sum(n for _, n in parts)
        q = self._draw(rows + padding, *self._q.shape[1:])
        q[first : first + new] = self._q[cached : cached + new]
        lists = [
            torch.randint(0, SLOTS, (sum(part),), generator=self._random, device=self._device).int() for part in parts
        ]
        lists[at] = slots[: cached + new]
        attend = self._make(*self._shape, self._device)
        queries = _indptr([n for _, n in parts], self._device)
        if padding:
            wide = max(map(sum, parts)) + 9
            table = torch.zeros(len(parts) + 1, wide, dtype=torch.int32, device=self._device)
            for row, own in enumerate(lists):
                table[row + 1, : len(own)] = own
            begins = torch.arange(wide, wide * len(parts) + 1, wide, dtype=torch.int32, device=self._device)
            lengths = torch.tensor([sum(part) for part in parts], dtype=torch.int32, device=self._device)
            attend.plan(queries, begins, len(q), begins + lengths)
            indices = table.view(-1)
        else:
            indices = torch.cat(lists)
            attend.plan(queries, _indptr([sum(part) for part in parts], self._device), len(indices))
        return attend(q, pool[0], pool[1], indices, self._shape[2] ** -0.5)[first : first + new].clone()

    def otherwise(self, first: int, asked: int) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yield the same tokens computed in other ways: how, the first of them, their rows."""
        last = first + asked
        cuts = sorted({first, first + asked // 3, last - 1, last})
        pieces = [self.ask([(a, b - a)], 0) for a, b in itertools.pairwise(cuts)]
        yield "chunks", first, torch.cat(pieces)
        yield "companions", first, self.ask([*OTHERS[:2], (first, asked), *OTHERS[2:]], 2)
        for prefix in (first + asked // 2, last - 1):
            yield "a cached prefix", prefix, self.ask([*OTHERS[:3], (prefix, last - prefix)], 3)
        yield "other slots", first, self.ask([(first, asked)], 0, moved=True)
        yield "a table, and padding", first, self.ask([OTHERS[3], (first, asked), (0, 0)], 1, padding=PADDING)

    def _draw(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._random, device=self._device, dtype=self._dtype)


def _indptr(lengths: Sequence[int], device: torch.device | str) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
