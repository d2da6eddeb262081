"""What does observing or gating cost? Throughput of policies on one server, in paired rounds of one session.

``margingate evidence overhead --policies off,log --pairs 10``

The server runs under ``--server-policy``; each request names its own policy, so both sides of a pair share the process,
the weights and the machine's mood, and follow one another within seconds. Every request makes the same number of
tokens (``ignore_eos``). The order inside a pair alternates, and the first round of each policy is not counted.

On a shared machine wall time drifts by more than what is measured. So the scheduler process's CPU time per token is
taken as well: it decodes on one thread that never rests under load, so that is what throughput is made of. Neighbours
still empty its caches; with ``--others 0.1`` a pair during which other processes used more than a tenth of a core is
measured again, up to twice the number of pairs asked for.

The trace's files are written every five seconds, whatever policy runs then: with rounds shorter than that, part of the
writer's work is booked on the other policy. ``--prompts 256`` makes rounds of about ten seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from sglang_margingate.bench import options, tables
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Prompt, run_together
from sglang_margingate.bench.servers.process import Server, serve


def scheduler_of(pid: int) -> psutil.Process:
    """Return the scheduler process below a server's launcher: the child that has used most CPU time."""
    children = psutil.Process(pid).children(recursive=True)
    return max(children, key=lambda p: sum(p.cpu_times()[:2]))


class Neighbours:
    """Measures what processes other than the server's and this one take of the machine's cores."""

    def __init__(self, server_pid: int) -> None:
        self._server = psutil.Process(server_pid)
        self._start = self._times()

    def _times(self) -> tuple[float, float]:
        machine = psutil.cpu_times()
        own = [psutil.Process(), self._server, *self._server.children(recursive=True)]
        used = sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)
        return time.perf_counter(), used - sum(sum(p.cpu_times()[:2]) for p in own)

    def cores(self) -> float:
        """Return the mean number of cores that others used since the last call."""
        before, self._start = self._start, self._times()
        return (self._start[1] - before[1]) / (self._start[0] - before[0])


def measure(
    server: Server, prompts: list[Prompt], policies: list[str], pairs: int, concurrency: int, tokens: int, others: float
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return tokens per second, and tokens per CPU second, of each round by policy; index k belongs to pair k."""
    client = server.client
    rates: dict[str, list[float]] = {policy: [] for policy in policies}
    cpu_rates: dict[str, list[float]] = {policy: [] for policy in policies}
    neighbours = Neighbours(server.pid)
    for k in range(-1, 2 * pairs):
        pair: dict[str, tuple[float, float]] = {}
        for policy in policies if k % 2 else policies[::-1]:
            client.flush_cache()
            worker = scheduler_of(server.pid)
            start, used = time.perf_counter(), sum(worker.cpu_times()[:2])
            done = run_together(
                client, prompts, concurrency, max_new_tokens=tokens, sampling={"ignore_eos": True},
                custom={"margingate_policy": policy},
            )  # fmt: skip
            seconds = time.perf_counter() - start
            used = sum(worker.cpu_times()[:2]) - used
            made = sum(len(c.tokens) for c in done)
            pair[policy] = made / seconds, made / used
        disturbed = neighbours.cores()
        if k >= 0 and disturbed <= others:
            for policy, (rate, cpu_rate) in pair.items():
                rates[policy].append(rate)
                cpu_rates[policy].append(cpu_rate)
        counted = len(rates[policies[0]])
        print(f"{counted} of {pairs} pairs done; others used {disturbed:.2f} cores", file=sys.stderr, flush=True)
        if counted == pairs:
            break
    return rates, cpu_rates


def table(rates: dict[str, list[float]], unit: str) -> str:
    """Return medians, spread and the paired ratio to the first policy as a Markdown table."""
    base, *_ = rates
    rows = []
    for policy, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[base])]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        spread = f"{min(values):.0f} to {max(values):.0f}"
        quartiles = f"{low:.3f}, {middle:.3f}, {high:.3f}"
        rows.append([policy, f"{statistics.median(values):.0f}", spread, f"{statistics.median(ratios):.3f}", quartiles])
    head = ["policy", f"{unit}, median", "min to max", f"of `{base}`, median of pairs", "quartiles"]
    return tables.markdown(head, rows)


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="margingate evidence overhead", description=__doc__)
    add = parser.add_argument
    add(
        "--policies",
        type=options.names,
        default="off,log",
        help="policies of the requests; the first is the base of the ratios",
    )
    add("--server-policy", default="log", help="the server's own policy")
    add("--pairs", type=int, default=10)
    add("--prompts", type=int, default=48, help="held-out prompts of the embedded model")
    add("--concurrency", type=int, default=16)
    add("--max-new-tokens", type=int, default=96)
    add("--others", type=float, default=float("inf"), help="cores that other processes may use in a pair that counts")
    add("--out", type=Path, default=None, help="write every round as JSON")
    add("server_flags", nargs="*", help="after --: flags of the server")
    args = parser.parse_args(argv)
    prompts = demo_prompts(args.prompts)
    with TemporaryDirectory() as folder:
        flags = ["--margingate-policy", args.server_policy, "--margingate-trace-dir", folder, *args.server_flags]
        with serve(flags) as server:
            rates, cpu_rates = measure(
                server, prompts, args.policies, args.pairs, args.concurrency, args.max_new_tokens, args.others
            )
            trace: dict[str, Any] = server.client.status().get("trace", {})
    if not rates[args.policies[0]]:
        print(f"no pair ran while others used at most {args.others} cores", file=sys.stderr)
        return 1
    print(f"{len(rates[args.policies[0]])} pairs")
    print(table(rates, "tokens/s"))
    print(table(cpu_rates, "tokens per CPU second of the scheduler"))
    print(f"trace rows dropped: {trace.get('dropped_rows')}, write errors: {trace.get('write_errors')}")
    if args.out is not None:
        options.write(
            args.out, json.dumps({"command": sys.argv[1:], "rates": rates, "cpu_rates": cpu_rates}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
