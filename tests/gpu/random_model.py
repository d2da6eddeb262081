"""Write a checkpoint of random weights for a model shape: normal(0, 0.02), norms of 1, no bias. For numerics, not text.

``python tests/gpu/random_model.py SHAPE_DIR OUT_DIR [DEVICE]`` (Llama shapes). SGLang's own ``--load-format dummy`` fills norms
with values near 0 too, which makes degenerate outputs. One fixed seed: every server of a session has the same weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

STD = 0.02


def main(shape: Path, out: Path, device: str = "cuda") -> None:
    c = json.loads((shape / "config.json").read_text())
    hidden, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).mul_(STD).cpu()

    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(shape / "config.json", out)
    one = torch.ones(hidden, dtype=torch.bfloat16)
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, out / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    save("ends.safetensors", {"model.embed_tokens.weight": normal(vocab, hidden), "lm_head.weight": normal(vocab, hidden),
                              "model.norm.weight": one})  # fmt: skip
    for k in range(c["num_hidden_layers"]):
        at = f"model.layers.{k}."
        sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                 "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                 "mlp.down_proj": (hidden, inner)}  # fmt: skip
        layer = {f"{at}{name}.weight": normal(*size) for name, size in sizes.items()}
        layer |= {f"{at}{name}.weight": one.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        save(f"layer-{k:02d}.safetensors", layer)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
