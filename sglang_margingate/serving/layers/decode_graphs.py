"""Decode graphs of the canonical fast path: captured by SGLang, at sizes and with layers of their classes.

The class that holds the largest batch often begins at 17 or 49 rows, because one kind of layer has another kernel below. To
run every smaller batch at that size is cheap for products of matrices, and not for the rest: sums over GPUs, experts, the
vocabulary. So a graph may have as many rows as its batch, and the layers that do not hold so few are padded by themselves:
their input is copied in front of rows that stay, and only the rows of the batch are taken from what comes out.

What each layer ran at is noted while the graph is captured, so a size counts as inside the class only if all were seen so;
that a row has the same bits at every size is tried after that (canonical/path_probe.py).
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_margingate.canonical.classes import DecodeGraphs
from sglang_margingate.canonical.invariance import RowSizes
from sglang_margingate.serving import shape_hooks
from sglang_margingate.serving.layers import experts
from sglang_margingate.serving.layers.kinds import sizes_by_layer
from sglang_margingate.serving.layers.padding import Running

# State of this process (hook_table.py lists all of it), set while graphs are captured.
_layers: dict[int, RowSizes] | None = None
_seen: dict[int, Running] = {}


class CapturedForward(Running):
    """A decode forward that is being captured; every layer goes to sizes of its own class."""

    def behind(self, layer: Any, _x: torch.Tensor, rows: int) -> tuple[tuple[Any, ...], int]:
        """Give each layer memory of its own, so that two that run beside each other do not meet there."""
        return (type(self), id(layer), rows), rows

    def sent(self, dispatch_output: Any) -> Any:
        """Send the padding of a smaller batch where the first row goes."""
        return experts.along(dispatch_output)


def graphs_of(sizes: list[int]) -> DecodeGraphs:
    """Return the captured decode sizes with what was seen when they were captured.

    A size counts as inside only if the same layers ran in it as at the others: one that ran past the hooks was not seen.
    """
    forwards = {size: _seen[size] for size in sizes if size in _seen}
    layers = set[int]().union(*(forward.seen for forward in forwards.values()))
    widest = {
        size: forward.padded
        for size, forward in forwards.items()
        if forward.shape().in_class and forward.padded is not None and forward.seen == layers
    }
    return DecodeGraphs(tuple(sorted(sizes)), widest)


# ---- hook functions ---------------------------------------------------------------------------------------------------


def capture(original: Any, runner: Any, size: int, *args: Any, **kwargs: Any) -> Any:
    """Capture one decode graph, those layers padded by themselves that do not hold its rows; note what they ran at."""
    global _layers
    classes = shape_hooks.chosen()
    if classes is None or size not in shape_hooks.captured().inside or runner.model_runner.is_draft_worker:
        return original(runner, size, *args, **kwargs)
    if _layers is None:
        _layers = sizes_by_layer(runner.model_runner.model, classes.map, classes.own(decode=True))
    forward, before = CapturedForward(classes.decode, classes.head, size, _layers), _seen.get(size)
    if before is not None and not before.shape().in_class:
        forward.escape()  # a size may be captured more than once: for verify passes, for variants
    _seen[size] = forward
    with shape_hooks.running(forward):
        return original(runner, size, *args, **kwargs)
