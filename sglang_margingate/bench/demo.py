"""``make demo``: serve the embedded model, show that stock decoding flips and the gate does not, open the dashboard.

One server with the gate runs the same prompts four times: alone and in a batch, first with each request asking for
``log`` (stock decoding, observed) and then for ``gate``. It keeps serving until Ctrl-C; ``--once`` ends by itself.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Client, Completion, ServerError, run_alone, run_together
from sglang_margingate.bench.servers.process import GATE_ALONE, serve

CONCURRENCY = 16
THRESHOLD = 0.0625
"""Calibrated for the embedded model on a CPU (docs/benchmarks.md)."""


def show(client: Client, count: int, max_new_tokens: int, console: Console) -> bool:
    """Run the workload and print its table; return whether the gate kept every sequence."""
    prompts = demo_prompts(count)
    table = Table(title=f"{count} prompts, alone and with {CONCURRENCY} requests in flight, temperature 0")
    for name in ("policy", "identical sequences", "steps", "triggered", "flips repaired", "tokens/s in the batch"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    kept = False
    with Progress(console=console) as progress:
        for policy in ("log", "gate"):
            task = progress.add_task(f"{policy}: alone, then together", total=2 * count)
            options: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "custom": {"margingate_policy": policy, "margingate_repeat": 0},
                "done": lambda task=task: progress.advance(task),
            }
            alone = run_alone(client, prompts, **options)
            options["custom"] = {**options["custom"], "margingate_repeat": 1}  # tells the two passes apart in the trace
            start = time.perf_counter()
            together = run_together(client, prompts, CONCURRENCY, **options)
            table.add_row(*_row(policy, alone, together, time.perf_counter() - start))
            kept = all(a.same_as(b) for a, b in zip(alone, together))
    console.print(table)
    console.print(
        "A flip is a step whose token is not that of a forward of the verify's own shape: at a batch of 1 too, so that an "
        "answer is the same alone and in company.",
        soft_wrap=True,
    )
    flipped = [(a, b) for a, b in zip(alone, together) if not a.same_as(b)]
    if flipped:
        console.print(f"{len(flipped)} gated sequences differ: see the Compare page, and calibrate a threshold")
    return kept


def _row(policy: str, alone: list[Completion], together: list[Completion], seconds: float) -> list[str]:
    same = sum(a.same_as(b) for a, b in zip(alone, together))

    def total(key: str) -> int:
        return sum(c.margingate.get(key, 0) for c in (*alone, *together))

    rate = sum(len(c.tokens) for c in together) / seconds
    return [
        f"{policy} (stock decoding)" if policy == "log" else policy, f"{same}/{len(alone)}", f"{total('steps'):,}",
        f"{total('triggers'):,} ({total('triggers') / max(1, total('steps')):.1%})",
        "-" if policy == "log" else str(total("flips")), f"{rate:.0f}",
    ]  # fmt: skip


def open_dashboard(trace_dir: Path, port: int) -> subprocess.Popen[bytes] | None:
    """Start the dashboard beside the server, or return None where Streamlit is not installed."""
    command = [sys.executable, "-m", "sglang_margingate.dashboard", "--trace-dir", str(trace_dir), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(2)
    return process if process.poll() is None else None


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.bench.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the table instead of serving on")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--dashboard-port", type=int, default=8501)
    parser.add_argument("--trace-dir", type=Path, default=Path("traces"))
    args = parser.parse_args(argv)
    # Both end like Ctrl-C, which stops the server; a background shell's children would ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    console = Console()
    flags = [*GATE_ALONE, "--margingate-threshold", str(THRESHOLD), "--margingate-trace-text", "on",
             "--margingate-trace-dir", str(args.trace_dir), "--enable-metrics"]  # fmt: skip
    dashboard = None
    try:
        console.print("starting SGLang with the gate on the embedded model (15 to 30 s) ...")
        with serve(flags, port=None if args.once else args.port) as server:
            if not args.once:
                dashboard = open_dashboard(args.trace_dir, args.dashboard_port)
                url = f"http://127.0.0.1:{args.dashboard_port}"
                if dashboard is not None:
                    console.print(f"dashboard: {url} (follows this run live)")
                    webbrowser.open(url)
            kept = show(server.client, args.prompts, args.max_new_tokens, console)
            console.print(f"trace of every step: {server.client.status()['trace']['path']}")
            if args.once:
                return 0 if kept else 1
            console.print(f"serving on {server.base_url} until Ctrl-C (status: {server.base_url}/margingate/status)")
            while server.alive():
                time.sleep(0.5)
            return 1
    except KeyboardInterrupt:
        return 0
    except ServerError as error:
        console.print(f"margingate: error: {error}", style="red")
        return 2
    finally:
        if dashboard is not None:
            dashboard.terminate()


if __name__ == "__main__":
    sys.exit(main())
