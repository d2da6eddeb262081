"""``margingate bench``: what each policy costs and gives, side by side in one session."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_margingate.bench import options

if TYPE_CHECKING:
    from sglang_margingate.bench.servers.client import Client
    from sglang_margingate.bench.side_by_side.compare import Comparison, Workload

EPILOG = """\
Servers are started one after another; every one gets the flags after -- (model, sizes) and the same prompts in the same
arrivals. stock and deterministic are `python -m sglang.launch_server`, and get no --margingate- flag; on a CPU, where
SGLang needs this package to start, stock is the policy off. Name stock twice, as in --modes stock,gate,stock, to see
the machine's drift. Results so far are in --out all the time: Ctrl-C keeps them, and --join puts them beside the next
command's. The servers' runs are in --trace-dir; `margingate dashboard` opens them. A model without a tokenizer:

  margingate bench --dataset random:512:96 --modes stock,canonical -- --model-path DIR --skip-tokenizer-init

With --workload requests arrive as users' do, every server is visited in every round, and each sequence is compared
with its run alone on its server:

  margingate bench --workload closed:8,closed:48 --requests 192 --dataset random:64-1024:32-256 \\
    --modes stock,canonical -- --model-path DIR --skip-tokenizer-init

exit status: 0 every mode was measured; 1 a sequence that claimed identity has it not (--workload); 2 a server failed or
the input is wrong; 130 interrupted.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from sglang_margingate.bench.workload import arguments as workloads

    p.epilog = EPILOG
    add = p.add_argument_group("servers").add_argument
    add("--modes", type=options.names, default=None, metavar="NAME[,NAME]",
        help="stock (SGLang with its own defaults), stock-flashinfer, log, gate, canonical (the gate on the "
        "canonical fast path), always, deterministic (SGLang's own; "
        "CUDA only) (all; with --workload stock,canonical)")  # fmt: skip
    add("--mode-flags", action="append", default=[], metavar="'NAME[,NAME]=FLAGS'",
        help="further flags of these modes' servers, as 'stock,log=--disable-radix-cache'; may be repeated")  # fmt: skip
    add("--profile", type=Path, metavar="FILE", help="threshold profile for the modes gate and canonical")
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
    add("--share", type=_shares, default=(2.0, 10.0, 50.0, 100.0), metavar="P[,P]",
        help="percent of deterministic traffic; the others opt out (2,10,50,100)")  # fmt: skip
    add("--repeats", type=options.whole(1), default=3, metavar="N", help="runs of each (%(default)s)")
    add("--seed", type=int, default=0, help="random prompts, order, arrivals and opt-outs (%(default)s)")
    workloads.add_arguments(p)
    add = p.add_argument_group("output").add_argument
    add("-o", "--out", type=Path, default=Path("bench.json"), metavar="FILE",
        help="results; the tables go beside it as .md (%(default)s)")  # fmt: skip
    add("--join", type=Path, action="append", default=[], metavar="FILE",
        help="earlier --out of this workload on this machine, for one table; may be repeated")  # fmt: skip


def _shares(text: str) -> tuple[float, ...]:
    return tuple(dict.fromkeys(options.number(0.01, 100)(word) for word in options.names(text))) or (100.0,)


def run(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Measure, print the tables, return the exit status."""
    from sglang_margingate.bench.prompts.chosen import prompts_of, rendered
    from sglang_margingate.bench.servers.process import flag_value
    from sglang_margingate.bench.servers.timing import Arrivals
    from sglang_margingate.bench.side_by_side import modes as bench_modes
    from sglang_margingate.bench.side_by_side import report as bench_report
    from sglang_margingate.bench.side_by_side.compare import Comparison, Workload
    from sglang_margingate.bench.side_by_side.join import join
    from sglang_margingate.machine import model_name, versions

    flags: list[str] = args.server_flags
    if args.workload is not None:
        return _run_workload(args)
    if args.base_url:
        raise options.UsageError("--base-url is for --workload; without it servers are started, see --modes")
    bench_modes.check_flags(flags)
    cpu = _on_cpu(flags)
    result = Comparison()
    modes, note = bench_modes.choose(args.modes, cpu)
    result.notes += [note] if note else []
    extra = bench_modes.parse_mode_flags(args.mode_flags)
    model = flag_value(flags, "--model-path", "--model")
    if model is None:
        from sglang_margingate.demo.paths import model_path

        model = str(model_path())
        flags += ["--model-path", model]  # SGLang alone does not know the embedded model
    prompts, template = rendered(args, prompts_of(args), model)
    arrivals = Arrivals(args.concurrency, args.rate, args.seed)
    workload = Workload(tuple(prompts), arrivals, args.max_tokens, args.repeats, args.share, args.seed)
    facts = bench_report.environment(bench_modes.device(cpu), versions())
    facts |= {"model": model_name(model), "template": template, "server_flags": flags}
    for path in args.join:
        join(path, result, workload, facts)
    joined = set(result.failures)

    def save(complete: bool = False) -> None:
        document = bench_report.to_dict(result, workload, facts, complete)
        options.write(args.out, json.dumps(document, indent=2, default=str) + "\n")
        options.write(args.out.with_suffix(".md"), bench_report.markdown(result, workload, facts) + "\n")

    try:
        _measure(args, modes, extra, cpu, workload, result, save)
    except KeyboardInterrupt:
        result.notes.append("Interrupted: not everything that was asked for was measured.")
        save()
        print(bench_report.markdown(result, workload, facts))
        print(f"\nkept what was measured: {args.out}, {args.out.with_suffix('.md')}")
        raise
    failed = set(result.failures) - joined
    save(complete=not failed)
    print(bench_report.markdown(result, workload, facts))
    print(f"\nresults: {args.out}, {args.out.with_suffix('.md')}; runs: {args.trace_dir}")
    return 2 if failed else 0


def _run_workload(args: argparse.Namespace) -> int:
    from sglang_margingate.bench.workload.command import run as run_workloads

    return run_workloads(args, args.modes, _on_cpu(args.server_flags))


def _on_cpu(flags: list[str]) -> bool:
    from sglang_margingate.bench.servers.process import flag_value
    from sglang_margingate.serving.cpu import is_cpu_host

    device = flag_value(flags, "--device")
    return is_cpu_host() if device is None else device == "cpu"


def _measure(
    args: argparse.Namespace,
    modes: list[str],
    extra: dict[str, list[str]],
    cpu: bool,
    workload: Workload,
    result: Comparison,
    save: Any,
) -> None:
    from sglang_margingate.bench.console import bar, make_console
    from sglang_margingate.bench.side_by_side import modes as bench_modes
    from sglang_margingate.bench.side_by_side.compare import compare

    console = make_console()
    with bar(console) as progress:
        task = progress.add_task("bench", total=None)

        @contextmanager
        def start(label: str, mode: str) -> Iterator[Client]:
            progress.reset(task, description=f"{label}: starting", total=None)
            command = bench_modes.command(
                mode, cpu, args.server_flags, extra.get(mode, []), args.trace_dir, args.profile
            )
            if mode in extra:
                result.mode_flags[label] = extra[mode]
            console.print(f"{label}: starting a server: python -m {command.module} {' '.join(command.flags)}")
            with options.started(args, command.flags, label, command.module) as client:
                yield client

        def tell(label: str, total: int) -> None:
            progress.reset(task, description=label, total=total)
            if not console.is_terminal:  # a session's log shows where the time goes
                console.print(label)

        compare(modes, workload, start, result, tell, lambda: progress.advance(task), save)
        for label, why in result.failures.items():
            console.print(f"{label}: {why}")
