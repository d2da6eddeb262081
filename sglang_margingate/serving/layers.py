"""Which layers of SGLang's model the probe tries, and how SGLang computes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from sglang_margingate.canonical.linear_probe import Apply, LinearKind


def layer_kinds(model: Any) -> list[LinearKind]:
    """Return one layer of every kind in SGLang's model module, the head last."""
    from sglang.srt.layers.linear import LinearBase

    found: dict[Any, LinearKind] = {}
    counts: Counter[Any] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase):
            continue
        bias = getattr(module, "bias", None)
        method = type(module.quant_method).__name__
        key = (method, tuple(module.weight.shape), module.weight.dtype, bias is not None)
        counts[key] += 1
        if key not in found:
            found[key] = LinearKind(name, module.weight, bias, _method(module), False, method)
    head = _head(model)
    if head is not None:
        counts["head"] = 1
        found["head"] = head
    return [replace(kind, count=counts[key]) for key, kind in found.items()]


def unknown_layers(model: Any) -> list[str]:
    """Return the layers whose products the probe cannot try, as ``name (type)``: what holds a matrix of another kind.

    Embeddings are looked up row by row and norms hold vectors: neither sums over a dimension that depends on M.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    known = (LinearBase, VocabParallelEmbedding, torch.nn.Embedding)
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, known) and any(p.dim() > 1 for p in module.parameters(recurse=False))
    ]
    if hasattr(model, "lm_head") and _head(model) is None:
        unknown.append(f"lm_head ({type(model.lm_head).__name__} without a weight or a logits processor)")
    return unknown


def _head(model: Any) -> LinearKind | None:
    """Return the layer that makes logits, computed as every forward does: by SGLang's logits processor."""
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    if head is None or processor is None or not hasattr(head, "weight"):
        return None
    # --enable-fp32-lm-head computes it from 32-bit copies, so its map is another one.
    method = "matmul in fp32" if getattr(processor, "use_fp32_lm_head", False) else "matmul"
    return LinearKind("lm_head", head.weight, None, lambda x, _: processor._compute_lm_head(x, head), True, method)


def _method(module: Any) -> Apply:
    return lambda x, bias: module.quant_method.apply(module, x, bias)
