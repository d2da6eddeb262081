"""The canonical fast path: every forward runs at shapes of one class, so most steps need no verify.

What it changes in SGLang, all through hooks (table in hooks.py) and only with ``--margingate-fast-path canonical``:

* decode graphs are captured at sizes of one class, and verify passes get a size of it too; smaller batches are padded
  up to them;
* on a GPU attention looks at each row's own context only (attention.py);
* forwards without a graph (prefill; decode on a CPU) are padded to a probed number of rows: a prefill on a GPU as a whole,
  others linear layer by linear layer.

What is not known from the linear map is tried out end to end before the server takes requests (path_probe.py). Where
prefill turns out to depend on its shape, gated prompts keep to the chunk grid, one at a time, as without the fast path.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_margingate.config import CANONICAL_PREFILL_CPU, FastPathMode, MarginGateConfig
from sglang_margingate.gate.invariance import InvarianceMap, RowSizes, rows_to_probe
from sglang_margingate.serving import attention
from sglang_margingate.serving.linear_probe import unknown_layers
from sglang_margingate.serving.map_store import map_of
from sglang_margingate.serving.testknobs import TestKnobs, split_sums
from sglang_margingate.serving.versions import kernel_environment

log = logging.getLogger(__name__)

IN_CLASS = "margingate_in_class"
"""Attribute of a ``ForwardBatch`` that ran without a graph: whether its rows were inside the class."""

GPU_LARGEST = 16_384


@dataclass
class FastPath:
    """The classes this server keeps its forwards in."""

    map: InvarianceMap
    decode: RowSizes
    prefill: RowSizes
    head: RowSizes
    verify_rows: int
    """The M of verify passes: the wanted one, or the next that shares the decode class."""
    graphs: RowSizes = field(default_factory=RowSizes)
    """Captured decode sizes, those beyond the class too; empty without CUDA graphs."""
    batched_prefill: bool = False
    """Prefill is invariant to companions, chunking and prefix hits (found by path_probe.py)."""
    unknown: list[str] = field(default_factory=list)
    """Layers that the probe does not know: with one of them nothing is structural."""
    decode_attention: str = "sglang"
    """What attends in decode graphs."""
    decode_ok: bool = False
    """Decode gives one row the same bits at every size, and the verify's (found by path_probe.py)."""
    notes: list[str] = field(default_factory=list)
    """What was tried and failed, in words."""
    active: RowSizes | None = None
    """Where the running forward's rows go; None outside forwards and inside graphs."""
    escaped: bool = False
    """A layer of the running forward had a shape that is never padded, so it is outside the class."""

    def graphs_inside(self) -> list[int]:
        """Return the captured decode sizes inside the class."""
        return [size for size in self.graphs.sizes if size in self.decode.sizes]

    def decode_in_class(self, rows: int, batch: Any) -> bool:
        """Return whether a decode forward of ``rows`` requests ran inside the class."""
        if not self.decode_ok:
            return False
        if hasattr(batch, IN_CLASS):
            return bool(getattr(batch, IN_CLASS))
        return self.graphs.target(rows) in self.decode.sizes

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for status page and manifest."""
        return {
            "map": self.map.to_dict(),
            "decode_rows": self.decode.describe(),
            "prefill_rows": self.prefill.describe(),
            "one_class": bool(self.decode.sizes) and set(self.decode.sizes) <= set(self.prefill.sizes),
            "verify_rows": self.verify_rows,
            "graph_sizes": list(self.graphs.sizes),
            "decode_attention": self.decode_attention,
            "decode_ok": self.decode_ok,
            "batched_prefill": self.batched_prefill,
            "notes": list(self.notes),
        }


_fast: FastPath | None = None


def probed(model_runner: Any, config: MarginGateConfig) -> FastPath:
    """Read or probe the map of the model's linear layers and choose the classes, once per process."""
    global _fast
    if _fast is None:
        cpu = model_runner.device == "cpu"
        knobs = TestKnobs()
        if knobs.split_linear:
            split = split_sums(model_runner.model, knobs.split_linear)
            log.warning("margingate: %s sums by number of rows on purpose", split)
        chunk = model_runner.server_args.chunked_prefill_size or 0
        largest = min(chunk if chunk > 0 else GPU_LARGEST, CANONICAL_PREFILL_CPU if cpu else GPU_LARGEST)
        # cuBLAS chooses kernels by alignment too, so a GPU's steps are small; the map is kept, so they cost one start.
        rows = rows_to_probe(64, largest, 32, 1024, 128) if cpu else rows_to_probe(260, largest, 8, largest, 8)
        environment = kernel_environment(model_runner.device)
        found = map_of(model_runner.model, rows, environment, config.map_dir, keep=not knobs.active)
        decode = found.decode_class(max(_wanted_sizes(model_runner) or [config.verify_rows]))
        verify_rows = decode.target(config.verify_rows) or config.verify_rows
        _fast = FastPath(
            found, decode, found.same_as(found.largest(), head=False), found.head_same_as(verify_rows), verify_rows,
            unknown=unknown_layers(model_runner.model),
        )  # fmt: skip
        log.info(
            "margingate: map of %d kinds of layers, %s: decode at %s rows, prefill at %s, verify at %d",
            len(found.layers), found.origin(), decode.describe(), _fast.prefill.describe(), verify_rows,
        )  # fmt: skip
    return _fast


