"""Where a GPU's time goes under load, ours beside stock: kernels by kind, and the waits for the host. About 4 minutes.

    python3 tests/gpu/profile_load.py --out DIR                     on the GPU host; needs .gpu/ like truth.py
    python3 tests/gpu/profile_load.py --out DIR --loads 48,64 --rounds 4     before that, rounds of mixed_load.py on the same servers

Both servers stay up on one GPU. Each is profiled by SGLang's own /start_profile, GPU activities alone, so that the host runs at
its own speed, in three phases: `mixed` (prompts arrive while others decode), `decode` (all decode, none arrives), `prefill`
(prompts that want one token). A forward is what runs from one choice of tokens to the next (kernel_trace.py).

Before that, while nothing else runs, prompts of single lengths are prefilled one after another, and batches of some sizes decode:
what a forward of just that size takes.

DIR gets profile.json, results.json with the times of prompts and steps, the traces, and the servers' logs; with `host` what our hooks took by their own clock.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import kernel_trace  # noqa: E402
import mixed_steps  # noqa: E402
from mixed_load import Mixed  # noqa: E402
from truth import prepare  # noqa: E402

from sglang_margingate.bench import tables  # noqa: E402
from sglang_margingate.bench.servers.client import Client, Prompt, ServerError, run_together  # noqa: E402

AFTER = {"mixed": 2.0, "decode": 1.5, "prefill": 0.3}
"""Seconds from a phase's begin to its profile: by then its batch is full."""
PHASES = tuple(AFTER)
DECODES = [mixed_steps.Steps(600, rows, 96) for rows in (8, 24, 41, 52, 64)]
PREFILLS = {f"1 of {n}": (n,) for n in (64, 130, 200, 270, 330, 400, 460, 530, 600, 660, 730, 800, 900, 1000)}
"""What is timed while nothing else runs."""
COLUMNS = (
    "forwards", "mean_ms", "span_ms", "wait_ms", "mean_wait_ms", "longest_wait_ms", "busy", "kernels", "gemm_ms",
    "attention_ms", "small_ms", "copies_ms", "choice_ms", "other_ms",
)  # fmt: skip


def profile(client: Client, folder: Path, steps: int, activity: str) -> None:
    """Ask a server to profile its next forwards; it writes the trace when they are done."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = {"output_dir": str(folder), "num_steps": steps, "activities": [activity], "with_stack": False}
    answer = httpx.post(client.base_url + "/start_profile", json=asked, timeout=120)
    if answer.status_code != 200:
        print(f"POST /start_profile: HTTP {answer.status_code}: {answer.text[:200]}", flush=True)


def requests(phase: str, prompts: Sequence[Prompt], in_flight: int) -> tuple[list[Prompt], int]:
    """Return what a phase sends, and how many at once."""
    if phase == "decode":
        return [replace(p, max_tokens=256) for p in prompts[:in_flight]], in_flight
    if phase == "prefill":
        return [replace(p, max_tokens=1) for p in prompts], 8
    return list(prompts), in_flight


def run_phase(
    client: Client, phase: str, prompts: Sequence[Prompt], in_flight: int, folder: Path, steps: int, activity: str
) -> None:
    """Send a phase's requests, and profile in the midst of them."""
    sent, at_once = requests(phase, prompts, in_flight)
    client.flush_cache()
    timer = threading.Timer(AFTER[phase], profile, (client, folder, steps, activity))
    timer.start()
    run_together(client, sent, at_once)
    timer.join()


def host_of(client: Client) -> Any:
    """Return what our hooks took by their own clock; None for a server without them."""
    try:
        return client.status().get("host")
    except ServerError:
        return None


def measure(mixed: Mixed, name: str, client: Client) -> dict[str, Any]:
    """Profile one server in every phase."""
    args, out = mixed.args, mixed.out
    prompts = [chain.turns[0] for chain in next(iter(mixed.work.loads.values()))]
    run_together(client, prompts[: 2 * args.in_flight], args.in_flight)
    activity = "CPU" if mixed.cpu else "GPU"
    run_phase(
        client, "mixed", prompts, args.in_flight, out / name / "first", 3, activity
    )  # the first one loads the profiler
    found: dict[str, Any] = {}
    for phase in PHASES:
        folder = out / name / phase
        steps = args.steps // 8 if phase == "prefill" else args.steps  # several prompts share a forward
        run_phase(client, phase, prompts, args.in_flight, folder, steps, activity)
        files = sorted(folder.glob("*.json*"))
        work = [one for path in files for one in kernel_trace.read(path)]
        found[phase] = kernel_trace.summary(kernel_trace.forwards(work))
        found[phase + " kernels"] = kernel_trace.top(work, 14)
        mixed.say(f"{name}: {phase}: {len(work)} kernels and copies")
    found["host"] = host_of(client)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return the phases of every server beside one another."""
    rows = []
    for phase in PHASES:
        for name, of in found.items():
            cells = of.get(phase) or {}
            rows.append([phase, name, *(f"{cells[c]:.3g}" if c in cells else "-" for c in COLUMNS)])
    return tables.text(["phase", "mode", *(c.replace("_ms", "") for c in COLUMNS)], rows, (0, 1))


def main(argv: list[str] | None = None) -> int:
    """Run everything; the table comes last."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--modes", default="stock,ours")
    add("--in-flight", type=int, default=48)
    add("--loads", default="", help="requests in flight of the rounds before (that of the profile)")
    add("--rounds", type=int, default=0, help="rounds before, as of mixed_load.py (%(default)s)")
    add("--budget", type=float, default=480.0, help="seconds: no further round is begun where it would not end by then")
    add("--repeats", type=int, default=3, help="of prompts and steps alone; 0: none (%(default)s)")
    add("--requests", type=int, default=192)
    add("--lengths", default="64-1024:32-256", metavar="IN:OUT", help="tokens (%(default)s)")
    add("--steps", type=int, default=120, help="forwards of a profile (%(default)s)")
    add("--model", type=Path, help="folder of another model")
    add("--shape", type=Path, help="folder of another config.json, to be given random weights")
    add("--flags", type=shlex.split, default=[], help="further flags of every server, as one word")
    args = parser.parse_args(words)
    args.loads, args.identity = args.loads or str(args.in_flight), "none"
    if args.device == "cuda":
        prepare(words, Path(__file__))
    args.out.mkdir(parents=True, exist_ok=True)
    mixed = Mixed(args)
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        starting = {name: pool.submit(mixed.start, stack.enter_context(ExitStack()), name) for name in mixed.modes}
        served = [s for name, future in starting.items() if (s := mixed.ready(name, future)) is not None]
        mixed.rounds(served)
        mixed.measure_steps(served, args.repeats, DECODES, PREFILLS)
        for server in served:
            began, name = time.monotonic(), server.label
            try:
                found[name] = measure(mixed, name, server.client)
            except (ServerError, OSError) as error:
                mixed.say(f"{name}: {error}")
            mixed.say(f"{name}: profiled in {time.monotonic() - began:.0f} s")
            (mixed.out / "profile.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.rounds:
        print(mixed.table())
    if mixed.steps:
        print(tables.text(*mixed_steps.rows(mixed.steps, mixed.modes), (0,)))
    for name, of in found.items():
        print(f"{name}: host {json.dumps(of.get('host'))}")
    print(table(found), flush=True)
    return 0 if len(found) == len(mixed.modes) else 1


if __name__ == "__main__":
    sys.exit(main())
