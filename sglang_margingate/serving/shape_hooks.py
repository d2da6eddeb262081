"""Hook functions of the canonical fast path: every forward runs at shapes of one class, so most steps need no verify.

What they change in SGLang, all through hooks (table in hooks.py) and only with ``--margingate-fast-path canonical``:

* decode graphs are captured at sizes of one class, or with those layers padded by themselves that do not hold so few rows
  (layers/decode_graphs.py), and verify passes get a size of it too; other batches are padded up to them;
* on a GPU attention looks at each row's own context only (attention_hooks.py);
* prefills on a GPU are replayed from CUDA graphs of our own where they fit one (prefill_graphs.py);
* forwards without a graph (other prefills; decode on a CPU) are padded to a probed number of rows: a prefill on a GPU as a whole,
  others linear layer by linear layer. The layer that makes logits runs at probed numbers of rows of its own.

What a forward did is noted by the layers that did it, and set on its batch where it ends. What is not known from the linear
map is tried out end to end before the server takes requests (canonical/path_probe.py).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sglang_margingate.canonical.classes import GPU_LARGEST, Classes
from sglang_margingate.canonical.invariance import RowSizes, rows_to_probe
from sglang_margingate.canonical.map_store import map_of
from sglang_margingate.canonical.ranks import RankError, digest
from sglang_margingate.config import CANONICAL_PREFILL_CPU, ConfigError, FastPathMode, MarginGateConfig
from sglang_margingate.machine import kernel_environment, versions
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.view import SHAPE
from sglang_margingate.serving import attention_hooks, sgl
from sglang_margingate.serving.layers import experts
from sglang_margingate.serving.layers.kinds import layer_kinds, sizes_by_layer, unknown_layers
from sglang_margingate.serving.layers.padding import Running
from sglang_margingate.serving.several import group
from sglang_margingate.serving.several.sums import probe_sums

log = logging.getLogger(__name__)

ATTENDANCE_SECONDS = 120.0
"""Ranks that have loaded their weights wait for each other, so that all are there at about the same time."""


@dataclass(frozen=True)
class ChosenGraphs:
    """What was chosen when decode graphs were captured.

    Parameters
    ----------
    decode_attention
        What attends in them.
    inside
        The sizes that are to be captured inside the class, rising.
    notes
        What did not fit, in words.
    """

    decode_attention: str = "sglang"
    inside: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


class PrefillReplay(Protocol):
    """Prefills in CUDA graphs, as :class:`~.prefill_graphs.PrefillGraphs` replays them."""

    def size_for(self, batch: Any) -> int | None:
        """Return the size that this batch is to be replayed at, None where it must run eagerly."""

    def run(self, batch: Any, size: int, forward: Running) -> Any:
        """Replay its layers and make its logits; note in ``forward`` what they ran at."""


# State of this process (hook_table.py lists all of it).
_classes: Classes | None = None
_captured = ChosenGraphs()
_prefill_graphs: PrefillReplay | None = None
_running: Running | None = None
_apart: dict[int, RowSizes] = {}
_attended = False


def probed(model_runner: Any, config: MarginGateConfig) -> Classes:
    """Read or probe the map of the model's linear layers and choose the classes, once per process."""
    global _classes
    if _classes is None:
        cpu = model_runner.device == "cpu"
        knobs = TestKnobs()
        if knobs.split_linear:
            split = split_sums(model_runner.model, knobs.split_linear)
            log.warning("margingate: %s sums by number of rows on purpose", split)
        chunk = sgl.resolved(model_runner.server_args).chunked_prefill_size or 0
        largest = min(chunk if chunk > 0 else GPU_LARGEST, CANONICAL_PREFILL_CPU if cpu else GPU_LARGEST)
        # cuBLAS chooses kernels by alignment too, so a GPU's steps are small; the map is kept, so they cost one start.
        rows = rows_to_probe(64, largest, 32, 1024, 128) if cpu else rows_to_probe(260, largest, 8, largest, 8)
        model, environment = model_runner.model, kernel_environment(model_runner.device)
        experts.settle_tables(model, config, model_runner.device)
        ranks = group.ranks()
        if ranks.size > 1:
            environment["ranks"] = str(ranks.size)
        found = map_of(layer_kinds(model), rows, environment, config.map_dir, keep=not knobs.active)
        if ranks.size > 1:
            reduced = probe_sums(model_runner, rows, _wanted_sizes(model_runner), knobs)
            found = replace(found, layers=[*found.layers, reduced.layer(model_runner.dtype)])
        most = max(_wanted_sizes(model_runner) or [config.verify_rows])
        _classes = Classes.of(found, most, config.verify_rows, unknown_layers(model), apart=not cpu)
        if _classes.apart:
            own = [sizes if k in _classes.apart else None for k, sizes in enumerate(_classes.own(decode=False))]
            _apart.update(sizes_by_layer(model, found, own))
        sizes = {"decode sizes": list(_classes.decode.sizes), "prefill sizes": list(_classes.prefill.sizes),
                 "head sizes": list(_classes.head.sizes), "verify rows": _classes.verify_rows, "apart": list(_classes.apart)}  # fmt: skip
        ranks.same("the map of the layers", sizes | {"map": digest([layer.to_dict() for layer in found.layers])}, REMAP)
        log.info(
            "margingate: map of %d kinds of layers, %s: decode at %s rows, prefill at %s, verify at %d",
            len(found.layers), found.origin(), _classes.decode.describe(), _classes.prefill.describe(),
            _classes.verify_rows,
        )  # fmt: skip
    return _classes


