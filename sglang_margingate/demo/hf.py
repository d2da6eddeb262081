"""Load a model folder through transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

_kept: list[Any] = []


def mend_torchvision() -> None:
    """Let transformers import where torchvision was built for another torch (its CUDA wheel beside CPU torch).

    Such a torchvision fails on import because its ``nms`` operators are not there; they are declared and never called.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def load_tokenizer(path: str | Path) -> Any:
    """Load a tokenizer folder."""
    mend_torchvision()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path))


def load_model(path: str | Path, device: str = "cpu") -> Any:
    """Load a model folder in bf16, ready to run."""
    mend_torchvision()
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.bfloat16)
    return model.to(device).eval()
