"""Names and versions that bind a run or a profile to what it was measured on."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("sglang-margingate", "sglang", "torch", "triton", "flashinfer-python", "transformers")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide bits, absent ones left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache
def device_name(device: str) -> str:
    """Return the hardware's own name: the GPU's, or the CPU's model and count."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model} ({os.cpu_count()} CPUs)"


def model_name(path: str) -> str:
    """Return the name of a model folder or hub id; the embedded model's folder is called `model`."""
    from sglang_margingate.demo.paths import model_path

    if os.path.isdir(path) and os.path.samefile(path, model_path()):
        return "margingate-demo"
    return os.path.basename(os.path.normpath(path))
