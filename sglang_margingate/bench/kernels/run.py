"""Compare a model's kernels with their references and repeat them under load; a process of its own, a JSON object a line.

    python -m sglang_margingate.bench.kernels.run --device cuda --seconds 30 [--shape 32,8,128,4096,14336,128256]

A process of its own: a kernel that breaks a GPU's context takes nobody else with it, and the memory is free again when it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from sglang_margingate.bench.kernels.cases import Case, LeftOut, Shape, of_a_cpu, of_a_gpu
from sglang_margingate.bench.kernels.repeat import (
    PROCESS,
    STREAM,
    WAYS,
    HostRepeated,
    Repeated,
    bits_of,
    other_process,
    stream_load,
)

SMALL = Shape(8, 2, 64, 1024, 2816, 32_000)
"""What a CPU is given where the model's shape is not known."""

LEAST_TURN = 0.02
"""Seconds of a kernel in one way, at least."""


def say(row: dict[str, Any]) -> None:
    """Print one result."""
    print(json.dumps(row), flush=True)


def compare(case: Case) -> dict[str, Any]:
    """Run a kernel once and put it beside its reference; one that raises, as where it does not compile, is wrong."""
    assert case.reference is not None
    try:
        got, want = case.call().cpu(), case.reference().cpu()
    except Exception as error:
        return {"what": "compare", "kernel": case.name, "holds": False, "error": brief(error)}
    exact = not (case.rtol or case.atol)
    if exact:
        holds = torch.equal(bits_of(got.contiguous()), bits_of(want.contiguous()))
    else:
        holds = torch.allclose(got.float(), want.float(), rtol=case.rtol, atol=case.atol)
    apart = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
    return {"what": "compare", "kernel": case.name, "holds": holds, "exact": exact, "largest_difference": apart}


def brief(error: Exception) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cases_of(device: str, shape: Shape) -> list[Case]:
    """Return the cases that can be run, naming the others."""
    found = []
    for case in of_a_cpu(shape) if device == "cpu" else of_a_gpu(shape):
        if isinstance(case, LeftOut):
            say({"what": "left out", "kernel": case.name, "why": case.why})
        else:
            found.append(case)
    return found


def repeat(cases: list[Case], device: str, seconds: float) -> None:
    """Repeat every kernel in every way, ``seconds`` in all."""
    kind = HostRepeated if device == "cpu" else Repeated
    repeated: list[Repeated | HostRepeated] = []
    for case in cases:
        try:
            repeated.append(kind(case.name, case.call))
        except Exception as error:
            say({"what": "left out", "kernel": f"{case.name}, repeated", "why": brief(error)})
    ways = WAYS[device]
    turn = max(LEAST_TURN, seconds / max(1, len(repeated) * len(ways)))
    with stream_load(device) as load:
        for how in ways:
            with other_process(how == PROCESS, device):
                for kernel in repeated:
                    calls, differed, elements = kernel.run(turn, load if how == STREAM else None)
                    say({"what": "repeat", "kernel": kernel.name, "how": how, "calls": calls, "differed": differed,
                         "elements": elements})  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Compare, then repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--seconds", type=float, default=30.0, help="of repeating, all kernels together")
    parser.add_argument("--shape", default="", help="query heads, K/V heads, head size, hidden, inner, vocabulary")
    parser.add_argument("--no-compare", action="store_true", help="repeat only")
    args = parser.parse_args(argv)
    unknown = Shape() if args.device == "cuda" else SMALL
    shape = Shape(*map(int, args.shape.split(","))) if args.shape else unknown
    torch.manual_seed(0)
    cases = cases_of(args.device, shape)
    for case in cases:
        if case.reference is not None and not args.no_compare:
            say(compare(case))
    if args.seconds > 0:
        repeat(cases, args.device, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
