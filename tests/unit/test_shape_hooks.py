"""The hooks that keep forwards in their class, with SGLang's side played by hand: what is padded, and what is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_margingate.canonical.classes import Classes, DecodeGraphs, FastPath, Trial
from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
from sglang_margingate.runtime.view import SHAPE, ForwardShape
from sglang_margingate.serving import attention_hooks, shape_hooks
from sglang_margingate.serving.layers.padding import Running
from sglang_margingate.serving.shape_hooks import ChosenGraphs

SIZES = RowSizes((8, 16))
GRAPHS = DecodeGraphs(SIZES.sizes, {8: 8, 16: 16})
CLASSES = Classes(InvarianceMap([]), SIZES, SIZES, SIZES, 8)


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_hooks, "_classes", CLASSES)
    monkeypatch.setattr(shape_hooks, "_captured", ChosenGraphs())


@pytest.fixture
def forward() -> Iterator[Running]:
    one = Running(SIZES, SIZES, 5)
    with shape_hooks.running(one):
        yield one


def mode(decode: bool) -> Any:
    return SimpleNamespace(is_decode=lambda: decode, is_extend=lambda: not decode)


def loaded(rows: int, **more: Any) -> Any:
    """The eager runner's copy of a batch, on a device without data."""
    names = ("input_ids", "positions", "out_cache_loc")
    return SimpleNamespace(**{n: torch.zeros(rows, dtype=torch.int64, device="meta") for n in names}, **more)


def run(layers: Callable[[], Any], rows: int = 5, decode: bool = True, device: str = "cpu") -> ForwardShape:
    """Run one forward that calls ``layers``, as the eager runner would; return what its batch says of it."""
    batch = SimpleNamespace(forward_mode=mode(decode), input_ids=torch.zeros(rows, device=device), batch_size=rows)
    shape_hooks.run_eagerly(lambda _runner, _batch: layers(), None, batch)
    found: ForwardShape = getattr(batch, SHAPE)
    return found


def linear(rows: int | tuple[int, ...], seen: list[int] | None = None) -> torch.Tensor:
    x = torch.ones(*([rows] if isinstance(rows, int) else rows), 4)

    def original(_method: Any, _layer: Any, given: torch.Tensor) -> torch.Tensor:
        if seen is not None:
            seen.append(len(given))
        return given * 2

    out: torch.Tensor = shape_hooks.linear(original, None, None, x)
    assert torch.equal(out, x * 2)
    return out


# ---- a prefill on a GPU is padded as a whole ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "padded"), [(5, 8), (8, 8), (9, 16), (17, 17)])
def test_a_prefill_is_padded_once_to_a_size_of_its_class(forward: Running, rows: int, padded: int) -> None:
    one = loaded(rows)
    shape_hooks.pad_forward(one, None, SimpleNamespace(forward_mode=mode(False)))
    assert {len(one.input_ids), len(one.positions), len(one.out_cache_loc)} == {padded}


def test_what_cannot_be_padded_as_a_whole_is_left_to_the_layers(forward: Running) -> None:
    for one, batch in (
        (loaded(5, mrope_positions=torch.zeros(3, 5)), SimpleNamespace(forward_mode=mode(False))),
        (loaded(5), SimpleNamespace(forward_mode=mode(True))),
    ):
        shape_hooks.pad_forward(one, None, batch)
        assert len(one.input_ids) == 5


def test_a_forward_that_is_not_ours_is_not_padded() -> None:
    one = loaded(5)  # a graph's warm-up
    shape_hooks.pad_forward(one, None, SimpleNamespace(forward_mode=mode(False)))
    assert len(one.input_ids) == 5
    seen: list[int] = []
    linear(5, seen)
    assert seen == [5]


# ---- what a forward did is noted by its layers --------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [True, False])
def test_a_forward_inside_its_class_says_how_many_rows_its_layers_saw(decode: bool) -> None:
    seen: list[int] = []
    assert run(lambda: (linear(5, seen), linear(5, seen)), decode=decode) == ForwardShape(5, 8, True)
    assert seen == [8, 8]


def test_a_layer_with_a_shape_that_is_never_padded_takes_its_forward_out_of_the_class() -> None:
    assert run(lambda: (linear(5), linear((5, 3)))) == ForwardShape(5, 8, False)
    assert run(lambda: linear(5)).in_class, "and only that forward"


def test_a_layer_with_more_rows_than_any_size_takes_its_forward_out_of_the_class() -> None:
    """Also where the batch itself would have fitted."""
    assert run(lambda: (linear(5), linear(17))) == ForwardShape(5, 17, False)


def test_a_forward_of_which_nothing_was_seen_claims_nothing() -> None:
    assert run(lambda: None) == ForwardShape(5, None, False)


def test_on_a_gpu_a_decode_without_a_graph_is_outside() -> None:
    assert run(lambda: linear(5), device="meta") == ForwardShape(5, 8, False)
    assert run(lambda: linear(5), decode=False, device="meta").in_class


def test_a_forward_that_fails_leaves_nothing_running() -> None:
    batch = SimpleNamespace(forward_mode=mode(True), input_ids=torch.zeros(5))
    with pytest.raises(ZeroDivisionError):
        shape_hooks.run_eagerly(lambda *_: 1 / 0, None, batch)
    assert shape_hooks._running is None
    assert not getattr(batch, SHAPE).in_class


# ---- the layer that makes logits ---------------------------------------------------------------------------------------


