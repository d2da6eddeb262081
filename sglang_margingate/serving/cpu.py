"""What stock SGLang needs to serve on a plain x86 CPU.

Three parts: stand-ins that must be in place before SGLang is first imported (a CPU-only environment has no triton and a
torchvision without its compiled operators), hooks on SGLang functions that assume a GPU or vLLM, and attention whose bits
depend on a row's own context alone (:mod:`margingate_kernels.attention.host_attention`), for servers that verify.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from margingate_kernels import HostAttention


def is_cpu_host() -> bool:
    """Return True when no CUDA device can be used, without initialising CUDA."""
    import torch

    return not torch.cuda.is_available()


def install_stand_ins() -> None:
    """Make ``import sglang`` possible where triton and torchvision's operators are missing. Idempotent.

    Does nothing on machines that have triton. Must run before the first import of SGLang, in every process.
    """
    if importlib.util.find_spec("triton") is None and "triton" not in sys.modules:
        # torch.compile would look for a real triton through the stub.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        if importlib.util.find_spec("sglang") is None:
            return
        from sglang_margingate import triton_stub

        triton_stub.install()
        _declare_torchvision_operators()


def _declare_torchvision_operators() -> None:
    """Declare the two operators whose fake kernels torchvision registers on import.

    PyPI's torchvision beside a CPU torch has no compiled library, so importing it fails on the missing operators
    although nothing here ever calls them.
    """
    import torch

    if "torchvision" in sys.modules:
        return
    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        return  # a torchvision that fits this torch has defined them already
    # The registration lives as long as the object does.
    torch._margingate_torchvision_library = library  # type: ignore[attr-defined]


def set_rotary_is_cpu(*_: Any, **__: Any) -> None:
    """Tell SGLang's rotary embedding that this is a CPU; it imports vLLM for a fallback otherwise."""
    from sglang.srt.layers.rotary_embedding import base

    base._is_cpu = True


@lru_cache
def grammars_need_a_gpu() -> bool:
    """Return whether this SGLang has no way to apply a grammar's bitmask on a CPU (0.5.17; mended by 0.5.19).

    Its source is read, not imported: hooks are registered before SGLang's modules may be. Where the answer is wrong, hooks
    are in place that do the same as what they replace.
    """
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return True
    path = Path(next(iter(spec.submodule_search_locations)), "srt", "constrained", "xgrammar_backend.py")
    try:
        return 'device.type == "cpu"' not in path.read_text(encoding="utf-8")
    except OSError:
        return True


def allocate_token_bitmask(vocab_size: int, batch_size: int) -> Any:
    """Allocate a grammar bitmask in pageable memory; SGLang's pins it, which needs a CUDA driver."""
    import torch
    from sglang.srt.constrained import xgrammar_backend as backend

    shape = backend.get_bitmask_shape(batch_size, vocab_size)
    return torch.full(shape, -1, dtype=backend.bitmask_dtype)


def apply_vocab_mask(original: Any, self: Any, logits: Any, vocab_mask: Any) -> None:
    """Apply a grammar bitmask on the CPU with xgrammar's own CPU kernel; SGLang has no CPU branch."""
    if logits.device.type != "cpu":
        original(self, logits, vocab_mask)
        return
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask.to("cpu"))


# ---- attention ---------------------------------------------------------------------------------------------------------

FITS = "margingate_fits"
"""Attribute of SGLang's attention backend: whether our attention fits the model."""

ATTENTION = "margingate_attention"
"""Attribute of SGLang's attention backend: our attention of the forward that runs now; None where SGLang's attends."""


def set_up_attention(_result: Any, backend: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """Note on a new attention backend whether ours fits its model."""
    from sglang_margingate.serving.attention_hooks import is_plain

    setattr(backend, FITS, is_plain(model_runner))
    setattr(backend, ATTENTION, None)


def attention_kind(model_runner: Any) -> str:
    """Return what attends on this CPU, in the words of the manifest."""
    return "margingate" if getattr(model_runner.attn_backend, FITS, False) else "sglang"


def plan_attention(_result: Any, backend: Any, batch: Any, *_: Any, **__: Any) -> None:
    """Lay out our attention for the forward that begins."""
    from margingate_kernels import HostAttention, Part

    setattr(backend, ATTENTION, None)
    mode = batch.forward_mode
    if not getattr(backend, FITS, False) or not (mode.is_decode() or mode.is_extend()):
        return
    ends, pools = batch.seq_lens.tolist(), batch.req_pool_indices.tolist()
    firsts = [end - 1 for end in ends] if mode.is_decode() else batch.extend_prefix_lens.tolist()
    parts = [Part(*part) for part in zip(pools, firsts, ends)]
    setattr(backend, ATTENTION, HostAttention(parts, backend.req_to_token_pool.req_to_token, mode.is_decode()))


def attend(
    original: Any,
    backend: Any,
    query: Any,
    output: Any,
    keys: Any,
    values: Any,
    *args: Any,
    scaling: Any = None,
    **kwargs: Any,
) -> Any:
    """Attend with ours where it was laid out for this forward."""
    ours: HostAttention | None = getattr(backend, ATTENTION, None)
    if ours is None:
        return original(backend, query, output, keys, values, *args, scaling=scaling, **kwargs)
    return ours(query, keys, values, scaling, output)
