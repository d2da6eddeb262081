"""Write a random checkpoint with weights of 8 bits in blocks of 128 x 128, as Qwen3's and DeepSeek's are shipped.

    python tests/gpu/random_fp8.py SHAPE_DIR OUT_DIR [DEVICE]

The weights are those of random_model.py, quantised: each block has a scale of its own, kept beside it as ``weight_scale_inv``, and
activations are quantised as they come, in groups of 128. Embeddings, the head, norms, biases and routers stay as they are.
Per-channel weights need no checkpoint: ``--quantization fp8`` makes them from one of 16 bits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from random_model import STD, end_sizes, layer_sizes
from safetensors.torch import save_file

BLOCK = 128
FP8 = torch.float8_e4m3fn
QUANTISATION = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
}  # fmt: skip


def main(shape: Path, out: Path, device: str = "cuda") -> None:
    """Write the checkpoint of the shape in ``shape/config.json`` into ``out``."""
    config = json.loads((shape / "config.json").read_text())
    generator = torch.Generator(device).manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    files = {"ends.safetensors": end_sizes(config)}
    for k in range(config["num_hidden_layers"]):
        files[f"layer-{k:02d}.safetensors"] = {f"model.layers.{k}.{n}": s for n, s in layer_sizes(config).items()}
    for file, sizes in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for name, size in sizes.items():
            if "norm" in name:
                tensors[name] = torch.ones(size, dtype=torch.bfloat16)
                continue
            drawn = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).mul_(STD)
            if name.endswith("_proj.weight"):
                drawn, scale = quantised(drawn)
                tensors[f"{name}_scale_inv"] = scale.cpu()
            tensors[name] = drawn.cpu()
        save_file(tensors, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTISATION}))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight in 8 bits and the scales of its blocks: what a number of 8 bits is multiplied by."""
    rows, columns = (-(-n // BLOCK) for n in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32, device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(FP8).max
    small = (blocks / scale[:, None, :, None]).view(padded.shape).to(FP8)
    return small[: weight.shape[0], : weight.shape[1]].contiguous(), scale


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
