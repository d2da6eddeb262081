"""Numbers on their way to the host: whichever is read when, each forward reads its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_margingate.runtime import observe
from sglang_margingate.runtime.observe import COLUMNS, LEAST_ROWS, Landings, Numbers, Packed

CPU = torch.device("cpu")


def filled(landings: Landings, first: int, rows: int = 2) -> Packed:
    packed = Packed(landings, rows, CPU)
    for at, name in enumerate(COLUMNS):
        packed.column(name).copy_(torch.arange(rows) + first + 1000 * at)
    return packed


def expected(first: int, rows: int = 2) -> Numbers:
    return Numbers(*([first + 1000 * at + row for row in range(rows)] for at in range(len(COLUMNS))))


def test_every_column_has_its_field() -> None:
    assert tuple(COLUMNS) == Numbers._fields


@pytest.mark.parametrize("rows", [1, 2, LEAST_ROWS, LEAST_ROWS + 1, 300])
def test_all_columns_arrive_in_one_copy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    landings, chosen = Landings(False), torch.arange(rows) + 3000
    packed, copies = filled(landings, 0, rows), []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda into, *a, **k: copies.append(k) or copy(into, *a, **k))
    read = packed.send(chosen)
    assert [k for k in copies if k] == [{"non_blocking": True}]
    assert read() == expected(0, rows)


@pytest.mark.parametrize("value", [0.1, -2.5e-38, float("inf"), 3.4e38])
def test_a_margin_arrives_as_it_is(value: float) -> None:
    packed = filled(Landings(False), 0)
    packed.column("margin").fill_(value)
    assert packed.send()().margin == torch.full((2,), value).tolist()


def test_without_a_choice_the_best_token_was_chosen() -> None:
    numbers = filled(Landings(False), 5).send()()
    assert numbers.chosen == numbers.token == [5, 6]


def test_the_tokens_outlive_the_forward_that_made_them() -> None:
    """SGLang goes on with them, while later forwards are measured."""
    landings = Landings(False)
    packed = filled(landings, 5)
    tokens = packed.column("token")
    packed.send()()
    del packed
    for k in range(4):
        filled(landings, 100 * k).send()()
    assert tokens.tolist() == [5, 6]


class Device:
    """Copies to the host that arrive in their order, when the device comes to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        device = self

        class Late(observe._Landing):
            def __init__(self, room: int, pinned: bool) -> None:
                super().__init__(room, pinned)
                memory: Any = self.tensor
                self.tensor: Any = type(
                    "", (), {"copy_": lambda _, source, **__: device.queue.append((memory, source))}
                )()

        monkeypatch.setattr(observe, "_Landing", Late)

    def until(self, left: int) -> None:
        while len(self.queue) > left:
            into, source = self.queue.popleft()
            into.copy_(source)


@given(moves=st.lists(st.tuples(st.booleans(), st.sampled_from([1, 2, 70])), min_size=1, max_size=40))
def test_however_late_the_copies_each_forward_reads_its_own(moves: list[tuple[bool, int]]) -> None:
    """Overlap sends the next forward before the last is read; a retraction or an abort reads late or early."""
    with pytest.MonkeyPatch.context() as patch:
        device, landings = Device(patch), Landings(False)
        waiting: deque[tuple[int, int, Callable[[], Numbers]]] = deque()
        most = 0

        def read_oldest() -> None:
            first, rows, read = waiting.popleft()
            device.until(len(waiting))  # as waiting for the forward's mark does
            assert read() == expected(first, rows)

        for number, (sends, rows) in enumerate(moves):
            if sends:
                first = 10 * number
                packed = filled(landings, first, rows)
                waiting.append((first, rows, packed.send(packed.column("chosen").clone())))
                most = max(most, len(waiting))
            elif waiting:
                read_oldest()
        while waiting:
            read_oldest()
    assert landings.made <= 2 * most, "buffers are used again: at most two sizes were on their way"


def test_a_buffer_is_used_again_once_it_was_read() -> None:
    landings = Landings(False)
    for k in range(5):
        filled(landings, k).send()()
    assert landings.made == 1
    reads = [filled(landings, k).send(torch.tensor([k + 3000, k + 3001])) for k in range(3)]
    assert landings.made == 3
    assert [read() for read in reads] == [expected(k) for k in range(3)]
