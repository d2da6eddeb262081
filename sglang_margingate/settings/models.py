"""Which loaded models are supported: their kind, their precision, and what of a quantised checkpoint depends on companions.

Each function returns why a model is not, one sentence each, that names what it has and what that breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERT_MODELS = ("Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM")
"""Mixtures of experts that were reviewed: a router of its own, SGLang's Triton experts, nothing between them that depends on M."""

BLOCK = [128, 128]
"""The blocks that share a scale in block-quantised checkpoints."""

EIGHT_BITS = ("fp8", "w8a8_fp8", "compressed-tensors")
"""Methods of quantisation whose layers the probe can run; what a checkpoint of them says is looked at as well."""

FOUR_BITS = (
    "awq",
    "gptq",
    "awq_marlin",
    "gptq_marlin",
    "marlin",
    "moe_wna16",
    "auto-round",
    "bitsandbytes",
    "gguf",
    "mxfp4",
    "modelopt_fp4",
)

EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def expert_count(hf: Any) -> tuple[str, int] | None:
    """Return the field of a model's configuration that says how many experts it has, and its number; None without."""
    return next(((n, int(getattr(hf, n))) for n in EXPERT_COUNTS if getattr(hf, n, 0)), None)


def experts_trouble(hf: Any, quantised: str | None) -> list[str]:
    """Return why a mixture of experts is not supported.

    Parameters
    ----------
    hf
        The model's Hugging Face configuration.
    quantised
        The method that its weights are quantised by.
    """
    found = expert_count(hf)
    if found is None:
        return []
    name = next(iter(getattr(hf, "architectures", None) or ["?"]))
    count = f"{found[0]}={found[1]}"
    if name not in EXPERT_MODELS:
        return [
            f"a mixture-of-experts model that was never reviewed, {name} ({count}); reviewed: {', '.join(EXPERT_MODELS)}"
        ]
    if quantised is not None:
        return [f"a mixture-of-experts model quantised by {quantised} ({count}): its experts take one activation scale for the "
                "whole batch, or kernels by the rows that an expert gets"]  # fmt: skip
    return []


def quantised_by(hf: Any, flag: str | None) -> str | None:
    """Return the method that a model's weights are quantised by: as its checkpoint says, else as SGLang was told."""
    said = _said(hf).get("quant_method")
    method = str(said) if said else flag
    return None if method in (None, "unquant") else method


def quantised_trouble(hf: Any, method: str | None, device: str) -> list[str]:
    """Return why a quantised model is not supported; the layers themselves are probed where nothing is returned.

    Parameters
    ----------
    hf
        The model's Hugging Face configuration.
    method
        :func:`quantised_by`.
    device
        That serves it.
    """
    if method is None:
        return []
    if method in FOUR_BITS:
        return [f"weights of 4 bits ({method}): their kernels add partial sums with atomics, in the order of arrival"]
    if method not in EIGHT_BITS:
        return [f"a model quantised by {method}: its kernels were never probed for row-invariance"]
    if device == "cpu":
        return [f"a model quantised by {method} on a CPU: only a GPU's kernels of 8 bits can be probed"]
    said = _said(hf)
    if method == "compressed-tensors":
        return [
            why for name, group in dict(said.get("config_groups") or {}).items() for why in _group_trouble(name, group)
        ]
    block = said.get("weight_block_size")
    if block is not None and list(block) != BLOCK:
        return [f"weights of 8 bits in blocks of {block}: only {BLOCK} can be probed"]
    return []


def _group_trouble(name: str, group: Mapping[str, Any]) -> list[str]:
    """Return what of a group of layers of a compressed-tensors checkpoint is not supported."""
    weights, rows = group.get("weights") or {}, group.get("input_activations") or {}
    if weights.get("num_bits") != 8 or weights.get("type") != "float":
        return [f"compressed-tensors {name}: weights of {weights.get('num_bits')} bits, type {weights.get('type')}: their kernels "
                "were never probed for row-invariance"]  # fmt: skip
    if rows.get("dynamic") and rows.get("strategy") == "tensor":
        return [f"compressed-tensors {name}: activations with one dynamic scale per tensor: it is taken over the whole batch, so a "
                "row's bits depend on its companions. Use a checkpoint with scales per token"]  # fmt: skip
    if weights.get("strategy") == "block" and list(weights.get("block_structure") or BLOCK) != BLOCK:
        return [f"compressed-tensors {name}: blocks of {weights.get('block_structure')}: only {BLOCK} can be probed"]
    return []


def _said(hf: Any) -> dict[str, Any]:
    """Return what a checkpoint says of its quantisation; empty where nothing."""
    said = getattr(hf, "quantization_config", None)
    if said is None:
        return {}
    return dict(said) if isinstance(said, Mapping) else dict(said.to_dict())
