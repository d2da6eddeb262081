"""Look for races: a kernel on the same input very often, alone and under load, with every result's bits compared.

What depends on a shape shows in one comparison; what depends on time shows in one of many thousands. On a GPU calls and their
comparisons run inside CUDA graphs: alone, beside another stream that keeps the GPU busy, and beside another process, with
which the GPU is shared by time slices (a kernel is stopped wherever it is, which moves its warps apart as nothing else
does). On a CPU they run alone and beside another process that keeps every core busy.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sglang_margingate.bench.kernels.cases import Call, normal

CALLS = 25
"""Calls in one CUDA graph."""
ALONE, STREAM, PROCESS = "alone", "beside a stream", "beside a process"
WAYS = {"cuda": (ALONE, STREAM, PROCESS), "cpu": (ALONE, PROCESS)}


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """Return what is compared: bfloat16 as whole numbers, so that NaN equals itself."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


class Repeated:
    """A kernel of a GPU, its first result, and a CUDA graph of many calls that counts those with other bits.

    The graph reads what the call and the first result hold, so both are kept.
    """

    def __init__(self, name: str, call: Call) -> None:
        self.name, self._call = name, call
        self._bits = bits = bits_of(call().clone())
        self._differed, self._elements = torch.zeros(2, dtype=torch.int64, device="cuda").unbind()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(CALLS):
                wrong = (call().view(bits.dtype) != bits).sum()
                self._differed += wrong > 0
                self._elements += wrong

    def run(self, seconds: float, load: Callable[[], object] | None) -> list[int]:
        """Return how often the kernel ran, how many of its results differed, and in how many elements."""
        before, calls, end = self._counts(), 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(10):
                if load is not None:
                    load()
                self._graph.replay()
                calls += CALLS
            torch.cuda.synchronize()
        return [calls, *(now - then for now, then in zip(self._counts(), before))]

    def _counts(self) -> list[int]:
        return [int(self._differed), int(self._elements)]


class HostRepeated:
    """The same on a CPU, one call after another."""

    def __init__(self, name: str, call: Call) -> None:
        self.name, self._call = name, call
        self._bits = bits_of(call().clone())

    def run(self, seconds: float, _load: Callable[[], object] | None) -> list[int]:
        """Return how often the kernel ran, how many of its results differed, and in how many elements."""
        calls = differed = elements = 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            wrong = int((bits_of(self._call()) != self._bits).sum())
            calls, differed, elements = calls + 1, differed + (wrong > 0), elements + wrong
        return [calls, differed, elements]


def busy() -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """Return a graph of other work on a GPU, products and copies, and the tensors that it uses."""
    a, b = normal("cuda", 640, 4096), normal("cuda", 4096, 4096)
    source = torch.empty(2**24, dtype=torch.int32, device="cuda")
    target, out = torch.empty_like(source), torch.empty(640, 4096, dtype=torch.bfloat16, device="cuda")
    torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(6):
            torch.mm(a, b, out=out)
            target.copy_(source)
    return graph, [a, b, source, target, out]


@contextmanager
def stream_load(device: str) -> Iterator[Callable[[], object]]:
    """Give what puts other work on another stream of the GPU; on a CPU it does nothing."""
    if device == "cpu":
        yield lambda: None
        return
    side, (graph, _kept) = torch.cuda.Stream(), busy()

    def load() -> None:
        with torch.cuda.stream(side):
            graph.replay()

    yield load


@contextmanager
def other_process(wanted: bool, device: str = "cuda") -> Iterator[None]:
    """Keep the GPU, or every core, busy from another process meanwhile.

    Raises
    ------
    RuntimeError
        It did not start.
    """
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-m", __name__, device], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "busy\n":
            raise RuntimeError("the other process did not start")
        yield
    finally:
        process.kill()
        process.wait()


def keep_busy(device: str) -> None:
    """Be that process."""
    if device == "cpu":
        a = torch.randn(640, 640)
        print("busy", flush=True)
        while True:
            torch.mm(a, a)
    load, _kept = busy()
    print("busy", flush=True)
    while True:
        for _ in range(20):
            load.replay()
        torch.cuda.synchronize()


if __name__ == "__main__":
    keep_busy(sys.argv[1])
