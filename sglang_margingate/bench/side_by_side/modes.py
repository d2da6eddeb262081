"""Which servers ``margingate bench`` starts, and with which flags."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sglang_margingate.bench.options import UsageError, names
from sglang_margingate.bench.servers.process import OURS, STOCK
from sglang_margingate.bench.side_by_side.compare import MODES

NO_DETERMINISTIC = "SGLang's deterministic mode needs CUDA and does not exist on a CPU"
NO_FLASHINFER = "FlashInfer needs CUDA and does not exist on a CPU"

OWN = {
    "--margingate-policy": "choose with --modes",
    "--margingate-fast-path": "choose with --modes; canonical is the gate on the canonical fast path",
    "--enable-deterministic-inference": "choose with --modes; it is the mode deterministic",
    "--margingate-trace-dir": "use --trace-dir before the --",
    "--margingate-profile": "use --profile before the --",
    "--host": "leave it out",
    "--port": "use --port before the --",
}
"""Flags that bench sets itself, and what to do instead."""


class Command(NamedTuple):
    """A server's command line: ``python -m MODULE FLAGS``."""

    module: str
    flags: list[str]


def choose(wanted: Sequence[str] | None, cpu: bool) -> tuple[list[str], str]:
    """Return the modes to measure, and a note on what is left out.

    Raises
    ------
    UsageError
        A name is unknown, or of a mode that does not exist on this machine.
    """
    for mode in wanted or []:
        if mode not in MODES:
            raise UsageError(f"--modes: {mode!r} is unknown; use {', '.join(MODES)}")
        if MODES[mode].cuda and cpu:
            why = NO_DETERMINISTIC if mode == "deterministic" else NO_FLASHINFER
            raise UsageError(f"--modes: {why}; leave {mode} out")
    if wanted:
        return list(wanted), ""
    if cpu:
        return [m for m in MODES if not MODES[m].cuda], f"Not measured: {NO_DETERMINISTIC}."
    return list(MODES), ""


def check_flags(flags: Sequence[str], where: str = "--") -> None:
    """Refuse server flags that bench sets itself: they would turn every mode into the same one."""
    for flag in flags:
        name = flag.partition("=")[0]
        if name in OWN:
            raise UsageError(f"{where} {name}: bench sets it for each server; {OWN[name]}")


def parse_mode_flags(entries: Sequence[str]) -> dict[str, list[str]]:
    """Return the flags of each mode from ``NAME[,NAME]=FLAGS`` entries.

    Raises
    ------
    UsageError
        An entry has no modes or flags, names an unknown mode, or a flag that bench sets.
    """
    found: dict[str, list[str]] = {}
    for entry in entries:
        modes, _, text = entry.partition("=")
        try:
            flags = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--mode-flags {entry!r}: {error}; close the quotes") from None
        if not names(modes) or not flags:
            raise UsageError(f"--mode-flags {entry!r}: give modes and flags, as 'stock,log=--disable-radix-cache'")
        check_flags(flags, "--mode-flags")
        for mode in names(modes):
            if mode not in MODES:
                raise UsageError(f"--mode-flags {entry!r}: {mode!r} is unknown; use {', '.join(MODES)}")
            ours = next((f for f in flags if f.startswith("--margingate-")), None)
            if ours is not None and MODES[mode].stock:
                raise UsageError(f"--mode-flags {entry!r}: {ours} is not for {mode}, which is SGLang alone")
            found.setdefault(mode, []).extend(flags)
    return found


def command(
    mode: str, cpu: bool, flags: Sequence[str], extra: Sequence[str], trace_dir: Path, profile: Path | None
) -> Command:
    """Return the command of a mode's server."""
    chosen = MODES[mode]
    if chosen.stock:
        common = [*chosen.flags, *_without_ours(flags), *extra]
        # SGLang alone does not start on a CPU-only machine; under the policy off nothing of ours is attached.
        return Command(OURS, ["--margingate-policy", "off", *common]) if cpu else Command(STOCK, common)
    own = [*chosen.flags, "--margingate-trace-dir", str(trace_dir)]
    if profile is not None and chosen.gated and mode != "always":
        own += ["--margingate-profile", str(profile)]
    return Command(OURS, [*own, *flags, *extra])


def _without_ours(flags: Sequence[str]) -> list[str]:
    """Leave out ``--margingate-`` flags with their values."""
    out: list[str] = []
    ours = False
    for word in flags:
        if word.startswith("--"):
            ours = word.startswith("--margingate-")
        if not ours:
            out.append(word)
    return out


def device(cpu: bool) -> str:
    """Return the hardware's name; a GPU is asked in a process of its own, whose CUDA context ends with it."""
    from sglang_margingate.machine import device_name

    if cpu:
        return device_name("cpu")
    code = "from sglang_margingate.machine import device_name; print(device_name('cuda'))"
    try:
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown GPU"
    return asked.stdout.strip().rpartition("\n")[2]
