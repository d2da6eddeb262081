"""Layers that are padded by themselves, in decode graphs and in prefills, with SGLang's side played by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_margingate.canonical.classes import Classes, DecodeGraphs, apart_in_prefills
from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses
from sglang_margingate.canonical.reduce_probe import ReduceProbe
from sglang_margingate.canonical.shape import ForwardShape
from sglang_margingate.serving import setup, shape_hooks
from sglang_margingate.serving.layers import decode_graphs, padding
from sglang_margingate.serving.shape_hooks import ChosenGraphs
from sglang_margingate.words import decode_sizes

DEFAULT = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64]
"""What SGLang captures for batches of up to 64."""
ROWS = range(1, 129)


SHAPES = {
    "qkv": (1792, 5120), "out": (5120, 1280), "up": (6912, 5120), "down": (5120, 3456), "lm_head": (38016, 5120),
}  # fmt: skip
"""Qwen2.5-14B over four GPUs."""


def layer(name: str, *first_of_class: int, count: int = 48, head: bool = False) -> LayerClasses:
    """A kind of layer whose k-th class begins at the k-th number."""
    found = {m: sum(first <= m for first in first_of_class) for m in ROWS}
    return LayerClasses(name, SHAPES[name], count, found, head, name)


QKV = layer("qkv", 1, 49)  # so it is on an H200
OUT, UP, DOWN, HEAD = layer("out", 1), layer("up", 1), layer("down", 1), layer("lm_head", 1, count=1, head=True)
SUM = ReduceProbe(4, 5120, dict.fromkeys(ROWS, 0), count=96).layer(torch.bfloat16)


def classes(*layers: LayerClasses) -> Classes:
    return Classes.of(InvarianceMap(list(layers)), 64, 64, [], apart=True)


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        ((QKV, OUT, UP, DOWN, SUM, HEAD), [1, 2, 4, 8, 12, 16, 24, 32, 40, 49, 56, 64]),  # 48 rows are one short of 49
        ((QKV, OUT, UP, DOWN, HEAD), [1, 2, 4, 8, 12, 16, 24, 32, 40, 49, 56, 64]),
        ((QKV, UP, HEAD), [1, 2, 4, 8, 12, 16, 24, 32, 40, 49, 56, 64]),
        ((OUT, UP, DOWN, SUM, HEAD), DEFAULT),
        # Two layers of each block that share a shape are one kind, and cost twice as much.
        ((layer("out", 1, 49, count=96), UP, DOWN, HEAD), [1, 2, 4, 8, 12, 16, 24, 32, 49, 56, 64]),
        ((layer("out", 1, 17), UP, DOWN, HEAD), [1, 2, 4, 8, 17, 24, 32, 40, 48, 56, 64]),  # 12 and 16 cost less at 17
        (
            (OUT, layer("up", 1, 17), DOWN, HEAD),
            [1, 17, 24, 32, 40, 48, 56, 64],
        ),  # most of the work, wherever padded
        # A sum over ranks that has another order below 49 rows cannot be padded by itself.
        ((QKV, OUT, ReduceProbe(4, 8, {m: m > 48 for m in ROWS}).layer(torch.bfloat16), HEAD), [49, 56, 64]),
    ],
)
def test_a_graph_has_the_rows_of_its_batch_where_that_costs_less(
    layers: tuple[LayerClasses, ...], sizes: list[int]
) -> None:
    assert classes(*layers).decode_graph_sizes(DEFAULT, 100) == sizes


def test_no_size_is_above_the_pool() -> None:
    """48 rows go to 49 where there are so many requests, and else the layer is padded by itself."""
    found = classes(QKV, OUT, UP, DOWN, SUM, HEAD)
    assert found.decode_graph_sizes([40, 48, 64], 48) == [40, 48]


def back_at(rows: int) -> list[LayerClasses]:
    """Layers of which one has its class of up to 32 rows again only from so many on."""
    out = {m: int(33 <= m < rows) for m in (*ROWS, 1024, 4096)}
    return [
        LayerClasses("up", SHAPES["up"], 48, dict.fromkeys(out, 0), kind="up"),
        LayerClasses("down", SHAPES["down"], 48, out, kind="down"),
        LayerClasses("lm_head", SHAPES["lm_head"], 1, dict.fromkeys(out, 0), head=True),
    ]


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("rows", [1024, 4096])
def test_no_layer_is_padded_far(rows: int, apart: bool) -> None:
    """Nor is the verify, which runs at a size of the whole forward."""
    found = Classes.of(InvarianceMap(back_at(rows)), 64, 64, [], apart=apart)
    assert found.decode.sizes[0] == 33
    assert found.verify_rows == 64
    assert max(found.decode_graph_sizes(DEFAULT, 100)) == 64


def test_what_no_size_of_the_whole_forward_holds_may_fit_layer_by_layer() -> None:
    """Two classes of which one ends where the other has a gap: nothing common from 60 rows on."""
    gap = LayerClasses("gap", (3, 8), 1, {m: int(60 <= m <= 100) for m in ROWS}, kind="gap")
    ends = LayerClasses("ends", (4, 8), 1, {m: int(m > 100) for m in ROWS}, kind="ends")
    found = InvarianceMap([gap, ends])
    decode = found.decode_class(32)
    assert decode.sizes == tuple(range(1, 60)), "the class of both"
    assert found.graph_size(decode, 60) == 60, "one layer at 101 rows costs less than a verify"
    assert found.graph_size(decode, 101) is None, "the other layer has no such rows in its class"


@pytest.mark.parametrize(
    ("invariance", "said"),
    [
        ({"graph_rows": {"1": 49, "8": 49, "64": 64}}, "up to 64 requests, single layers at up to 49 rows"),
        ({"graph_rows": {"17": 17, "64": 64}}, "up to 64 requests"),
        ({"graph_rows": {}, "decode_rows": "33-64"}, "at 33-64 rows"),  # on a CPU
        ({"decode_rows": "17-64"}, "at 17-64 rows"),  # a run from before
    ],
)
def test_what_decodes_in_class_is_said_in_words(invariance: dict[str, Any], said: str) -> None:
    assert decode_sizes(invariance) == said


@pytest.mark.parametrize(
    ("widest", "said"),
    [
        ({1: 49, 64: 64}, "1 row, some of its layers at up to 49"),
        ({1: 1, 64: 64}, "1 row"),
        ({17: 17, 64: 64}, "17 rows (at most about 2% of a step)"),
    ],
)
def test_the_log_says_how_a_batch_of_one_decodes(widest: dict[int, int], said: str) -> None:
    assert setup._first_graph(DecodeGraphs(tuple(widest), widest)) == said


# ---- prefills ------------------------------------------------------------------------------------------------------------

LONG = [*range(1, 65), *range(128, 8193, 64)]


def kind(name: str, shape: tuple[int, int], count: int, first: int, **more: Any) -> LayerClasses:
    """A kind of layer whose class of the largest prefill begins at ``first``."""
    return LayerClasses(name, shape, count, {m: int(m >= first) for m in LONG}, kind=name, **more)


ROUTER = kind("gate", (8, 4096), 32, 5056)  # Mixtral 8x7B on an H200
EXPERTS = kind("experts", (28672, 4096), 32, 1)
LONG_HEAD = LayerClasses("lm_head", (32000, 4096), 1, dict.fromkeys(range(1, 513), 0), head=True)


def test_a_small_product_whose_class_begins_late_does_not_widen_a_whole_prefill() -> None:
    found = InvarianceMap([kind("qkv", (6144, 4096), 32, 1), ROUTER, EXPERTS, LONG_HEAD])
    together = Classes.of(found, 64, 64, [])
    assert together.prefill.target(100) == 5056
    assert not together.apart
    assert not together.one()
    apart = Classes.of(found, 64, 64, [], apart=True)
    assert apart.apart == (1,)
    assert apart.prefill.target(100) == 128
    assert apart.own(decode=False)[1].target(128) == 5056
    assert not apart.one(), "the router of a decode has other bits"
    assert apart.own(decode=False) == together.own(decode=False), "either way each layer has the bits of one class"


@pytest.mark.parametrize(
    "layers",
    [
        (kind("qkv", (6144, 4096), 32, 1), EXPERTS),
        (kind("qkv", (6144, 4096), 32, 192), EXPERTS),  # so few rows take no less time
        (kind("qkv", (6144, 4096), 32, 1), kind("down", (4096, 14336), 32, 320), EXPERTS),  # not worth it
        (kind("sum", (4096, 2), 64, 4096, whole=True), EXPERTS),  # not to be padded by itself
    ],
)
def test_else_a_prefill_is_padded_as_a_whole(layers: tuple[LayerClasses, ...]) -> None:
    assert apart_in_prefills(InvarianceMap([*layers, LONG_HEAD])) == ()


def test_a_layer_without_a_class_of_the_largest_prefill_is_not_padded_into_none() -> None:
    odd = LayerClasses("odd", (4096, 4096), 32, {m: None if m == 8192 else 0 for m in LONG}, kind="odd")
    found = Classes.of(InvarianceMap([EXPERTS, odd, LONG_HEAD]), 64, 64, [], apart=True)
    assert found.apart == ()
    assert not found.prefill.sizes


def test_two_kinds_may_be_padded_by_themselves() -> None:
    other = kind("shared_gate", (1, 4096), 32, 7040)
    assert apart_in_prefills(InvarianceMap([EXPERTS, ROUTER, other, LONG_HEAD])) == (1, 2)


def test_a_layer_of_a_prefill_is_padded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly and in a graph alike, in memory that all layers of a kind share."""
    found = Classes.of(InvarianceMap([ROUTER, EXPERTS, LONG_HEAD]), 64, 64, [], apart=True)
    gates = [SimpleNamespace(weight=torch.ones(8, 4096)) for _ in range(2)]
    monkeypatch.setattr(shape_hooks, "_classes", found)
    monkeypatch.setattr(shape_hooks, "_apart", {id(gate): found.own(decode=False)[0] for gate in gates})
    monkeypatch.setattr(padding, "_wide", {})
    seen: list[int] = []

    def run(layer: Any, rows: int) -> torch.Tensor:
        def original(_method: Any, _layer: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x[:, :2] * 2

        x = torch.full((rows, 4096), float(rows))
        out: torch.Tensor = shape_hooks.linear(original, None, layer, x)
        assert torch.equal(out, x[:, :2] * 2)
        return out

    forward = shape_hooks.prefill(64)
    with shape_hooks.running(forward):
        for layer in (*gates, object()):
            run(layer, 64)
        run(gates[0], 5120)
    assert seen == [5056, 5056, 64, 5120]
    assert forward.shape() == ForwardShape(64, 5120, True)
    assert forward.together == 64, "the others ran at the rows of the forward"
    (wide,) = padding._wide.values()
    assert wide.shape == (8192, 4096)


# ---- decode graphs -------------------------------------------------------------------------------------------------------


class Model:
    """Two layers, of which one changes its sums below 49 rows, and the way in which SGLang captures them."""

    def __init__(self) -> None:
        self.qkv, self.out, self.seen = object(), object(), dict[str, list[int]](qkv=[], out=[])
        self.is_draft_worker = False
        self.model = self
        self.given = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def apply(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        name = "qkv" if layer is self.qkv else "out"
        self.seen[name].append(len(x))
        return x.double().cumsum(1) if name == "out" or len(x) > 48 else x.double().flip(1).cumsum(1)

    def forward(self, rows: int) -> torch.Tensor:
        x = self.given[:rows]
        for each in (self.qkv, self.out):
            x = shape_hooks.linear(lambda _m, at, wide: self.apply(at, wide), None, each, x).to(x.dtype)
        return x

    def capture(self, size: int, forward: Any = None) -> torch.Tensor:
        """What SGLang's runner does, twice to warm up."""
        run = forward or self.forward
        out: torch.Tensor = decode_graphs.capture(
            lambda _runner, rows: [run(rows) for _ in range(3)][-1], SimpleNamespace(model_runner=self), size
        )
        return out


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    found = classes(QKV, OUT)
    one = Model()
    own = dict(zip((id(one.qkv), id(one.out)), found.own(decode=True)))
    monkeypatch.setattr(padding, "_wide", {})
    for name, value in (("_layers", None), ("_seen", {})):
        monkeypatch.setattr(decode_graphs, name, value)
    monkeypatch.setattr(decode_graphs, "sizes_by_layer", lambda *_: own)
    monkeypatch.setattr(shape_hooks, "_classes", found)
    monkeypatch.setattr(shape_hooks, "_captured", ChosenGraphs("ours", (1, 3, 49, 64)))
    yield one
    assert shape_hooks._running is None


def test_only_the_layer_that_does_not_hold_the_rows_is_padded(model: Model) -> None:
    wanted = model.forward(64)
    assert not torch.equal(model.forward(3), wanted[:3]), "without padding the rows have other bits"
    model.seen = {"qkv": [], "out": []}
    for size in (64, 49, 3, 1):
        assert torch.equal(model.capture(size), wanted[:size])
    assert model.seen == {"qkv": [64] * 3 + [49] * 9, "out": [64] * 3 + [49] * 3 + [3] * 3 + [1] * 3}
    graphs = decode_graphs.graphs_of([1, 3, 49, 64])
    assert graphs == DecodeGraphs((1, 3, 49, 64), {1: 49, 3: 49, 49: 49, 64: 64})
    assert graphs.shape(2, graphs.target(2)) == ForwardShape(2, 49, True)


def test_rows_behind_a_batch_are_those_of_earlier_ones(model: Model) -> None:
    """Zeros would cost a kernel for each layer; what stands there changes no row of the batch."""
    first = model.capture(3)
    (wide,) = padding._wide.values()
    assert wide.shape == (49, 8)
    assert torch.equal(wide[:3], model.given[:3])
    assert not wide[3:].any()
    model.capture(1)
    (again,) = padding._wide.values()
    assert again is wide, "graphs that were captured go on writing there"
    wide[3:] = torch.nan
    assert torch.equal(model.capture(3), first)


def test_a_size_in_which_a_layer_was_not_seen_is_not_inside(model: Model) -> None:
    """One that ran past the hooks may have run at any shape."""
    model.capture(3)
    model.capture(
        1, lambda rows: shape_hooks.linear(lambda _m, at, x: model.apply(at, x), None, model.out, model.given[:rows])
    )
    assert decode_graphs.graphs_of([1, 3]).inside() == [3]


def test_a_size_that_is_captured_again_stays_outside(model: Model) -> None:
    model.capture(
        3, lambda rows: shape_hooks.linear(lambda _m, _l, x: x, None, model.out, model.given[:rows].view(rows, 2, 4))
    )
    model.capture(3)  # for verify passes
    assert decode_graphs.graphs_of([3]).inside() == []


def test_a_layer_at_rows_that_were_never_probed_takes_its_graph_out_of_the_class(model: Model) -> None:
    model.capture(1)
    three = model.given[:3].view(3, 2, 4)  # not rows of features: nothing that is padded
    model.capture(
        3, lambda rows: (model.forward(rows), shape_hooks.linear(lambda _m, _l, x: x, None, model.out, three))[0]
    )
    graphs = decode_graphs.graphs_of([1, 3, 80])
    assert graphs.inside() == [1]
    assert graphs.shape(3, 3) == ForwardShape(3, 3, False)
    assert graphs.shape(70, 80) == ForwardShape(70, 80, False), "beyond the class nothing was padded or noted"


@pytest.mark.parametrize("what", ["a size beyond the class", "a draft model", "no canonical fast path"])
def test_other_captures_are_left_alone(model: Model, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    size = 80 if what == "a size beyond the class" else 3
    model.is_draft_worker = what == "a draft model"
    if what == "no canonical fast path":
        monkeypatch.setattr(shape_hooks, "_classes", None)
    model.given = torch.ones(80, 8)
    model.capture(size)
    assert set(model.seen["out"]) == set(model.seen["qkv"]) == {size}
    assert decode_graphs.graphs_of([size]) == DecodeGraphs((size,))
