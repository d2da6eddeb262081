"""The layers of SGLang's models as the probe asks for them: which kinds there are, how each is run, and which it does not know.

A layer is known only where everything that its method computes is either a product that the probe tries or looks at one row
alone: a scale that is taken over the whole batch does neither, and its layer is left out by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
from sglang_margingate.canonical.layer_probe import LayerKind
from sglang_margingate.canonical.linear_probe import FP8, FP8_UNIT, Apply, LinearKind
from sglang_margingate.serving.layers import experts

Scales = tuple[tuple[torch.Tensor, float], ...]


def layer_kinds(model: Any) -> list[LayerKind]:
    """Return one layer of every kind in SGLang's model module: linear layers, banks of experts, the head last."""
    found: dict[Any, LayerKind] = {}
    counts: Counter[Any] = Counter()
    for _, kind in _known(model):
        key = (type(kind), *_key(kind))
        counts[key] += 1
        found.setdefault(key, kind)
    kinds: list[Any] = [replace(kind, count=counts[key]) for key, kind in found.items()]  # type: ignore[type-var]
    head = _head(model)
    return kinds if head is None else [*kinds, head]


def sizes_by_layer(model: Any, found: InvarianceMap, own: Sequence[RowSizes | None]) -> dict[int, RowSizes]:
    """Return for each of the model's layers, by its ``id``, the sizes that ``own`` has for its kind; none for kinds without.

    Parameters
    ----------
    model
        SGLang's model module.
    found
        Its map.
    own
        For each kind in the map, numbers of rows.
    """
    sizes = {(layer.shape, layer.kind): each for layer, each in zip(found.layers, own) if each is not None}
    return {id(module): sizes[_key(kind)] for module, kind in _known(model) if _key(kind) in sizes}


def _known(model: Any) -> Iterator[tuple[Any, LayerKind]]:
    """Return the linear layers and banks of experts that the probe knows, each as its kind."""
    from sglang.srt.layers.linear import LinearBase

    top_k = experts.top_k_of(model)
    for name, module in model.named_modules():
        kind: LayerKind | None = (
            _linear(name, module) if isinstance(module, LinearBase) else experts.bank_kind(name, module, top_k)
        )
        if kind is not None:
            yield module, kind


def _key(kind: LayerKind) -> tuple[tuple[int, int], str]:
    return kind.shape, kind.describe()


def unknown_layers(model: Any) -> list[str]:
    """Return the layers whose products the probe cannot try, as ``name (type)``: what holds a matrix of another kind.

    Embeddings are looked up row by row and norms hold vectors: neither sums over a dimension that depends on M.
    """
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    unknown, known = [], {id(module) for module, _ in _known(model)}
    for name, module in model.named_modules():
        if id(module) in known or isinstance(module, (VocabParallelEmbedding, torch.nn.Embedding)):
            continue
        if any(p.dim() > 1 for p in module.parameters(recurse=False)):
            method = getattr(module, "quant_method", None)
            by = "" if method is None else f", computed by {type(method).__name__}"
            unknown.append(f"{name} ({type(module).__name__}{by})")
    if hasattr(model, "lm_head") and _head(model) is None:
        unknown.append(f"lm_head ({type(model.lm_head).__name__} without a weight or a logits processor)")
    return unknown


def _linear(name: str, module: Any) -> LinearKind | None:
    """Return a linear layer as the probe runs it; None where its method is none that the probe knows."""
    method, bias = type(module.quant_method).__name__, getattr(module, "bias", None)
    apply = _method(module)
    if method == "UnquantizedLinearMethod":
        return LinearKind(name, module.weight, bias, apply, False, method)
    known = _quantised(module)
    if known is None or module.weight.dtype != FP8:
        return None
    words, scales, inputs_first = known
    return LinearKind(name, module.weight, bias, apply, False, f"{method}, {words}", 1, scales, inputs_first)


def _quantised(module: Any) -> tuple[str, Scales, bool] | None:
    """Return what computes an 8-bit layer in words, its scales with what each is lent, and whether inputs come first."""
    method = module.quant_method
    name = type(method).__name__
    if name == "CompressedTensorsLinearMethod":
        method = module.scheme
        if type(method).__name__ != "CompressedTensorsW8A8Fp8":
            return None
        block = method.weight_block_size
    elif name == "Fp8LinearMethod":
        if method.use_marlin or method.use_mxfp8:
            return None
        block = method.weight_block_size if method.block_quant else None
    elif name == "W8A8Fp8LinearMethod":
        block = None
    else:
        return None
    scale = getattr(module, "weight_scale_inv", None) if block is not None else None
    scale = module.weight_scale if scale is None else scale
    if scale.dtype != torch.float32:
        return None  # packed exponents, as DeepGEMM wants them on Blackwell
    scales: Scales = ((scale, 1.0),)
    static = getattr(module, "input_scale", None)
    if static is not None:
        scales = (*scales, (static, FP8_UNIT))
    if block is not None:
        return f"blocks of {'x'.join(map(str, block))} by {method.w8a8_block_fp8_linear.__name__}", scales, False
    grain = "channels" if scale.numel() > 1 else "one scale"
    return f"{grain}, activations {'static' if static is not None else 'by row'}", scales, True


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