def _wanted_sizes(model_runner: Any) -> list[int]:
    """Return the decode sizes that SGLang was going to capture; empty without decode graphs."""
    graphs = model_runner.server_args.cuda_graph_config
    if graphs is None or graphs.decode.backend == "disabled" or not graphs.decode.bs:
        return []
    return [size for size in graphs.decode.bs if size <= model_runner.req_to_token_pool.size]


# ---- hook functions ---------------------------------------------------------------------------------------------------


def choose_shapes(model_runner: Any, *_: Any, **__: Any) -> None:
    """Probe the loaded model, and let SGLang capture its decode graphs at sizes of one class.

    Batches too large for the class keep their graphs: they are gated by margin, and without a graph slow as well.
    """
    config = _config()
    if config is None or model_runner.is_draft_worker:
        return
    fast, wanted = probed(model_runner, config), _wanted_sizes(model_runner)
    most = model_runner.req_to_token_pool.size
    targets = {fast.decode.target(size) for size in wanted}
    inside = {target for target in targets if target is not None and target <= most}
    if inside:
        sizes = sorted(inside | {size for size in wanted if size > max(inside)})
        model_runner.server_args.cuda_graph_config.decode.bs = sizes
        fast.decode_attention = attention.prepare(model_runner, max(*sizes, fast.verify_rows))
    elif wanted:
        fast.notes.append(f"no class holds a decode batch of {min(wanted)} to {most} rows")


def run_eagerly(original: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Pad the linear layers of a forward without a graph, and note whether it stayed inside its class."""
    fast = _fast
    if fast is None:
        return original(runner, batch, *args, **kwargs)
    decode = batch.forward_mode.is_decode()
    sizes = fast.decode if decode else fast.prefill
    rows = len(batch.input_ids)
    # On a GPU a decode without a graph plans its attention with a K/V split.
    inside = sizes.target(rows) is not None and not (decode and fast.graphs.sizes)
    inside &= decode or fast.head.target(batch.batch_size) is not None
    fast.active, fast.escaped = sizes, False
    try:
        return original(runner, batch, *args, **kwargs)
    finally:
        fast.active = None
        setattr(batch, IN_CLASS, inside and not fast.escaped)


def pad_forward(loaded: Any, _runner: Any, batch: Any, *_: Any, **__: Any) -> None:
    """Pad a prefill's tokens to a size of the class once, so that no layer has to; attention leaves the rest out.

    ``loaded`` is the eager runner's own copy of the batch. Padding rows write K/V slot 0, which SGLang reserves for that.
    """
    fast = _fast
    if fast is None or fast.active is None or loaded.input_ids is None or loaded.input_ids.device.type == "cpu":
        return
    per_token = ("input_embeds", "replace_embeds", "token_type_ids", "mm_input_embeds", "mrope_positions")
    if not batch.forward_mode.is_extend() or any(getattr(loaded, name, None) is not None for name in per_token):
        return  # layer by layer, then
    rows = len(loaded.input_ids)
    more = (fast.active.target(rows) or rows) - rows
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(loaded, name, torch.nn.functional.pad(getattr(loaded, name), (0, more)))


def linear(original: Any, method: Any, layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run one linear layer at a size of the class."""
    fast = _fast
    if fast is None or fast.active is None:
        return original(method, layer, x, *args, **kwargs)
    if x.dim() != 2:
        fast.escaped = True
        return original(method, layer, x, *args, **kwargs)
    return _at_size(fast.active, x, lambda padded: original(method, layer, padded, *args, **kwargs))


def head(original: Any, processor: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run the layer that makes logits at a size of its class."""
    fast = _fast
    if fast is None or fast.active is None:
        return original(processor, hidden, *args, **kwargs)
    return _at_size(fast.head, hidden, lambda padded: original(processor, padded, *args, **kwargs))


def _at_size(sizes: RowSizes, x: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Run on ``x`` padded to one of ``sizes``; as it is where none is large enough."""
    rows = len(x)
    target = sizes.target(rows)
    if target is None or target == rows:
        return run(x)
    return run(torch.nn.functional.pad(x, (0, 0, 0, target - rows)))[:rows]


def _config() -> MarginGateConfig | None:
    config = MarginGateConfig.from_env()
    return config if config is not None and config.fast_path is FastPathMode.CANONICAL else None