def head(rows: int, weight: torch.Tensor, seen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits through the hook, and the hidden rows that they were made of."""
    hidden = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()

    def original(_processor: Any, given: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        seen.append(len(given))
        return torch.matmul(given, lm_head.T)

    out: torch.Tensor = shape_hooks.head(original, None, hidden, weight)
    return out, hidden


@pytest.mark.parametrize(
    ("rows", "blocks"),
    [(1, [8]), (8, [8]), (9, [16]), (16, [16]), (17, [16, 8]), (32, [16, 16]), (41, [16, 16, 16]), (1501, [16] * 94)],
)
def test_the_head_runs_in_blocks_of_probed_sizes_only(forward: Running, rows: int, blocks: list[int]) -> None:
    forward.ran(8)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen: list[int] = []
    out, hidden = head(rows, weight, seen)
    assert seen == blocks
    assert out.shape == (rows, 24)
    torch.testing.assert_close(out, hidden @ weight.T)
    assert forward.shape().in_class
    assert forward.shape().padded == 8, "the head's rows are not the linear layers'"


def test_what_a_neighbour_asks_for_does_not_choose_the_kernel_of_another_rows_token(forward: Running) -> None:
    """A head that sums in another order from 17 rows on, as libraries do."""
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).bfloat16()

    def original(_processor: Any, given: torch.Tensor) -> torch.Tensor:
        products = given[:, None].float() * weight.float()
        # Row by row, so that the library's own classes stay out of this test.
        if len(given) <= 16:
            return torch.stack([row.sum(-1) for row in products])
        return torch.stack([row[:, :20].sum(-1) + row[:, 20:].sum(-1) for row in products])

    alone = shape_hooks.head(original, None, hidden[39:])
    assert not torch.equal(original(None, hidden)[39:], alone), "the test's head would show it"
    assert torch.equal(shape_hooks.head(original, None, hidden)[39:], alone)


@pytest.mark.parametrize("sizes", [SIZES, RowSizes()])
def test_a_head_of_no_class_takes_its_forward_out_of_the_class(sizes: RowSizes) -> None:
    forward, seen = Running(SIZES, sizes, 5), []
    forward.ran(8)
    with shape_hooks.running(forward):
        head(3, torch.ones(4, 4).bfloat16(), seen)
    assert forward.shape().in_class is bool(sizes.sizes)
    assert seen == ([8] if sizes.sizes else [3])


def test_a_head_of_another_shape_takes_its_forward_out_of_the_class(forward: Running) -> None:
    forward.ran(8)
    hidden = torch.ones(2, 3, 4)
    assert torch.equal(shape_hooks.head(lambda _processor, given: given * 2, None, hidden), hidden * 2)
    assert not forward.shape().in_class


def test_a_batch_of_more_requests_than_the_head_was_probed_for_stays_in_class() -> None:
    """By what was run, not by the number of requests."""
    seen: list[int] = []
    weight = torch.ones(4, 4).bfloat16()
    assert run(lambda: (linear(12), head(40, weight, seen)), rows=12, decode=False) == ForwardShape(12, 16, True)
    assert seen == [16, 16, 8]


# ---- decode graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "most", "captured"),
    [
        ([1, 2, 4, 8, 12, 16], 100, [8, 16]),
        ([1, 8, 16, 24, 32], 100, [8, 16, 24, 32]),  # beyond the class a graph is still faster than none
        ([1, 8, 12], 14, [8, 12]),  # 16 rows do not fit the table of requests, 12 do
        ([20, 40], 100, [20, 40]),  # nothing inside: left as it was
    ],
)
def test_decode_graphs_are_captured_inside_the_class_and_beyond_it(
    monkeypatch: pytest.MonkeyPatch, wanted: list[int], most: int, captured: list[int]
) -> None:
    made_for: list[int] = []
    monkeypatch.setattr(shape_hooks, "_config", object)
    monkeypatch.setattr(shape_hooks, "_attended", True)
    monkeypatch.setattr(attention_hooks, "prepare", lambda _runner, rows: made_for.append(rows) or "ours")
    decode = SimpleNamespace(backend="full", bs=wanted)
    runner = SimpleNamespace(
        is_draft_worker=False, device="cuda", server_args=SimpleNamespace(cuda_graph_config=SimpleNamespace(decode=decode)),
        req_to_token_pool=SimpleNamespace(size=most),
    )  # fmt: skip
    shape_hooks.choose_shapes(runner)
    assert decode.bs == captured
    inside = min(wanted) <= max(SIZES.sizes)
    assert made_for == ([max(captured)] if inside else []), "the kernel holds every graph's rows"
    assert bool(shape_hooks.captured().notes) is not inside
    assert shape_hooks.captured().inside == tuple(size for size in captured if size in SIZES.sizes)
    graphs = DecodeGraphs(tuple(captured), {size: size for size in shape_hooks.captured().inside})
    fast = FastPath(CLASSES, Trial(graphs, decode_ok=True))
    assert fast.judged(graphs.shape(5, captured[0])) == ForwardShape(5, captured[0], inside)


def test_nothing_is_in_class_where_the_trial_failed() -> None:
    fast = FastPath(CLASSES, Trial(GRAPHS, decode_ok=False))
    assert GRAPHS.shape(5, 8).in_class
    assert fast.judged(GRAPHS.shape(5, 8)) == ForwardShape(5, 8, False)
