"""The server's runners, played by a few lines of arithmetic whose bits leak where a test asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_margingate.canonical.engine import Extend

LeakExtend = Callable[[Sequence[Extend]], float]
LeakDecode = Callable[[int], float]


HELD = "SGLang's buffers hold one request fewer than its table has rows"


class FakeEngine:
    """An :class:`~sglang_margingate.canonical.engine.Engine` with one layer whose column is its token, position and leak.

    Parameters
    ----------
    extend_leak, decode_leak
        What the shape of a prefill or of a decode batch adds to every row of it.
    slot_leak
        Let a row depend on where its columns lie.
    around_leak
        Let a row depend on what else lies in the pool.
    score_leak
        What the shape of a prefill adds to the log-probabilities of its prompts.
    capacity, requests, tokens
        Size of the pool, and of the table.
    """

    device = "cpu"
    rows = 8
    vocab_size = 50

    def __init__(
        self,
        extend_leak: LeakExtend = lambda _: 0.0,
        decode_leak: LeakDecode = lambda _: 0.0,
        slot_leak: bool = False,
        around_leak: bool = False,
        capacity: int = 2000,
        requests: int = 40,
        tokens: int = 400,
        score_leak: LeakExtend = lambda _: 0.0,
    ) -> None:
        self.extend_leak, self.decode_leak, self.score_leak = extend_leak, decode_leak, score_leak
        self.slot_leak, self.around_leak = slot_leak, around_leak
        self.capacity = capacity
        self.table = torch.zeros(requests, tokens, dtype=torch.int32)
        self.pool = torch.zeros(capacity + 1, 2, dtype=torch.float64)
        self.model = torch.nn.Module()
        self.forwards: list[list[Extend]] = []
        self.kept_graphs: Sequence[int] | None = None

    def extend(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        assert len(parts) < len(self.table), HELD
        self.forwards.append(list(parts))
        leak = self.extend_leak(parts)
        for part in parts:
            for position in range(part.start, part.end):
                self._write(part.row, position, int(tokens[part.row, position]), leak)
        return torch.stack([self._logits(part.row, part.end, leak) for part in parts])

    def scores(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        self.extend(parts, tokens)
        leak = self.score_leak(parts)
        asking = [tokens[p.row, p.start + 1 : p.end + 1] + leak for p in parts if p.logprobs]
        return torch.cat(asking).double()

    def decode(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        assert len(tokens) < len(self.table), HELD
        return self._step(requests, positions, tokens, self.decode_leak(len(tokens)))

    def verify(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        assert len(tokens) <= self.rows
        return self._step(requests, positions, tokens, 0.0)

    def keep_graphs(self, sizes: Sequence[int]) -> None:
        self.kept_graphs = sizes

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        return [self.pool[slots.long()], self.pool[slots.long()] * 2]

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        self.pool[slots.long()] = columns[0]

    def agree(self, what: str, holds: bool) -> bool:
        return holds

    def _step(self, requests: list[int], positions: list[int], tokens: list[int], leak: float) -> torch.Tensor:
        for row in zip(requests, positions, tokens):
            self._write(*row, leak)
        return torch.stack([self._logits(row, at + 1, leak) for row, at in zip(requests, positions)])

    def _write(self, row: int, position: int, token: int, leak: float) -> None:
        self.pool[int(self.table[row, position])] = torch.tensor([token + leak, position], dtype=torch.float64)

    def _logits(self, row: int, end: int, leak: float) -> torch.Tensor:
        places = self.table[row, :end].long()
        if self.slot_leak:
            leak += float(places[-1])
        if self.around_leak:
            leak += float(self.pool.sum() - self.pool[places].sum())
        return self.pool[places].sum(0) + leak