REMAP = "Remove the kept maps (--margingate-map-dir), or use GPUs of one kind"


def chosen() -> Classes | None:
    """Return the classes of this process; None before they are probed, and without the canonical fast path."""
    return _classes


def prefill(rows: int) -> Running:
    """Return a prefill of ``rows`` tokens that begins, once the classes are chosen."""
    assert _classes is not None
    return Running(_classes.prefill, _classes.head, rows, _apart)


def captured() -> ChosenGraphs:
    """Return what was chosen when this process captured its decode graphs."""
    return _captured


def replay_prefills(graphs: PrefillReplay | None) -> None:
    """Let ``graphs`` serve the prefills that fit them."""
    global _prefill_graphs
    _prefill_graphs = graphs


def attend(config: MarginGateConfig, device: str) -> None:
    """Let every rank answer before they run anything together, and say what it runs on; once per process.

    Raises
    ------
    RankError
        One is missing, or runs on another machine or with other settings.
    """
    global _attended
    if _attended or group.ranks().size == 1:
        return
    who = {**kernel_environment(device), "packages": digest(versions()), "configuration": digest(config.to_json())}
    fix = "Use GPUs of one kind, and one installation for all of them"
    group.ranks().same("who is there", who, fix, seconds=ATTENDANCE_SECONDS)
    _attended = True


def _wanted_sizes(model_runner: Any) -> list[int]:
    """Return the decode sizes that SGLang was going to capture; empty without decode graphs."""
    graphs = sgl.graph_config(model_runner)
    if graphs is None or graphs.decode.backend == "disabled" or not graphs.decode.bs:
        return []
    return [size for size in graphs.decode.bs if size <= model_runner.req_to_token_pool.size]


@contextmanager
def running(forward: Running) -> Iterator[None]:
    """Let the layers' hooks pad for ``forward``, and note in it what they did."""
    global _running
    _running = forward
    try:
        yield
    finally:
        _running = None


# ---- hook functions ---------------------------------------------------------------------------------------------------


def choose_shapes(model_runner: Any, *_: Any, **__: Any) -> None:
    """Probe the loaded model, and let SGLang capture its decode graphs at sizes at which every layer is inside its class.

    Batches too large for the class keep their graphs: they are gated by margin, and without a graph slow as well.
    """
    global _captured
    config = _config()
    if config is None or model_runner.is_draft_worker:
        return
    try:
        attend(config, model_runner.device)
        classes = probed(model_runner, config)
    except RankError as error:
        print(f"margingate: refusing to serve: {error}", file=sys.stderr, flush=True)  # a traceback follows
        raise
    experts.break_experts(TestKnobs().broken_experts)
    wanted = _wanted_sizes(model_runner)
    most = model_runner.req_to_token_pool.size
    inside = classes.decode_graph_sizes(wanted, most)
    if inside:
        sizes = [*inside, *sorted(size for size in wanted if size > inside[-1])]
        sgl.graph_config(model_runner).decode.bs = sizes
        experts.fill_up(sizes)
        _captured = ChosenGraphs(attention_hooks.prepare(model_runner, max(*sizes, classes.verify_rows)), tuple(inside))
    elif wanted:
        _captured = ChosenGraphs(notes=(f"no class holds a decode batch of {min(wanted)} to {most} rows",))


