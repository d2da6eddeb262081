"""``margingate bench --workload``: loads on two or more servers in rounds, with the identity of every sequence."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sglang_margingate.bench import options
from sglang_margingate.bench.console import bar, make_console
from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.bench.servers.openai_client import served_model
from sglang_margingate.bench.servers.process import flag_value
from sglang_margingate.bench.side_by_side import modes as bench_modes
from sglang_margingate.bench.side_by_side.compare import labels_of
from sglang_margingate.bench.side_by_side.report import environment
from sglang_margingate.bench.workload import report, rounds
from sglang_margingate.bench.workload.build import build, closing_of, raw_prompts, read_files
from sglang_margingate.bench.workload.loads import parse
from sglang_margingate.bench.workload.rounds import Results, Served, Work
from sglang_margingate.machine import device_name, model_name, versions

SHARE_OF_DEVICE = 0.9
"""Of a GPU's memory, what several servers may take together."""
MEMORY_FLAGS = ("--max-total-tokens", "--mem-fraction-static")
ATTENTION_FLAGS = ("--attention-backend", "--prefill-attention-backend", "--decode-attention-backend",
                   "--cuda-graph-backend-prefill", "--disable-radix-cache", "--disable-cuda-graph")  # fmt: skip
"""Flags that take SGLang's own choice away from stock."""


class _Teller:
    """Shows the phases; off a terminal a line each, so that a log tells where the time goes."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.console, self.progress = console, progress
        self.task = progress.add_task("workload", total=None)

    def phase(self, label: str, total: int | None) -> None:
        """Begin with a phase."""
        self.progress.reset(self.task, description=label, total=total)
        if not self.console.is_terminal:
            self.console.print(label, markup=False)

    def done(self) -> None:
        """Count one request."""
        self.progress.advance(self.task)


def run(args: argparse.Namespace, modes: Sequence[str] | None, cpu: bool) -> int:
    """Measure, print the table, return the exit status.

    Parameters
    ----------
    modes
        ``--modes``.
    cpu
        Whether servers are started on a CPU.
    """
    loads = parse(args.workload, args.concurrency, args.rate)
    prompts = raw_prompts(args, args.requests) if any(load.file is None for load in loads) else []
    files = read_files(loads, args.requests)
    console = make_console()
    results = Results()
    with bar(console) as progress, ExitStack() as stack:
        tell = _Teller(console, progress)
        if args.base_url:
            where: _Where = _Running(args)
        else:
            where = _Started(args, modes, cpu, console)
        model, first = where.model()
        results.labels, results.mode_flags = where.labels, where.mode_flags
        results.notes = where.notes
        chains = build(args, loads, prompts, files, args.requests, model, first)
        work = Work(chains, args.max_tokens, args.repeats, args.goodput, args.identity, closing_of(model), args.seed)
        facts = environment(where.device(), versions())
        facts |= {"model": model_name(model), "server_flags": args.server_flags, "servers": where.how}
        short = {
            load.name: len(t) for load, c in chains.items() if len(t := [x for k in c for x in k.turns]) < args.requests
        }
        results.notes += [
            f"{name}: the prompts end after {n} of {args.requests} requests." for name, n in short.items()
        ]

        def save(complete: bool = False) -> None:
            document = report.to_dict(results, work, facts, complete)
            options.write(args.out, json.dumps(document, indent=2, default=str) + "\n")
            options.write(args.out.with_suffix(".md"), report.markdown(results, work, facts) + "\n")

        try:
            _measure(where, work, results, tell, stack, save)
        except KeyboardInterrupt:
            results.notes.append("Interrupted: not everything that was asked for was measured.")
            save()
            print(report.markdown(results, work, facts))
            raise
    facts["servers"] = where.how
    results.notes.append(f"Servers: {where.how}.")
    save(complete=not results.failures)
    print(report.markdown(results, work, facts))
    print(f"\nresults: {args.out}, {args.out.with_suffix('.md')}")
    return exit_status(results)


def exit_status(results: Results) -> int:
    """Return 1 where a promise was broken, 2 where something could not be measured, else 0."""
    return 1 if results.broken() else 2 if results.failures else 0


def _measure(
    where: _Where, work: Work, results: Results, tell: _Teller, stack: ExitStack, save: Callable[[], None]
) -> None:
    if where.together:
        try:
            servers = [stack.enter_context(where.server(i, tell, work, results)) for i in range(len(where.labels))]
        except ServerError as error:
            if not where.may_fall_back:
                raise
            stack.close()
            results.servers.clear()
            where.fall_back(str(error))
        else:
            for server in servers:
                rounds.warm_up(server, work)
            rounds.run_rounds(servers, work, results, tell, save)
            for server in servers:
                if server.label not in results.failures:
                    rounds.compare_alone(server, work, results, tell, save)
            return
    for i, label in enumerate(where.labels):
        try:
            with where.server(i, tell, work, results) as server:
                rounds.warm_up(server, work)
                rounds.run_rounds([server], work, results, tell, save)
                if label not in results.failures:
                    rounds.compare_alone(server, work, results, tell, save)
        except ServerError as error:
            results.failures[label] = str(error)
        save()


class _Where:
    """The servers to measure."""

    labels: list[str]
    mode_flags: dict[str, list[str]]
    notes: list[str]
    together = True
    may_fall_back = False
    how = "running before, each round visits all of them"

    def model(self) -> tuple[str, Client | None]:
        """Return the model's folder or name, and a client where a server runs already."""
        raise NotImplementedError

    def device(self) -> str:
        """Return the hardware's name."""
        raise NotImplementedError

    def server(self, number: int, tell: _Teller, work: Work, results: Results) -> Any:
        """Return a context manager that gives a server."""
        raise NotImplementedError

    def fall_back(self, why: str) -> None:
        """Go on with one server after the other."""
        self.together = False
        self.notes.append(why)


