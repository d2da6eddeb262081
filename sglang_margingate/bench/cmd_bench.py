"""``margingate bench``: what each policy costs and gives, side by side in one session."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_margingate.bench import options

if TYPE_CHECKING:
    from sglang_margingate.bench.client import Client

EPILOG = """\
Servers are started one after another, each with the flags after -- (the model, sizes); every one gets the same prompts
in the same arrivals. Name stock twice, as in --modes stock,gate,stock, to see the machine's drift. Results so far are
in --out all the time: Ctrl-C keeps them. The servers' runs are in --trace-dir; `margingate dashboard` opens them.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    p.epilog = EPILOG
    add = p.add_argument_group("servers").add_argument
    add("--modes", type=options.names, default=None, metavar="NAME[,NAME]",
        help="stock, log, gate, always, deterministic (all; deterministic with CUDA only)")  # fmt: skip
    add("--profile", type=Path, metavar="FILE", help="threshold profile for the mode gate")
    add(
        "--trace-dir",
        type=Path,
        default=Path("traces"),
        metavar="DIR",
        help="folder of the recorded runs (%(default)s)",
    )
    add("--port", type=options.whole(1), help="port of the servers (a free one)")
    add("--start-timeout", type=options.number(1), default=600.0, metavar="S", help="seconds until a server must serve")
    options.add_prompts(p, "arith,code,story", 32)
    add = p.add_argument_group("workload").add_argument
    add("--concurrency", type=options.whole(1), default=16, metavar="N", help="requests in flight (%(default)s)")
    add(
        "--rate", type=options.number(0.001), metavar="R", help="open loop instead: Poisson arrivals, requests a second"
    )
    add("--share", type=_shares, default=(100.0,), metavar="P[,P]",
        help="percent of deterministic traffic; the others opt out (100)")  # fmt: skip
    add("--repeats", type=options.whole(1), default=3, metavar="N", help="runs of each (%(default)s)")
    add("--seed", type=int, default=0, help="order, arrivals and opt-outs (%(default)s)")
    add = p.add_argument_group("output").add_argument
    add("-o", "--out", type=Path, default=Path("bench.json"), metavar="FILE",
        help="results; the table goes beside it as .md (%(default)s)")  # fmt: skip


def _shares(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(options.number(0.01, 100)(word) for word in options.names(text))) or (100.0,)


def run(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Measure, print the table, return the exit status."""
    from sglang_margingate.bench import bench_report
    from sglang_margingate.bench.compare import MODES, Comparison, Workload, compare
    from sglang_margingate.bench.console import bar, make_console
    from sglang_margingate.bench.timing import Arrivals
    from sglang_margingate.serving.cpu import is_cpu_host
    from sglang_margingate.serving.versions import device_name, model_name, versions

    flags: list[str] = args.server_flags
    cpu = options.flag_value(flags, "--device") == "cpu" or is_cpu_host()
    modes = args.modes or [m for m in MODES if m != "deterministic" or not cpu]
    for mode in modes:
        if mode not in MODES:
            raise options.UsageError(f"--modes: {mode!r} is unknown; use {', '.join(MODES)}")
        if mode == "deterministic" and cpu:
            raise options.UsageError("--modes: SGLang's deterministic mode needs CUDA; leave it out on a CPU")
    model = options.flag_value(flags, "--model-path", "--model")
    if model is None:
        from sglang_margingate.demo.paths import model_path

        model = str(model_path())
    prompts, template = options.rendered(args, options.prompts_of(args), model)
    arrivals = Arrivals(args.concurrency, args.rate, args.seed)
    workload = Workload(tuple(prompts), arrivals, args.max_tokens, args.repeats, args.share, args.seed)
    facts = bench_report.environment(device_name("cpu" if cpu else "cuda"), versions())
    facts |= {"model": model_name(model), "template": template, "server_flags": flags}
    result = Comparison()
    console = make_console()

    def save(complete: bool = False) -> None:
        document = bench_report.to_dict(result, workload, facts, complete)
        options.write(args.out, json.dumps(document, indent=2, default=str) + "\n")
        options.write(args.out.with_suffix(".md"), bench_report.markdown(result, workload, facts) + "\n")

    with bar(console) as progress:
        task = progress.add_task("bench", total=None)

        @contextmanager
        def start(label: str, mode_flags: Sequence[str]) -> Iterator[Client]:
            progress.reset(task, description=f"{label}: starting", total=None)
            console.print(f"{label}: starting a server")
            with options.started(args, _flags(args, mode_flags), label) as client:
                yield client

        tell: Any = lambda label, total: progress.reset(task, description=label, total=total)  # noqa: E731
        try:
            compare(modes, workload, start, result, tell, lambda: progress.advance(task), save)
        except KeyboardInterrupt:
            save()
            console.print(f"kept what was measured in {args.out}")
            raise
    save(complete=not result.failures)
    print(bench_report.markdown(result, workload, facts))
    console.print(f"\nresults: {args.out}, {args.out.with_suffix('.md')}; runs: {args.trace_dir}")
    return 2 if result.failures else 0


def _flags(args: argparse.Namespace, mode_flags: Sequence[str]) -> list[str]:
    flags = [*mode_flags, "--margingate-trace-dir", str(args.trace_dir)]
    if args.profile is not None and "gate" in mode_flags:
        flags += ["--margingate-profile", str(args.profile)]
    return [*flags, *args.server_flags]
