"""Which implementation runs: Triton on a GPU or in its interpreter, plain PyTorch everywhere else."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def has_triton() -> bool:
    """Return whether a real Triton is installed; SGLang's stand-in module has a spec without an origin."""
    try:
        spec = importlib.util.find_spec("triton")
    except ValueError:  # a module without a spec
        return False
    return spec is not None and spec.origin is not None


def use_triton(tensor: torch.Tensor) -> bool:
    """Return whether a kernel on ``tensor`` runs through Triton (never imports Triton)."""
    return (tensor.is_cuda or interpreted()) and has_triton()


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the device of ``tensor``; mostly it is current already."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
