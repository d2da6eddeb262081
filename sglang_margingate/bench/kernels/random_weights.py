"""Write a checkpoint of random weights for a model shape: normal(0, 0.02), norms of 1. For numerics, not text.

    python -m sglang_margingate.bench.kernels.random_weights SHAPE_DIR OUT_DIR [DEVICE]

Shapes of Llama, Qwen2 (biases on q, k and v), Qwen3 (norms of queries and keys), and of Qwen3-MoE, OLMoE and Mixtral (a router and
experts). SGLang's
own ``--load-format dummy`` fills norms with values near 0 too, and leaves fused experts as they are, which makes degenerate
outputs. One fixed seed: every server of a session has the same weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


STD = 0.02
ARCHITECTURES = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "MixtralForCausalLM",
)  # fmt: skip

Sizes = dict[str, tuple[int, ...]]


def main(shape: Path, out: Path, device: str = "cuda") -> None:
    """Write the checkpoint of the shape in ``shape/config.json`` into ``out``.

    Raises
    ------
    ValueError
        It is of an architecture that is not written here.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((shape / "config.json").read_text())
    generator = torch.Generator(device).manual_seed(0)

    def tensor(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(size, dtype=torch.bfloat16)
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).mul_(STD).cpu()

    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    files = {"ends.safetensors": end_sizes(config)}
    for k in range(config["num_hidden_layers"]):
        sizes = {f"model.layers.{k}.{name}": size for name, size in layer_sizes(config).items()}
        files[f"layer-{k:02d}.safetensors"] = sizes
    for file, sizes in files.items():
        save_file({name: tensor(name, size) for name, size in sizes.items()}, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(sizes, file))
    shutil.copy(shape / "config.json", out)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def end_sizes(c: dict[str, Any]) -> Sizes:
    """Return the names and sizes of what stands before and after a model's layers."""
    table = c["vocab_size"], c["hidden_size"]
    head: Sizes = {} if c.get("tie_word_embeddings") else {"lm_head.weight": table}
    return {"model.embed_tokens.weight": table} | head | {"model.norm.weight": table[1:]}


def layer_sizes(c: dict[str, Any]) -> Sizes:
    """Return the names and sizes of one layer's weights, all layers being alike.

    Raises
    ------
    ValueError
        The architecture is not written here.
    """
    name = c["architectures"][0]
    if name not in ARCHITECTURES:
        raise ValueError(f"architectures: {name} is not written here; {', '.join(ARCHITECTURES)} are")
    hidden, dim = c["hidden_size"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    q, kv = dim * c["num_attention_heads"], dim * c["num_key_value_heads"]
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    sizes: Sizes = {f"self_attn.{part}.weight": size for part, size in attention.items()}
    if name == "Qwen3MoeForCausalLM":
        sizes["mlp.gate.weight"] = c["num_experts"], hidden
        for expert in range(c["num_experts"]):
            sizes |= _mlp(f"mlp.experts.{expert}", hidden, c["moe_intermediate_size"])
    elif name == "OlmoeForCausalLM":
        sizes["mlp.gate.weight"] = c["num_experts"], hidden
        for expert in range(c["num_experts"]):
            sizes |= _mlp(f"mlp.experts.{expert}", hidden, c["intermediate_size"])
        sizes |= {"self_attn.q_norm.weight": (q,), "self_attn.k_norm.weight": (kv,)}
    elif name == "MixtralForCausalLM":
        bank, inner = "block_sparse_moe", c["intermediate_size"]
        sizes[f"{bank}.gate.weight"] = c["num_local_experts"], hidden
        for expert in range(c["num_local_experts"]):
            at = f"{bank}.experts.{expert}"
            up = {f"{at}.w1.weight": (inner, hidden), f"{at}.w3.weight": (inner, hidden)}
            sizes |= up | {f"{at}.w2.weight": (hidden, inner)}
    else:
        sizes |= _mlp("mlp", hidden, c["intermediate_size"])
    if name == "Qwen2ForCausalLM":
        sizes |= {f"self_attn.{part}.bias": (q if part == "q_proj" else kv,) for part in ("q_proj", "k_proj", "v_proj")}
    if name.startswith("Qwen3"):
        sizes |= {f"self_attn.{part}_norm.weight": (dim,) for part in "qk"}
    norms: Sizes = {f"{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return sizes | norms


def _mlp(at: str, hidden: int, inner: int) -> Sizes:
    up: Sizes = {f"{at}.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    return up | {f"{at}.down_proj.weight": (hidden, inner)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
