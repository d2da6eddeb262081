"""Names and versions that bind a run or a profile to what it was measured on."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

EMBEDDED_MODEL = Path(__file__).resolve().parent / "demo" / "model"

PACKAGES = ("sglang-margingate", "sglang", "torch", "triton", "flashinfer-python", "transformers")

KERNEL_PACKAGES = (
    "sglang-margingate",
    "sglang",
    "sglang-kernel",
    "torch",
    "triton",
    "sgl-deep-gemm",
    "flashinfer-python",
)
"""Packages that bring or choose kernels of linear layers and experts, or probe them."""

CUBLAS_PACKAGES = ("nvidia-cublas", "nvidia-cublas-cu13", "nvidia-cublas-cu12")

KERNEL_SETTINGS_GPU = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "DISABLE_ADDMM_CUDA_LT",
    "NVIDIA_TF32_OVERRIDE",
)
KERNEL_SETTINGS_CPU = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
)
"""Environment variables that make a library choose other kernels."""

_VECTOR_UNITS = re.compile(r"avx|amx|fma|f16c|sse4|asimd|sve|sme(?!p)|bf16|i8mm")


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide bits, absent ones left out."""
    return {"python": platform.python_version(), **installed(PACKAGES)}


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those of these packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def kernel_environment(device: str) -> dict[str, str]:
    """Return what an invariance map is bound to: hardware, driver, libraries and settings that choose kernels.

    What cannot be read or is not set is left out. The values are texts, so that a map read from JSON compares equal.
    """
    import torch

    cpu = device == "cpu"
    facts = {"device": device_name(device), **(_cpu_facts() if cpu else _gpu_facts()), **installed(KERNEL_PACKAGES)}
    if torch.version.cuda:
        facts["cuda"] = torch.version.cuda
    settings = KERNEL_SETTINGS_CPU if cpu else KERNEL_SETTINGS_GPU
    return facts | {name: os.environ[name] for name in settings if name in os.environ}


def _gpu_facts() -> dict[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "compute_capability": f"{properties.major}.{properties.minor}",
        # A MIG slice may carry the whole GPU's name.
        "multiprocessors": str(properties.multi_processor_count),
        "blas": str(torch.backends.cuda.preferred_blas_library()),
        "bf16_reduced_precision_reduction": str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
    }
    cublas = next(iter(installed(CUBLAS_PACKAGES).values()), None)  # absent where the system's is used
    driver = nvidia_driver()
    return facts | {k: v for k, v in (("cublas", cublas), ("driver", driver)) if v is not None}


def nvidia_driver(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel driver, or None where it cannot be read."""
    try:
        line = proc.read_text().splitlines()[0]  # NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu ...
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)*\b", line)
        if found:
            return found.group()
    except (OSError, IndexError):
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip().split("\n")[0].strip() or None


def _cpu_facts() -> dict[str, str]:
    """Return what tells two CPUs of one name apart: virtual machines call several generations the same."""
    import torch

    facts = {"threads": str(torch.get_num_threads()), "torch_cpu": torch.backends.cpu.get_cpu_capability()}
    lines = _cpuinfo()
    numbers = [f"{name} {lines[name]}" for name in ("cpu family", "model", "stepping") if name in lines]
    if numbers:
        facts["cpu"] = ", ".join(numbers).removeprefix("cpu ")
    units = sorted(flag for flag in lines.get("flags", lines.get("Features", "")).split() if _VECTOR_UNITS.match(flag))
    if units:
        facts["vector_units"] = " ".join(units)
    return facts


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


@lru_cache
def device_name(device: str) -> str:
    """Return the hardware's own name: the GPU's, or the CPU's model and count."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    model = _cpuinfo().get("model name") or platform.processor() or platform.machine()
    return f"{model} ({os.cpu_count()} CPUs)"


def model_name(path: str) -> str:
    """Return the name of a model folder or hub id; the embedded model's folder is called `model`."""
    if os.path.isdir(path) and EMBEDDED_MODEL.is_dir() and os.path.samefile(path, EMBEDDED_MODEL):
        return "margingate-demo"
    return os.path.basename(os.path.normpath(path))
