"""Mixtures of experts of random weights, small enough for a test, beside the embedded model's tokenizer.

Qwen3-MoE, OLMoE and Mixtral differ in their router (which scores add up to one) and in their norms. One layer of four experts, two to a row. The way back from an expert's 1,536 intermediate values is a product that CPUs sum in
another order for one row than for several, so a row's bits depend on how many others go to its expert. Most of it are large
terms that appear with both signs: they leave nothing but rounding, or nobody would see the order in 64 rounded sums.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_margingate.demo.paths import model_path

HIDDEN, INNER, EXPERTS, HEADS, KV_HEADS, DIM = 64, 1536, 4, 4, 2, 16
PAIRS, LARGE = 512, 4096.0
"""Intermediate values that appear twice, and the factor of their way back."""
STD = 0.25
"""Large: rows that differ in one bit part soon."""


FAMILIES = ("moe", "olmoe", "mixtral")
"""Qwen3-MoE, OLMoE, Mixtral."""


def write(folder: Path, family: str = "moe") -> Path:
    """Write the checkpoint of a family into a folder; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = model_path()
    for file in source.iterdir():
        if "token" in file.name or file.suffix in (".jinja", ".model"):
            shutil.copy(file, folder)
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * STD).bfloat16()

    weights = {"model.embed_tokens.weight": normal(vocab, HIDDEN), "lm_head.weight": normal(vocab, HIDDEN)}
    at = "model.layers.0."
    kv_heads = kv_heads_of(family)
    for part, rows in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
        weights[f"{at}self_attn.{part}_proj.weight"] = normal(rows * DIM, HIDDEN)
    weights[f"{at}self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * DIM)
    bank, gate, up, down = (
        ("block_sparse_moe", "w1", "w3", "w2") if family == "mixtral" else ("mlp", "gate_proj", "up_proj", "down_proj")
    )
    weights[f"{at}{bank}.gate.weight"] = normal(EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        for part in (gate, up):
            there = normal(INNER, HIDDEN)
            there[PAIRS : 2 * PAIRS] = there[:PAIRS]
            weights[f"{at}{bank}.experts.{expert}.{part}.weight"] = there
        back = normal(HIDDEN, INNER)
        back[:, :PAIRS] *= LARGE
        back[:, PAIRS : 2 * PAIRS] = -back[:, :PAIRS]
        weights[f"{at}{bank}.experts.{expert}.{down}.weight"] = back
    norms = {"model.norm": HIDDEN, f"{at}input_layernorm": HIDDEN, f"{at}post_attention_layernorm": HIDDEN}
    if family == "moe":
        norms |= {f"{at}self_attn.{part}_norm": DIM for part in "qk"}
    elif family == "olmoe":
        norms |= {f"{at}self_attn.q_norm": HEADS * DIM, f"{at}self_attn.k_norm": kv_heads * DIM}
    weights |= {f"{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(vocab, family), indent=1))
    return folder


def kv_heads_of(family: str) -> int:
    """Return a family's K/V heads: OLMoE has as many as query heads."""
    return HEADS if family == "olmoe" else KV_HEADS


def config(vocab: int, family: str = "moe") -> dict[str, object]:
    """Return the model's configuration."""
    name, kind = {
        "moe": ("Qwen3MoeForCausalLM", "qwen3_moe"), "olmoe": ("OlmoeForCausalLM", "olmoe"), "mixtral": ("MixtralForCausalLM", "mixtral"),
    }[family]  # fmt: skip
    return {
        "architectures": [name], "model_type": kind, "num_local_experts": EXPERTS, "clip_qkv": None, "torch_dtype": "bfloat16", "vocab_size": vocab,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": kv_heads_of(family), "head_dim": DIM, "num_experts": EXPERTS,
        "num_experts_per_tok": 2, "norm_topk_prob": family != "olmoe", "decoder_sparse_step": 1, "mlp_only_layers": [],
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "attention_bias": False, "tie_word_embeddings": False, "eos_token_id": vocab - 1, "bos_token_id": 1,
        "use_sliding_window": False, "sliding_window": None,
    }  # fmt: skip
