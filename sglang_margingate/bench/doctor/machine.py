"""What the machine is, and which versions stand on it; no part of this needs SGLang, PyTorch or a GPU."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.doctor.findings import Finding, State, Table

QUERY = "name,memory.total,compute_cap,driver_version"


class Gpu(NamedTuple):
    """One GPU, as its driver describes it."""

    name: str
    memory: int
    """Bytes."""
    capability: str
    driver: str


def gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi names; none where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    shown = [int(word) for word in visible if word.isdigit()]
    found = []
    for number, line in enumerate(text.splitlines()):
        fields = [field.strip() for field in line.split(",")]
        if shown and number not in shown:
            continue
        if len(fields) == 4 and fields[1].isdigit():
            found.append(Gpu(fields[0], int(fields[1]) * 2**20, fields[2], fields[3]))
    return found


def host_memory() -> int | None:
    """Return the bytes that a new process may take, or None where that cannot be read."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def uses_gpu() -> bool | None:
    """Return whether a server here would run on a GPU; None where there is no PyTorch to tell."""
    if find_spec("torch") is None:
        return None
    from sglang_margingate.serving.cpu import is_cpu_host

    return not is_cpu_host()


def machine() -> Finding:
    """Describe the machine. Its name and its users are left out: the report is made to be shown."""
    from sglang_margingate.machine import device_name

    cards, memory, on_gpu = gpus(), host_memory(), uses_gpu()
    rows: list[tuple[object, ...]] = [
        ("system", f"{platform.system()} {platform.machine()}, kernel {platform.release().split('-')[0]}"),
        ("CPU", device_name("cpu")),
        (
            "cores that may be used",
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        ),
    ]
    if memory is not None:
        rows.append(("memory available", f"{memory / 1e9:.1f} GB"))
    rows += [
        (f"GPU {n}", f"{g.name}, {g.memory / 1e9:.1f} GB, capability {g.capability}, driver {g.driver}")
        for n, g in enumerate(cards)
    ]
    said = f"{len(cards)} x {cards[0].name}" if cards else "no GPU"
    if cards and not on_gpu:
        said += ", but PyTorch cannot use it" if on_gpu is False else ", and no PyTorch to use it"
    details: dict[str, Any] = {"gpus": [g._asdict() for g in cards], "uses_gpu": on_gpu, "memory_available": memory}
    return Finding(State.NOTED, f"{said}; {rows[1][1]}", [Table("Machine", ("what", "which"), rows)], details)


def versions() -> Finding:
    """Describe what is installed, and whether this SGLang is one that was tested."""
    from sglang_margingate import machine as known

    found = {**known.versions(), **known.installed(tuple(dict.fromkeys((*known.PACKAGES, *known.KERNEL_PACKAGES))))}
    names = (*known.KERNEL_SETTINGS_CPU, *known.KERNEL_SETTINGS_GPU)
    settings = {name: os.environ[name] for name in names if name in os.environ}
    if find_spec("torch") is None:
        said, state = "PyTorch and SGLang are not installed: pip install 'sglang-margingate[gpu]'", State.NOTED
    else:
        from sglang_margingate.settings.support import TESTED, version_trouble

        trouble = version_trouble()
        tested = f"SGLang {found.get('sglang')}, one of the tested ({', '.join(TESTED)})"
        said, state = trouble or tested, State.NOTED if trouble else State.HOLDS
    rows: list[tuple[object, ...]] = [*found.items(), *settings.items()]
    details = {"versions": found, "settings": settings}
    return Finding(state, said, [Table("Versions", ("package or setting", "value"), rows)], details)
