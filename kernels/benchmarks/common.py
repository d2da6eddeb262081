"""What the kernel benchmarks share: timing by CUDA graphs, the copy bandwidth, the table.

A call is timed inside a CUDA graph of many calls that rotate among several input sets, so that neither the launch from
Python nor inputs left in the L2 cache flatter or hide anything; the gap between two kernels of a graph is counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

Call = Callable[[], object]


class Timing(NamedTuple):
    """Microseconds of one call over the graph's replays."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""


def time_calls(calls: Sequence[Call], *, rounds: int = 4, replays: int = 40) -> Timing:
    """Time one call of ``calls`` (the same work on different inputs), captured ``rounds`` times over in one graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    samples = []
    for replay in range(replays + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 5:
            samples.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    deciles = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), deciles[0], deciles[-1])


def input_sets(bytes_each: int, *, at_least: int = 4, total: int = 256 * 2**20) -> int:
    """Return how many input sets to rotate among: together over five times an H100's L2."""
    return min(max(at_least, -(-total // max(bytes_each, 1))), 64)


def copy_bandwidths(megabytes: int = 1024) -> dict[str, float]:
    """Measure large device copies, in GB/s, counting bytes read plus bytes written.

    Three ways, since the driver's copy is not the fastest one everywhere: a driver copy from Python and in a graph, and
    an elementwise kernel that reads and writes as much.
    """
    source = torch.randint(0, 2**31 - 1, (megabytes * 2**18,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "copy_": lambda: target.copy_(source),
        "bitwise_not": lambda: torch.bitwise_not(source, out=target),
    }
    times = {"copy_ (eager)": eager_time(calls["copy_"], repeats=20)}
    times |= {name: time_calls([call], rounds=4, replays=20).median for name, call in calls.items()}
    return {name: 2 * source.nbytes / time / 1e3 for name, time in times.items()}


def eager_time(call: Call, *, repeats: int = 200) -> float:
    """Return microseconds of one call from Python, back to back: the larger of its launch and its work."""
    for _ in range(10):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / repeats


def environment() -> dict[str, str]:
    """Describe hardware and versions."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "capability": f"{properties.major}.{properties.minor}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser with the flags of every benchmark."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    return result


def start() -> tuple[dict[str, str], float]:
    """Print hardware, versions and the best copy bandwidth; exit where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; the kernels' correctness is tested without one: see tests/unit")
    env = environment()
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    copies = copy_bandwidths()
    copy = max(copies.values())
    ways = ", ".join(f"{name} {rate:.0f}" for name, rate in copies.items())
    print(f"copy bandwidth, 1 GiB, read + written: {copy:.0f} GB/s (best of {ways})\n")
    return env, copy


def tune(
    module: object, names: Sequence[str], trials: Sequence[Sequence[int]], data: dict[str, Callable[[], Sequence[Call]]]
) -> None:
    """Print the time in microseconds of each named set of calls, made anew under each trial of a module's constants."""
    print(*names, *data, flush=True)
    for values in trials:
        for name, value in zip(names, values):
            setattr(module, name, value)
        try:
            times = [time_calls(calls(), replays=10).median for calls in data.values()]
        except Exception as error:  # too much shared memory
            print(*values, str(error).splitlines()[0][:100], flush=True)
            continue
        print(*values, *(f"{t:.1f}" for t in times), flush=True)


def table(rows: Sequence[dict[str, object]]) -> str:
    """Format rows of equal keys as a Markdown table."""
    head = list(rows[0])
    text = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = [head, ["---"] * len(head), *text]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finish(path: Path | None, env: dict[str, str], copy: float, rows: Sequence[dict[str, object]]) -> None:
    """Print the table and write the JSON file if one was asked for."""
    print(table(rows))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": env, "copy_gb_s": copy, "rows": list(rows)}, indent=1) + "\n")
