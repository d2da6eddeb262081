"""The trial of prefill graphs: a size at which a graph gives other bits than eager forwards is named and not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from fake_engine import FakeEngine

from sglang_margingate.canonical.engine import Extend
from sglang_margingate.canonical.prefill_graph_probe import PREFIX, drop_slow, try_prefill_graphs
from sglang_margingate.canonical.ranks import Ranks

SIZES = (24, 40, 64)


class GraphEngine(FakeEngine):
    """Replays prefills that fit a size, with what a test lets a size do wrong."""

    def __init__(self, sizes: tuple[int, ...] = SIZES, **wrong: int) -> None:
        super().__init__(tokens=PREFIX + 60)
        self._sizes, self.wrong, self.on, self.replays = list(sizes), wrong, True, 0
        self.replayed: list[tuple[int, int]] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._sizes)

    @contextmanager
    def off(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def drop(self, size: int) -> None:
        self._sizes.remove(size)

    def extend(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        rows = sum(p.end - p.start for p in parts)
        size = min((s for s in self._sizes if s >= rows), default=None)
        if not self.on or size is None or size == self.wrong.get("refuses"):
            return super().extend(parts, tokens)
        self.replays += 1
        self.replayed.append((size, rows))
        if size == self.wrong.get("writes_nothing"):
            before = self.pool.clone()
            out = super().extend(parts, tokens)
            self.pool.copy_(before)
            return out
        self.extend_leak = lambda p: float(
            size == self.wrong.get("leaks") or (size == self.wrong.get("leaks_behind") and p[0].start > 0)
        )
        out = super().extend(parts, tokens)
        self.extend_leak = lambda _: 0.0
        return out


def tried(**wrong: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    engine = GraphEngine(**wrong)
    table = engine.table.clone()
    notes = try_prefill_graphs(engine, engine)
    assert engine.table.equal(table)
    return notes, engine.sizes


def test_graphs_that_agree_are_all_used() -> None:
    engine = GraphEngine()
    assert try_prefill_graphs(engine, engine) == ()
    assert engine.replayed == [(24, 24), (24, 16), (40, 40), (40, 25), (64, 64), (64, 41)], (
        "full, and just above the last"
    )


def test_a_size_with_other_bits_is_named_and_not_used() -> None:
    for wrong, says in (
        ("leaks", "whole prompts have other bits in it"),
        ("leaks_behind", "prompts behind cached columns have other bits in it"),
        ("writes_nothing", "whole prompts have other bits in it"),
        ("refuses", "whole prompts of 40 tokens did not run in it"),
    ):
        assert tried(**{wrong: 40}) == ((f"the prefill graph of 40 tokens is not used: {says}",), (24, 64)), wrong


def test_what_cannot_be_tried_is_not_used() -> None:
    small = GraphEngine()
    small.capacity = 4 * 16
    notes = try_prefill_graphs(small, small)
    assert small.sizes == (24, 40)
    assert "not be tried" in notes[0]
    few = GraphEngine()
    few.table = few.table[:3]
    assert try_prefill_graphs(few, few) == ("prefill graphs are not used: 4 requests are needed to try them, of 3",)
    assert few.sizes == ()
    assert try_prefill_graphs(few, few) == (), "nothing is left to try"


class TimedGraphs:
    """Sizes with a time each."""

    def __init__(self, **ms: float) -> None:
        self.ms = {int(size[1:]): took for size, took in ms.items()}
        self.asked: list[int] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted(self.ms))

    def milliseconds(self, size: int) -> float:
        self.asked.append(size)
        busy = 100.0 if len(self.asked) <= len(self.ms) else 0.0  # somebody else's work, in the first round
        return self.ms[size] + busy * (size < 500)

    def drop(self, size: int) -> None:
        del self.ms[size]


def test_a_size_that_is_slower_than_a_larger_one_is_not_used() -> None:
    graphs = TimedGraphs(_192=9.0, _384=21.0, _448=23.0, _512=19.0, _640=22.5, _768=22.0)
    assert drop_slow(graphs, Ranks()) == {384: 21.0, 448: 23.0}
    assert graphs.sizes == (192, 512, 640, 768), "640 is as fast as can be told"
    assert graphs.asked == [192, 384, 448, 512, 640, 768] * 3, "in rounds"


def test_the_slowest_rank_decides_for_all() -> None:
    class Others(Ranks):
        def exchange(self, what: str, value: float, seconds: float | None = None) -> list[float]:
            return [value, 30.0 if "of 64 " in what else 1.0]

    graphs = TimedGraphs(_64=5.0, _128=6.0)
    assert drop_slow(graphs, Others()) == {64: 30.0}
    assert graphs.sizes == (128,)
