"""Which mixtures of experts and quantised checkpoints are supported, and what is said of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_margingate.settings.models import expert_count, experts_trouble, quantised_by, quantised_trouble

REVIEWED = ("Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM")


def hf(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**fields)


def groups(weights: dict[str, Any], rows: dict[str, Any] | None) -> SimpleNamespace:
    group = {"weights": weights, "input_activations": rows, "targets": ["Linear"]}
    return hf(quantization_config={"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})


EIGHT = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize("name", REVIEWED)
def test_reviewed_mixtures_pass_in_16_bits(name: str) -> None:
    assert experts_trouble(hf(num_experts=64, architectures=[name]), None) == []


def test_a_mixture_that_nobody_reviewed_is_named() -> None:
    (why,) = experts_trouble(hf(n_routed_experts=256, architectures=["DeepseekV3ForCausalLM"]), None)
    assert "DeepseekV3ForCausalLM" in why
    assert "n_routed_experts=256" in why
    assert all(name in why for name in REVIEWED)


def test_experts_of_8_bits_are_refused_for_their_scale() -> None:
    (why,) = experts_trouble(hf(num_experts=128, architectures=[REVIEWED[0]]), "fp8")
    assert "quantised by fp8" in why
    assert "scale for the whole batch" in why


def test_a_dense_model_has_no_experts() -> None:
    assert expert_count(hf()) is None
    assert experts_trouble(hf(architectures=["LlamaForCausalLM"]), "fp8") == []


def test_what_the_checkpoint_says_goes_before_the_flag() -> None:
    assert quantised_by(hf(quantization_config={"quant_method": "fp8"}), "w8a8_fp8") == "fp8"
    assert quantised_by(hf(), "w8a8_fp8") == "w8a8_fp8"
    assert quantised_by(hf(), "unquant") is None
    assert quantised_by(hf(), None) is None


@pytest.mark.parametrize(
    "config",
    [
        hf(),
        hf(
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
        ),
        hf(quantization_config={"quant_method": "fp8", "activation_scheme": "static"}),
        groups(EIGHT, {"dynamic": True, "strategy": "token"}),
        groups(EIGHT, {"dynamic": False, "strategy": "tensor"}),
        groups(EIGHT | {"strategy": "block", "block_structure": [128, 128]}, {"dynamic": True, "strategy": "group"}),
    ],
)
def test_weights_of_8_bits_pass_on_a_gpu(config: SimpleNamespace) -> None:
    method = quantised_by(config, "fp8")
    assert quantised_trouble(config, method, "cuda") == []
    assert "on a CPU" in quantised_trouble(config, method, "cpu")[0]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (hf(quantization_config={"quant_method": "gptq"}), "4 bits (gptq)"),
        (hf(quantization_config={"quant_method": "quark"}), "quantised by quark"),
        (hf(quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]}), "blocks of [64, 64]"),
        (groups({"num_bits": 4, "type": "int", "strategy": "group"}, None), "weights of 4 bits, type int"),
        (groups(EIGHT | {"type": "int"}, {"dynamic": True, "strategy": "token"}), "weights of 8 bits, type int"),
        (groups(EIGHT, {"dynamic": True, "strategy": "tensor"}), "one dynamic scale per tensor"),
        (groups(EIGHT | {"strategy": "block", "block_structure": [64, 128]}, None), "blocks of [64, 128]"),
    ],
)
def test_the_others_are_named(config: SimpleNamespace, says: str) -> None:
    (why,) = quantised_trouble(config, quantised_by(config, None), "cuda")
    assert says in why
    assert "\n" not in why


def test_an_object_of_transformers_is_read_too() -> None:
    said = SimpleNamespace(to_dict=lambda: {"quant_method": "awq"})
    assert quantised_by(hf(quantization_config=said), None) == "awq"
