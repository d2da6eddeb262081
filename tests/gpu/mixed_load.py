"""Mixed load on a GPU, at stock's own defaults and at ours: prompts arrive while others decode. One command, about 8 minutes.

    python3 tests/gpu/mixed_load.py --out DIR                           on the GPU host; needs .gpu/ like truth.py
    python3 tests/gpu/mixed_load.py --out DIR --modes stock,ours --loads 48,sessions:32:4:512 --rounds 3
    python3 tests/gpu/mixed_load.py --out DIR --modes stock,ours --steps 3 --loads 8 --rounds 1 --identity none
    python3 tests/gpu/mixed_load.py --out DIR --shape .gpu/shapes/qwen2.5-14b --lengths 64-1024:16-64 --rounds 1
    python3 tests/gpu/mixed_load.py --out DIR --device cpu --loads 4,8 --requests 16       the same logic, without a GPU

The first two modes are served at once (not with --apart), and each round visits both; each further mode is served by itself
afterwards, while ours still runs alone what it ran in company. `stock` is SGLang with its own defaults for the machine (on Hopper FA3 and
prefill graphs), `stock-flashinfer` has what our servers are given. Loads as `margingate bench --workload` names them, a number
alone being that many in flight, of 64 to 1,024 prompt tokens and 32 to 256 new ones, or others behind an @: 6@48*2000-9000:8-24 is
48 requests of such lengths, 6 in flight. --steps measures decode steps and prefills of all lengths on the same servers first. A
further round is not begun where it would not end within --budget.

DIR gets results.json, results.md and the servers' logs. Exit status 1 where a sequence that claimed identity has it not.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import mixed_steps  # noqa: E402
from truth import GPU, LLAMA_8B, prepare  # noqa: E402

from sglang_margingate.bench import tables  # noqa: E402
from sglang_margingate.bench.evidence.decode_cost import Target  # noqa: E402
from sglang_margingate.bench.prompts.random_ids import draw, model_facts, parse  # noqa: E402
from sglang_margingate.bench.servers.client import ServerError  # noqa: E402
from sglang_margingate.bench.servers.process import OURS, STOCK, Server, serve  # noqa: E402
from sglang_margingate.bench.side_by_side.compare import MODES  # noqa: E402
from sglang_margingate.bench.side_by_side.modes import device  # noqa: E402
from sglang_margingate.bench.side_by_side.report import environment  # noqa: E402
from sglang_margingate.bench.workload import report  # noqa: E402
from sglang_margingate.bench.workload.command import exit_status  # noqa: E402
from sglang_margingate.bench.workload.loads import Load  # noqa: E402
from sglang_margingate.bench.workload.loads import parse as parse_loads  # noqa: E402
from sglang_margingate.bench.workload.requests import Chain, blank_prefixes, chains  # noqa: E402
from sglang_margingate.bench.workload.rounds import (  # noqa: E402
    Results,
    Served,
    Work,
    compare_alone,
    connect,
    fill_alone,
    run_once,
    warm_up,
)
from sglang_margingate.machine import versions  # noqa: E402

MODE_OF = {"ours": "canonical", "ours-triton": "canonical", "ours-fa3": "canonical"}
FLAGS_OF = {
    "ours-triton": ("--margingate-prefill-attention", "triton"),
    "ours-fa3": ("--margingate-prefill-attention", "fa3"),
}
"""Ours with one kind of prefill attention, to be put side by side."""
SHAPE = (
    "--dtype bfloat16 --grammar-backend none --sampling-backend pytorch --watchdog-timeout 1800 --skip-tokenizer-init "
    "--context-length 40960 --max-total-tokens 90000 --mem-fraction-static 0.9 --max-running-requests 80 "
    "--cuda-graph-max-bs-decode 64"
)
"""What every server is given: shapes and sizes, nothing that SGLang chooses by the machine for speed."""
CPU_SHAPE = "--device cpu --max-total-tokens 30000"


class Mixed:
    """Starts servers, sends the loads, keeps what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.began = time.monotonic()
        self.modes: list[str] = args.modes.split(",")
        self.results = Results(labels=self.modes)
        self.cpu = args.device == "cpu"
        self.model = self._weights()
        words = [word.partition("@") for word in args.loads.split(",")]
        loads = parse_loads(",".join(f"closed:{word}" if word.isdigit() else word for word, *_ in words))
        self.vocabulary = model_facts(str(self.model)).vocabulary or 0
        self.steps: mixed_steps.Found = {}
        self.work = Work(
            {load: self._requests(load, lengths or args.lengths) for load, (*_, lengths) in zip(loads, words)},
            rounds=args.rounds,
            identity="none" if args.identity == "none" else "all",
        )
        self.facts: dict[str, Any] = environment(device(self.cpu), versions())
        self.facts |= {"model": str(self.model), "server_flags": self._common()}

    def _requests(self, load: Load, lengths: str) -> tuple[Chain, ...]:
        number, _, lengths = lengths.rpartition("*")
        count = int(number or self.args.requests)
        made = chains(load, draw(parse(f"random:{lengths}").prompts(count, 0), self.vocabulary, 0), count)
        shared = draw(blank_prefixes(load, count), self.vocabulary, 1)
        return tuple(c.after(shared, i) for i, c in enumerate(made)) if shared else tuple(made)

    def say(self, text: str) -> None:
        """Print with the time since the start."""
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def phase(self, label: str, total: int) -> None:
        """Say what begins."""
        self.say(label)

    def done(self) -> None:
        """Say nothing of single requests."""

    def save(self) -> None:
        """Write what is there."""
        self.out.mkdir(parents=True, exist_ok=True)
        found = report.to_dict(self.results, self.work, self.facts, complete=not self.results.failures)
        found["steps"] = mixed_steps.to_dict(self.steps)
        (self.out / "results.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
        text = report.markdown(self.results, self.work, self.facts)
        if self.steps:
            head, rows = mixed_steps.rows(self.steps, self.modes)
            text += "\n\n" + tables.markdown(head, rows)
        (self.out / "results.md").write_text(text + "\n")

    def _weights(self) -> Path:
        if self.args.model is not None:
            return self.args.model
        if self.cpu:
            from sglang_margingate.demo.paths import model_path

            return model_path()
        shape: Path | None = self.args.shape
        folder = GPU.weights if shape is None else GPU.weights.parent / shape.name
        if not (folder / "model.safetensors.index.json").exists():
            if shape is None:
                shape = self.out / "shape"
                shape.mkdir(exist_ok=True)
                (shape / "config.json").write_text(json.dumps(LLAMA_8B))
            subprocess.run([sys.executable, str(HERE / "random_model.py"), str(shape), str(folder)], check=True)
            self.say(f"made {folder}")
        return folder

    def _common(self) -> list[str]:
        return ["--model-path", str(self.model), *shlex.split(CPU_SHAPE if self.cpu else SHAPE), *self.args.flags]

    def start(self, stack: ExitStack, name: str) -> Server:
        """Start a mode's server."""
        mode = MODES[MODE_OF.get(name, name)]
        words = [*mode.flags, *FLAGS_OF.get(name, ()), *self._common()]
        module = STOCK if mode.stock else OURS
        if mode.stock and self.cpu:
            words, module = ["--margingate-policy", "off", *words], OURS
        elif not mode.stock:
            words += ["--margingate-trace-dir", str(self.out / "traces")]
        server = stack.enter_context(serve(words, log=self.out / f"{name}.log", timeout=420, module=module))
        self.say(f"{name} serves")
        return server

    def serve(self, name: str, server: Server) -> Served:
        """Get to know a server and warm it up."""
        served = connect(name, server.client, self.work, self.results)
        warm_up(served, self.work)
        return served

    def run(self) -> None:
        """Measure everything."""
        first, further = self.modes[:2], self.modes[2:]
        if self.args.apart:
            first = [name for name in self.modes if not MODES[MODE_OF.get(name, name)].stock][:1] or self.modes[:1]
            further = [name for name in self.modes if name not in first]
        with ThreadPoolExecutor(4) as pool, ExitStack() as kept:
            stacks = {name: kept.enter_context(ExitStack()) for name in self.modes}
            starting = {name: pool.submit(self.start, stacks[name], name) for name in first}
            served = [s for name in first if (s := self.ready(name, starting[name])) is not None]
            ours = self.ours(served)
            self.measure_steps(served, self.args.steps)
            self.rounds(served, reserve=60 * len(further) + (180 if ours else 0))
            for name in first:
                if ours is None or name != ours.label:
                    stacks[name].close()
            alone = pool.submit(self.alone, ours)
            if self.args.apart:
                alone.result()
                stacks[first[0]].close()
            for name in further:
                later = self.ready(name, pool.submit(self.start, stacks[name], name))
                alone.result()  # a timed round has the GPU to itself
                self.measure_steps([later] if later is not None else [], self.args.steps)
                self.rounds([later] if later is not None else [])
                stacks[name].close()
            alone.result()
        self.save()

    def measure_steps(self, served: list[Served], repeats: int, *what: Any) -> None:
        """Measure decode steps and prefills, of the usual sizes or of ``what``."""
        if not repeats or not served:
            return
        targets = {s.label: Target(s.client.base_url, self.vocabulary) for s in served}
        pools = [self.results.servers[s.label]["pool_tokens"] or 0 for s in served]
        found = mixed_steps.measure(targets, repeats, self.say, min(pools), *what)
        for name, by in found.items():
            self.steps.setdefault(name, {}).update(by)
        self.save()

    def ready(self, name: str, starting: Future[Server]) -> Served | None:
        """Return a server that was started, warm; None, and a note, where it was not to be had."""
        try:
            return self.serve(name, starting.result())
        except ServerError as error:
            self.results.failures[name] = str(error)
            self.say(f"{name}: {error}")
            return None

    def ours(self, served: list[Served]) -> Served | None:
        """Return the server whose sequences are compared with their runs alone."""
        wanted = [s for s in served if not MODES[MODE_OF.get(s.label, s.label)].stock]
        return wanted[0] if wanted and self.work.identity != "none" else None

    def rounds(self, served: list[Served], reserve: float = 0.0) -> None:
        """Run the rounds that fit into the budget."""
        for number in range(self.args.rounds):
            began = time.monotonic()
            for load in self.work.loads:
                for server in served[:: 1 if number % 2 == 0 else -1]:
                    self.phase(f"{server.label}: {load.name}, round {number + 1}", 0)
                    try:
                        run_once(server, load, number, self.work, self.results, self)
                    except ServerError as error:
                        self.results.failures[server.label] = str(error)
                        served = [s for s in served if s is not server]
                    self.save()
            took, left = time.monotonic() - began, self.args.budget - (time.monotonic() - self.began) - reserve
            if took > left and number + 1 < self.args.rounds:
                self.say(
                    f"{number + 1} of {self.args.rounds} rounds: another would not end within {self.args.budget} s"
                )
                return

    def alone(self, server: Served | None) -> None:
        """Run alone what ran in company, and compare."""
        if server is None:
            return
        if server.label in self.results.failures:
            return
        prompts = [chain.turns[0] for made in self.work.loads.values() for chain in made]
        try:
            fill_alone(server, prompts, self.work, self, self.results)
        except ServerError as error:
            self.results.failures[server.label] = str(error)
            return
        compare_alone(server, self.work, self.results, self, self.save)
        self.say(f"{server.label}: compared with its runs alone")

    def table(self) -> str:
        """Return the ratios in few columns."""
        rows = []
        for load in self.work.loads:
            for name in self.modes:
                cell = self.results.cell(name, load)
                if not cell.rounds:
                    continue
                row = [load.name, name, f"{cell.median('tokens_per_s'):,.0f}"]
                row += [report.ratio(self.results, cell, metric) for metric, _ in report.SPEED.values()]
                seen = [cell.median(m) for m in ("gpu_busy", "host_ms_per_step")]
                row += ["-" if math.isnan(value) else f"{value:.2f}" for value in seen]
                same = cell.identity.same if cell.identity else None
                rows.append([*row, f"{same.numerator}/{same.denominator}" if same else "-"])
        speed = [f"{name} ratio" for name in report.SPEED]
        return tables.text(["load", "mode", "tokens/s", *speed, "busy", "host ms", "identical"], rows, (0, 1))


def main(argv: list[str] | None = None) -> int:
    """Run everything; the short table comes last."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--modes", default="", help="stock, ours, stock-flashinfer, deterministic; the first is what is compared with")
    add("--loads", default="8,32,48,64", help="requests in flight, or loads by name (%(default)s)")
    add("--requests", type=int, default=192)
    add("--lengths", default="", metavar="IN:OUT", help="tokens (64-1024:32-256)")
    add("--rounds", type=int, default=2)
    add("--identity", choices=("ours", "none"), default="ours")
    add("--apart", action="store_true", help="one server at a time: models of which two do not fit")
    add("--budget", type=float, default=480.0, help="seconds (%(default)s)")
    add("--model", type=Path, help="folder of another model")
    add("--shape", type=Path, help="folder of another config.json, to be given random weights")
    add("--steps", type=int, default=0, help="repeats of the decode steps and prefills (%(default)s)")
    add("--flags", type=shlex.split, default=[], help="further flags of every server, as one word")
    args = parser.parse_args(words)
    args.modes = args.modes or ("stock,ours" if args.device == "cpu" else "stock,ours,stock-flashinfer")
    args.lengths = args.lengths or ("32-128:16-32" if args.device == "cpu" else "64-1024:32-256")
    if args.device == "cuda":
        prepare(words, Path(__file__))
    args.out.mkdir(parents=True, exist_ok=True)
    mixed = Mixed(args)
    try:
        mixed.run()
    finally:
        mixed.save()
        print((mixed.out / "results.md").read_text())
        if mixed.steps:
            print(tables.text(*mixed_steps.rows(mixed.steps, mixed.modes), (0,)))
        print(mixed.table(), flush=True)
    return exit_status(mixed.results)


if __name__ == "__main__":
    sys.exit(main())
