"""Random checkpoints of 8 bits: what is quantised, how far it is from what it was, and that SGLang's own kernel reads it so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))

import random_fp8

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 1, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip


def test_projections_are_quantised_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text(json.dumps(CONFIG))
    random_fp8.main(tmp_path / "shape", tmp_path / "out", "cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"quantization_config": random_fp8.QUANTISATION}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {name: load_file(tmp_path / "out" / file)[name] for name, file in index.items()}
    small = {name for name, w in weights.items() if w.dtype == torch.float8_e4m3fn}
    at = "model.layers.0."
    parts = [f"self_attn.{p}" for p in "qkvo"] + [f"mlp.{p}" for p in ("gate", "up", "down")]
    assert small == {f"{at}{part}_proj.weight" for part in parts}
    assert {name for name, w in weights.items() if w.dtype == torch.float32} == {f"{n}_scale_inv" for n in small}
    assert weights[f"{at}mlp.up_proj.weight_scale_inv"].shape == (3, 2)
    assert weights["lm_head.weight"].dtype == torch.bfloat16


def test_a_quantised_weight_is_what_it_was_but_for_its_rounding() -> None:
    weight = torch.randn(200, 300)
    weight[0, 0] = 50.0  # a block of another range than its neighbours
    small, scale = random_fp8.quantised(weight)
    assert scale.shape == (2, 3)
    back = small.float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    error = (back - weight).abs()
    assert float(error[128:].max()) < 4 * 2**-4
    assert float((error / scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]).max()) <= 16
    assert torch.equal(small.float().abs().amax(), torch.tensor(448.0))
