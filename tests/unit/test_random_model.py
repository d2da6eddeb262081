"""The random checkpoints of GPU sessions: the names and sizes that each architecture's checkpoints have, and no two alike."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import random_model

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
ENDS = {"model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64), "model.norm.weight": (64,)}
NORMS = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
MLP = {"mlp.gate_proj.weight": (96, 64), "mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96)}


def attention(dim: int) -> dict[str, tuple[int, ...]]:
    sizes = {"q_proj": (4 * dim, 64), "k_proj": (2 * dim, 64), "v_proj": (2 * dim, 64), "o_proj": (64, 4 * dim)}
    return {f"self_attn.{name}.weight": size for name, size in sizes.items()}


BIASES = {"self_attn.q_proj.bias": (64,), "self_attn.k_proj.bias": (32,), "self_attn.v_proj.bias": (32,)}
QK_NORMS = {"self_attn.q_norm.weight": (32,), "self_attn.k_norm.weight": (32,)}
EXPERTS = {"mlp.gate.weight": (3, 64)}
for e in range(3):
    EXPERTS |= {f"mlp.experts.{e}.{n}_proj.weight": (48, 64) for n in ("gate", "up")}
    EXPERTS |= {f"mlp.experts.{e}.down_proj.weight": (64, 48)}
OLMOE = {"mlp.gate.weight": (2, 64), "self_attn.q_norm.weight": (64,), "self_attn.k_norm.weight": (32,)}
MIXTRAL = {"block_sparse_moe.gate.weight": (2, 64)}
for e in range(2):
    OLMOE |= {f"mlp.experts.{e}.{n}_proj.weight": (96, 64) for n in ("gate", "up")}
    OLMOE |= {f"mlp.experts.{e}.down_proj.weight": (64, 96)}
    MIXTRAL |= {f"block_sparse_moe.experts.{e}.{n}.weight": (96, 64) for n in ("w1", "w3")}
    MIXTRAL |= {f"block_sparse_moe.experts.{e}.w2.weight": (64, 96)}
SHAPES = {
    "LlamaForCausalLM": ({}, attention(16) | MLP),
    "Qwen2ForCausalLM": ({}, attention(16) | MLP | BIASES),
    "Qwen3ForCausalLM": ({"head_dim": 32}, attention(32) | MLP | QK_NORMS),
    "Qwen3MoeForCausalLM": (
        {"head_dim": 32, "num_experts": 3, "moe_intermediate_size": 48},
        attention(32) | EXPERTS | QK_NORMS,
    ),
    "OlmoeForCausalLM": ({"num_experts": 2}, attention(16) | OLMOE),
    "MixtralForCausalLM": ({"num_local_experts": 2}, attention(16) | MIXTRAL),
}


def write(folder: Path, config: dict[str, object]) -> dict[str, torch.Tensor]:
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(json.dumps(config))
    random_model.main(folder / "shape", folder / "model", "cpu")
    index = json.loads((folder / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    found = {file: load_file(folder / "model" / file) for file in set(index.values())}
    weights = {name: found[file][name] for name, file in index.items()}
    assert sum(len(tensors) for tensors in found.values()) == len(weights)
    assert json.loads((folder / "model" / "config.json").read_text()) == config
    return weights


@pytest.mark.parametrize("name", SHAPES)
def test_the_checkpoint_is_whole(tmp_path: Path, name: str) -> None:
    more, layer = SHAPES[name]
    weights = write(tmp_path, COMMON | more | {"architectures": [name]})
    expected = {f"model.layers.{k}.{part}": size for k in range(2) for part, size in (layer | NORMS).items()} | ENDS
    assert {at: tuple(tensor.shape) for at, tensor in weights.items()} == expected
    assert all(bool((tensor == 1).all()) for at, tensor in weights.items() if "norm" in at)
    drawn = [tensor.float() for at, tensor in weights.items() if "norm" not in at]
    assert all(abs(float(t.std()) - random_model.STD) < 0.002 for t in drawn if t.numel() > 2000)
    assert len({float(t.flatten()[:8].sum()) for t in drawn}) == len(drawn)


def test_a_tied_head_is_left_out(tmp_path: Path) -> None:
    weights = write(tmp_path, COMMON | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True})
    assert "lm_head.weight" not in weights


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architectures: GemmaForCausalLM is not written here"):
        write(tmp_path, COMMON | {"architectures": ["GemmaForCausalLM"]})
