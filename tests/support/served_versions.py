"""Servers of other SGLang versions on the CPU: overlays on the one environment."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from importlib.metadata import version as installed_version
from pathlib import Path

import overlays
from contract import recorded

from sglang_margingate.bench.servers.client import Completion
from sglang_margingate.bench.servers.process import Server, serve

VERSIONS = recorded()
PROMPTS, CONCURRENCY, TOKENS = 48, 16, 64


def environment(version: str) -> dict[str, str]:
    """Return the variables with which a process of this Python finds that SGLang."""
    if version == installed_version("sglang"):
        return {}
    paths = [str(overlays.overlay(version)), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def serving(version: str, *flags: str, log: Path, **variables: str) -> AbstractContextManager[Server]:
    """Start a server of one SGLang version; its traces lie beside its log."""
    trace = ["--margingate-trace-dir", str(log.parent / "traces")]
    return serve([*flags, *trace], log=log, env={**variables, **environment(version)}, timeout=400)


def identical(name: str, alone: list[Completion], other: list[Completion]) -> int:
    """Return how many answers are the same, and say so in the test's output."""
    same = sum(a.same_as(b) for a, b in zip(alone, other))
    print(f"{name}: {same}/{len(alone)} identical")
    return same