class _Running(_Where):
    """Servers that run already."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.server_flags:
            raise UsageError(
                f"-- {args.server_flags[0]}: flags of a server to start, but --base-url names running ones"
            )
        if args.modes or args.mode_flags:
            raise UsageError(
                "--modes and --mode-flags start servers, but --base-url names running ones; leave them out"
            )
        self.clients: dict[str, Client] = {}
        for entry in args.base_url:
            name, _, url = entry.partition("=")
            if not name or "://" not in url or "://" in name:
                raise UsageError(f"--base-url {entry!r}: give name and address, as ours=http://127.0.0.1:30000")
            if name in self.clients:
                raise UsageError(
                    f"--base-url {entry!r}: the name {name!r} stands there twice; give each server its own"
                )
            self.clients[name] = Client(url, api_key=os.environ.get(options.API_KEY_ENV, ""))
        self.labels, self.mode_flags, self.notes = list(self.clients), {}, []

    def model(self) -> tuple[str, Client | None]:
        models = {label: served_model(client) for label, client in self.clients.items()}
        first = self.labels[0]
        for label, model in models.items():
            if model_name(model) != model_name(models[first]):
                raise UsageError(
                    f"--base-url {label}: serves {model}, but {first} serves {models[first]}; compare servers of one model"
                )
        return models[first], self.clients[first]

    def device(self) -> str:
        try:
            found = self.clients[self.labels[0]].get("/server_info").get("device")
        except (ServerError, AttributeError):
            found = None
        return device_name("cpu") if found == "cpu" else f"a server's {found or 'unknown device'}"

    @contextmanager
    def server(self, number: int, tell: _Teller, work: Work, results: Results) -> Iterator[Served]:
        label = self.labels[number]
        yield rounds.connect(label, self.clients[label], work, results)


class _Started(_Where):
    """Servers that are started for it, one for each mode."""

    def __init__(self, args: argparse.Namespace, modes: Sequence[str] | None, cpu: bool, console: Console) -> None:
        if args.join:
            raise UsageError("--join is not for --workload: its ratios are of rounds of one session; leave it out")
        self.args, self.cpu, self.console = args, cpu, console
        bench_modes.check_flags(args.server_flags)
        wanted, note = bench_modes.choose(modes or ["stock", "canonical"], cpu)
        self.extra = bench_modes.parse_mode_flags(args.mode_flags)
        self.named = labels_of(wanted)
        self.labels = [label for label, _ in self.named]
        self.mode_flags = {label: self.extra[mode] for label, mode in self.named if mode in self.extra}
        self.notes = [note] if note else []
        taken = [f for f in args.server_flags if f.partition("=")[0] in ATTENTION_FLAGS]
        if taken and "stock" in wanted and not cpu:
            self.notes.append(
                f"stock does not run with SGLang's own defaults: {' '.join(taken)} is given to every server."
            )
        self.together = len(wanted) > 1 and self._fits()
        self.may_fall_back = self.together and args.servers == "auto"

    @property
    def how(self) -> str:  # type: ignore[override]
        return "all at once, each round visits all of them" if self.together else "one after the other"

    def _fits(self) -> bool:
        if self.args.servers != "auto":
            return bool(self.args.servers == "together")
        share = flag_value(self.args.server_flags, "--mem-fraction-static")
        few = share is not None and float(share) * len(self.named) <= SHARE_OF_DEVICE
        return self.cpu or few or flag_value(self.args.server_flags, "--max-total-tokens") is not None

    def fall_back(self, why: str) -> None:
        super().fall_back(f"Not all servers fit at once ({why}).")

    def model(self) -> tuple[str, Client | None]:
        model = flag_value(self.args.server_flags, "--model-path", "--model")
        if model is None:
            from sglang_margingate.demo.paths import model_path

            model = str(model_path())
            self.args.server_flags += ["--model-path", model]  # SGLang alone does not know the embedded model
        return model, None

    def device(self) -> str:
        return bench_modes.device(self.cpu)

    @contextmanager
    def server(self, number: int, tell: _Teller, work: Work, results: Results) -> Iterator[Served]:
        label, mode = self.named[number]
        args = self.args
        command = bench_modes.command(
            mode, self.cpu, args.server_flags, self.extra.get(mode, []), Path(args.trace_dir), args.profile
        )
        tell.phase(f"{label}: starting", None)
        self.console.print(f"{label}: python -m {command.module} {' '.join(command.flags)}", markup=False)
        port = args.port + number if args.port and self.together else args.port
        own = argparse.Namespace(**{**vars(args), "port": port})
        with options.started(own, command.flags, label, command.module) as client:
            yield rounds.connect(label, client, work, results)