def run_eagerly(original: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Replay a prefill that fits a graph of ours, pad the layers of another forward; note on its batch at which shape it ran."""
    classes = _classes
    if classes is None:
        return original(runner, batch, *args, **kwargs)
    decode, rows = batch.forward_mode.is_decode(), len(batch.input_ids)
    forward = Running(classes.decode, classes.head, rows) if decode else prefill(rows)
    if decode and batch.input_ids.device.type != "cpu":
        forward.escape()  # on a GPU a decode without a graph plans its attention with a K/V split
    graphs = None if decode else _prefill_graphs
    size = None if graphs is None else graphs.size_for(batch)
    try:
        with running(forward):
            if graphs is not None and size is not None:
                return graphs.run(batch, size, forward)
            return original(runner, batch, *args, **kwargs)
    finally:
        setattr(batch, SHAPE, forward.shape())


def pad_forward(loaded: Any, _runner: Any, batch: Any, *_: Any, **__: Any) -> None:
    """Pad a prefill's tokens to a size of the class once, so that no layer has to; attention leaves the rest out.

    ``loaded`` is the eager runner's own copy of the batch. Padding rows write K/V slot 0, which SGLang reserves for that.
    """
    forward = _running
    if forward is None or loaded.input_ids is None or loaded.input_ids.device.type == "cpu":
        return
    per_token = ("input_embeds", "replace_embeds", "token_type_ids", "mm_input_embeds", "mrope_positions")
    if not batch.forward_mode.is_extend() or any(getattr(loaded, name, None) is not None for name in per_token):
        return  # layer by layer, then
    rows = len(loaded.input_ids)
    more = (forward.sizes.target(rows) or rows) - rows
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(loaded, name, torch.nn.functional.pad(getattr(loaded, name), (0, more)))


def linear(original: Any, method: Any, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run one linear layer at a size of the class."""
    forward = _running
    if forward is None:
        return original(method, layer, x, *args, **kwargs)
    if not isinstance(x, torch.Tensor) or x.dim() != 2:  # quantised before: by something that was never probed
        forward.escape()
        return original(method, layer, x, *args, **kwargs)
    have, rows = len(x), forward.rows_of(layer, len(x))
    if rows == have:
        return original(method, layer, x, *args, **kwargs)
    return original(method, layer, forward.widen(layer, x, rows), *args, **kwargs)[:have]


def run_bank(original: Any, bank: Any, dispatch_output: Any) -> Any:
    """Run a bank of experts at a size of the class; the rows of padding go where the first row goes, with no weight."""
    forward = _running
    if forward is None:
        return experts.run(original, bank, experts.along(dispatch_output))
    have = len(dispatch_output.hidden_states)
    if not hasattr(dispatch_output.topk_output, "topk_ids"):  # routed by the bank itself
        forward.escape()
        return experts.run(original, bank, dispatch_output)
    rows, given = forward.rows_of(bank, have), forward.sent(dispatch_output)
    if rows == have:
        return experts.run(original, bank, given)
    out = experts.run(original, bank, experts.widened(given, rows))
    return out._replace(hidden_states=out.hidden_states[:have])


def head(original: Any, processor: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the layer that makes logits at a size of its class, as often as its rows need.

    A request of a prefill that asks for prompt log-probabilities brings a row per token: in one product with them, the
    row that chooses a neighbour's first token would be summed by another kernel.
    """
    forward = _running
    if forward is None:
        return original(processor, hidden, *args, **kwargs)
    sizes = forward.head.sizes
    if hidden.dim() != 2 or not sizes:
        forward.escape()
        return original(processor, hidden, *args, **kwargs)

    def block(rows: torch.Tensor) -> torch.Tensor:
        target = forward.head.target(len(rows)) or len(rows)
        wide = rows if target == len(rows) else forward.widen(processor, rows, target)
        out: torch.Tensor = original(processor, wide, *args, **kwargs)
        return out[: len(rows)]

    most = sizes[-1]
    out = block(hidden[:most])
    if len(hidden) > most:
        first, out = (
            out,
            out.new_empty(len(hidden), *out.shape[1:]),
        )  # one block more than the logits, not twice as much
        out[:most] = first
        for at in range(most, len(hidden), most):
            out[at : at + most] = block(hidden[at : at + most])
    return out


def _config() -> MarginGateConfig | None:
    config = MarginGateConfig.from_env()
    return config if config is not None and config.fast_path is FastPathMode.CANONICAL else None


class _SplitLinear:
    """``torch.nn.functional`` with a ``linear`` that sums one weight's products in two parts where there are few rows."""

    def __init__(self, weight: torch.Tensor, most_rows: int) -> None:
        self._weight, self._most_rows = weight, most_rows

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is not self._weight or len(x) > self._most_rows:
            return torch.nn.functional.linear(x, weight, bias)
        first = torch.zeros_like(x)
        first[:, ::3] = x[:, ::3]
        return torch.nn.functional.linear(first, weight, bias) + torch.nn.functional.linear(x - first, weight)


def split_sums(model: torch.nn.Module, knob: str) -> str:
    """Make one linear layer's bits depend on the number of rows; ``knob`` is NAME@M. Return the layer's full name.

    The map tries one layer of each shape, the first: name that one.
    """
    from sglang.srt.layers.quantization import unquant

    suffix, _, rows = knob.rpartition("@")
    for name, module in model.named_modules():
        if suffix and name.endswith(suffix) and rows.isdigit() and hasattr(module, "quant_method"):
            unquant.F = _SplitLinear(module.weight, int(rows))
            return name
    raise ConfigError(f"MARGINGATE_TEST_SPLIT: {knob!r} is not NAME@M with a linear layer's name")
