"""Tensor parallel on a host with several GPUs: identity, faults, speed and start-up against stock. One command.

    python3 tests/gpu/tensor_parallel.py --out DIR --tp 2 [--gpus 0,1 --stock-gpus 2,3]      needs .gpu/ like truth.py
    python3 tests/gpu/tensor_parallel.py --out DIR --tp 4 --models 8b,14b --budget 340
    python3 tests/gpu/tensor_parallel.py --out DIR --tp 2 --device cpu                       the same logic, without a GPU

For each model stock (its own defaults) and ours are served at once, on GPUs of their own where --stock-gpus names others. First
the timings, one server at a time: decode step and mixed load. Then identity: 24 sequences alone against batches of each size on a
cold, half warm and warm prefix cache, which ours must pass and stock fail, and labels. Last, servers with chunks of 256 tokens,
with a sum over ranks that rounds otherwise at 16 rows or fewer, and with a layer that leaks on the last rank alone: found and
named, or refused. A part is not begun where it would not end within --budget. DIR gets results.json and the servers' logs; the
table comes last; exit status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from mixed_load import SHAPE  # noqa: E402
from truth import prepare  # noqa: E402

from sglang_margingate.bench import tables  # noqa: E402
from sglang_margingate.bench.evidence.decode_cost import Target, cost, identity  # noqa: E402
from sglang_margingate.bench.prompts.random_ids import draw, parse  # noqa: E402
from sglang_margingate.bench.servers.client import ServerError  # noqa: E402
from sglang_margingate.bench.servers.process import OURS, STOCK, Server, serve  # noqa: E402
from sglang_margingate.bench.workload.loads import Load  # noqa: E402
from sglang_margingate.bench.workload.requests import chains  # noqa: E402
from sglang_margingate.bench.workload.rounds import Results, Work, connect, run_once, warm_up  # noqa: E402

MODELS = {"8b": ("llama-3.1-8b", "/dev/shm/llama-8b"), "14b": ("qwen2.5-14b", "/dev/shm/qwen-14b")}
ENV = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}
"""Servers that start at once take the memory of each GPU at other moments."""
REDUCE_ROWS = 16
LAYER = "layers.1.mlp.gate_up_proj"


@dataclass(frozen=True)
class Scale:
    """How much is asked."""

    flags: str = SHAPE.replace("40960", "16384") + " --stream-interval 4"
    """Qwen2.5 knows 32,768 positions; a chunk a token from 64 streams would keep the HTTP process busier than the GPUs."""
    sizes: tuple[int, ...] = (2, 8, 20, 33, 64)
    states: tuple[str, ...] = ("half warm", "cold", "warm")
    stock_sizes: tuple[int, ...] = (8, 33)
    prompts: int = 24
    new: int = 64
    step_new: int = 224
    """Tokens while a step is timed: the last of 64 prompts must begin before the first answer ends."""
    batches: tuple[int, ...] = (1, 8, 32, 64)
    context: int = 512
    load: int = 32
    requests: int = 192
    lengths: str = "64-1024:32-256"


GPU = Scale()
QUICK = Scale(sizes=(8, 33, 64), states=("cold", "warm"), stock_sizes=(8,), batches=(1, 32, 64))
CPU = Scale(
    "--device cpu --max-total-tokens 30000", (2, 4), ("cold", "warm"), (4,), 6, 16, 8, (1, 2), 32, 4, 8, "32-64:16-24"
)
CPU_OURS = ("--margingate-fast-path", "canonical", "--margingate-trace", "off")


class Run:
    """Starts servers, asks them, keeps what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.began = args, args.out.resolve(), time.monotonic()
        self.cpu = args.device == "cpu"
        self.scale = CPU if self.cpu else QUICK if args.quick else GPU
        self.apart = bool(args.stock_gpus) and args.stock_gpus != args.gpus
        self.slowest, self.repeats = 1.03, 2
        """Of stock's step, at most; how often each is timed."""
        self.found: dict[str, Any] = {"command": sys.argv, "checks": {}, "cost": {}, "mixed": {}, "start": {}}
        cores = "|".join(str(rank % 2) for rank in range(args.tp))
        self.cores = {"SGLANG_CPU_OMP_THREADS_BIND": cores} if self.cpu else {}
        self.pool = ThreadPoolExecutor(16)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.args.budget - (time.monotonic() - self.began)

    def say(self, text: str) -> None:
        """Print with the time since the start."""
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def check(self, name: str, problems: list[str], seen: Any = None) -> None:
        """Keep the outcome of one check."""
        self.found["checks"][name] = {"holds": not problems, "problems": problems, "seen": seen}
        outcome = "FAILS: " + "; ".join(problems)[:300] if problems else "holds"
        self.say(f"{name}: {outcome}  {'' if seen is None else seen}"[:400])
        self.save()

    def save(self) -> None:
        """Write what is there."""
        (self.out / "results.json").write_text(json.dumps(self.found, indent=1, default=str) + "\n")

    # ---- servers ---------------------------------------------------------------------------------------------------

    def weights(self, model: str) -> Path:
        """Return a model's folder; random weights are made where there are none."""
        if self.cpu:
            from sglang_margingate.demo.paths import model_path

            return model_path()
        shape, folder = MODELS[model]
        if not Path(folder, "model.safetensors.index.json").exists():
            device = f"cuda:{list(MODELS).index(model)}"
            command = [sys.executable, str(HERE / "random_model.py"), f".gpu/shapes/{shape}", folder, device]
            subprocess.run(command, check=True, timeout=200, stdout=subprocess.DEVNULL)
            self.say(f"made {folder}")
        return Path(folder)

    def start(self, stack: ExitStack, name: str, model: Path, ours: bool, more: tuple[str, ...] = (), env: dict[str, str] | None = None,
              gpus: str = "") -> Server:  # fmt: skip
        """Start a server and wait until it serves."""
        words = ["--model-path", str(model), *shlex.split(self.scale.flags), "--tp-size", str(self.args.tp), *more]
        gpus = gpus or (self.args.gpus if ours or not self.apart else self.args.stock_gpus)
        around = {**ENV, **self.cores, **(env or {}), **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})}
        if ours:
            words += CPU_OURS if self.cpu else ["--margingate-trace-dir", str(self.out / "traces")]
        elif self.cpu:  # SGLang alone does not start on a plain CPU
            words += ["--margingate-policy", "off"]
        began = time.monotonic()
        module = OURS if ours or self.cpu else STOCK
        server = stack.enter_context(serve(words, log=self.out / f"{name}.log", timeout=240, module=module, env=around))
        self.found["start"][name] = {"seconds": round(time.monotonic() - began, 1), **started(self.out / f"{name}.log")}
        self.say(f"{name} serves; {self.found['start'][name]}"[:300])
        return server

    def target(self, server: Server, model: Path) -> Target:
        """Return a server with the vocabulary that its prompts are drawn from."""
        return Target(server.base_url, json.loads((model / "config.json").read_text())["vocab_size"])

    # ---- parts -----------------------------------------------------------------------------------------------------

    def steps(self, model: str, servers: dict[str, Target]) -> None:
        """Time the decode step, one server at a time, in turns."""
        runs: dict[str, dict[str, list[float]]] = {name: {} for name in servers}
        for number in range(self.repeats):
            for name in list(servers)[:: 1 if number % 2 == 0 else -1]:
                servers[name].flush_cache()
                arm = "stock" if name == "stock" else "gate"
                batches = list(self.scale.batches)
                for rows, each in cost(servers[name], [arm], batches, self.scale.context, self.scale.step_new, 1)[
                    arm
                ].items():
                    runs[name].setdefault(rows, []).append(each[0]["step_ms"])
        table = {name: {rows: statistics.median(ms) for rows, ms in by_rows.items()} for name, by_rows in runs.items()}
        ratios = {rows: round(table["ours"][rows] / ms, 3) for rows, ms in table["stock"].items()}
        self.found["cost"][model] = {"ms": runs, "ratio": ratios}
        slow = [f"{rows} rows: {ratio}" for rows, ratio in ratios.items() if not ratio <= self.slowest]
        self.check(f"{model}: step at most {self.slowest} of stock", [] if self.cpu else slow, ratios)

    def mixed(self, model: str, servers: dict[str, Server], vocab: int, rounds: int = 2) -> None:
        """Run a closed load on each in turn."""
        scale, load = self.scale, Load("closed", self.scale.load)
        prompts = draw(parse(f"random:{scale.lengths}").prompts(scale.requests, 0), vocab, 0)
        work = Work({load: tuple(chains(load, prompts, scale.requests))}, rounds=rounds, identity="none")
        results = Results(labels=list(servers))
        served = [connect(name, server.client, work, results) for name, server in servers.items()]
        for each in served:
            warm_up(each, work)
        for number in range(rounds):
            for each in served[:: 1 if number % 2 == 0 else -1]:
                run_once(each, load, number, work, results, Quiet())
        cells = {name: results.cell(name, load) for name in servers}
        ratios = [round(r, 3) for r in results.ratios(cells["ours"], "tokens_per_s")]
        rates = {name: round(cell.median("tokens_per_s")) for name, cell in cells.items()}
        self.found["mixed"][model] = {"tokens_per_s": rates, "ratios": ratios}
        low = [] if self.cpu or statistics.median(ratios) >= 0.95 else [f"{ratios}"]
        self.check(f"{model}: mixed load at least 0.95 of stock", low, {"ratios": ratios, **rates})

    def same(self, name: str, to: Target, server: Server, sizes: tuple[int, ...], states: tuple[str, ...]) -> None:
        """Compare sequences in company with their runs alone; ours must pass and say why, stock must fail."""
        scale, ours = self.scale, not name.endswith("stock")
        found = identity(to, ["gate" if ours else "stock"], list(sizes), scale.prompts, scale.new, states)
        table = {what: f"{cell['same']}/{cell['of']}" for what, cell in next(iter(found.values())).items()}
        part = {what: value for what, value in table.items() if value.split("/")[0] != value.split("/")[1]}
        if not ours:
            self.check(
                f"{name}: fails the same test", [] if part or self.cpu else ["every sequence is identical"], table
            )
            return
        problems = [f"{what}: {value}" for what, value in part.items()]
        streams = to.batch(
            [to.prompt(77 + i, 200 + i) for i in range(min(33, 2 * sizes[-1]))], 16, {"margingate_policy": "gate"}
        )
        labels = {s.meta["margingate"]["guarantee"] for s in streams}
        status = server.client.status()
        totals, largest = status["totals"], status["batch_rows"]["max"]
        seen = {
            **table,
            "labels": sorted(labels),
            "largest batch": largest,
            **{k: totals[k] for k in ("steps", "structural", "verified")},
        }
        if labels != {"structural"} or totals["verified"]:
            problems.append(f"labels {sorted(labels)}, {totals['verified']} steps verified, notes {status['notes']}")
        if largest < max(sizes):
            problems.append(f"no batch of {max(sizes)} formed")
        self.check(f"{name}: identical and structural", problems, seen)

    def broken_reduce(self, server: Server) -> None:
        """A sum that rounds otherwise at few rows is named, and sums of a decode step are gathered instead."""
        log = (self.out / "broken-reduce.log").read_text(errors="replace")
        said = re.search(r"margingate: (all-reduce over .*)", log)
        status = server.client.status()
        text = said[1] if said else "nothing"
        problems = [] if f"another order (1) at 1-{REDUCE_ROWS} rows" in text else [f"the log says {text}"]
        classes = [x["classes"][:3] for x in status["invariance"]["map"]["layers"] if x["name"] == "all-reduce"]
        if "are gathered" not in log or any(len(each) != 1 for each in classes):
            problems.append(f"it was not made otherwise: classes {classes}")
        self.check(
            "a broken all-reduce is found, named and gathered", problems, {"log": text[:160], "classes": classes}
        )

    def broken_layer(self, model: Path) -> None:
        """A layer that leaks on the last rank alone: every rank refuses, and it is named."""
        env = {"MARGINGATE_TEST_BREAK": LAYER, "MARGINGATE_TEST_RANK": str(self.args.tp - 1)}
        began = time.monotonic()
        try:
            with ExitStack() as stack:
                self.start(stack, "broken-layer", model, True, (), env, self.args.stock_gpus)
            problems = ["it serves"]
        except ServerError as error:
            problems = [] if time.monotonic() - began < 230 else [f"it hung: {error}"]
        log = (self.out / "broken-layer.log").read_text(errors="replace")
        refused = re.findall(r"margingate: refusing to serve: (.*)", log)
        if not any(LAYER in line and "rank" in line for line in refused):
            problems.append(f"it said {refused[:1]}")
        seen = {"seconds": round(time.monotonic() - began), "said": refused[:1]}
        self.check("a layer broken on one rank is refused by name", problems, seen)

    # ---- everything ------------------------------------------------------------------------------------------------

    def pair(self, stack: ExitStack, name: str, path: Path) -> dict[str, Future[Server]]:
        """Start stock and ours."""
        return {w: self.pool.submit(self.start, stack, f"{name}-{w}", path, w == "ours") for w in ("stock", "ours")}

    def model(self, name: str, path: Path, servers: dict[str, Server], timed: bool) -> None:
        """Ask one model's servers."""
        targets = {who: self.target(server, path) for who, server in servers.items()}
        if timed and self.left() > 25 and len(servers) == 2:
            self.steps(name, targets)
        if timed and self.left() > 40 and len(servers) == 2 and "mixed" in self.args.parts:
            self.mixed(name, servers, targets["ours"].vocab)

    def identities(self, name: str, path: Path, servers: dict[str, Server]) -> None:
        """Compare both servers' sequences; at once where they have GPUs of their own."""
        jobs: dict[str, Any] = {}
        for who, server in servers.items():
            ours = who == "ours"
            states = self.scale.states if ours else ("cold",)
            sizes = self.scale.sizes if ours else self.scale.stock_sizes
            jobs[who] = self.pool.submit(self.same, f"{name}-{who}", self.target(server, path), server, sizes, states)
            if not self.apart:
                jobs[who].exception()
        for who, job in jobs.items():
            if job.exception() is not None:
                self.check(f"{name}-{who}: identity", [str(job.exception())])

    def run(self) -> None:
        """Run everything that fits."""
        names = self.args.models.split(",")
        if self.args.quick:
            self.run_quick(names[0], names[-1])
            return
        paths = {name: self.pool.submit(self.weights, name) for name in names}
        with ExitStack() as everything:
            stacks = {name: everything.enter_context(ExitStack()) for name in (*names, "last")}
            starting = self.pair(stacks[names[0]], names[0], paths[names[0]].result())
            for at, name in enumerate(names):
                servers = self.ready(name, starting)
                path = paths[name].result()
                self.model(name, path, servers, timed=True)
                following = names[at + 1] if at + 1 < len(names) else None
                if following and self.left() > 110:  # timings are over: another server's start may disturb
                    starting = self.pair(stacks[following], following, paths[following].result())
                elif not following:
                    last = self.last(stacks["last"], paths[names[0]].result())
                self.identities(name, path, servers)
                stacks[name].close()
                if following and self.left() <= 60:
                    self.say(f"{following} is left out: {self.left():.0f} s left")
                    break
            else:
                self.faults(last, paths[names[0]].result())
            self.save()

    def run_quick(self, name: str, faulty: str) -> None:
        """Start everything at once: one model's servers, and those of the last part with the model ``faulty``."""
        paths = {model: self.pool.submit(self.weights, model) for model in dict.fromkeys((faulty, name))}
        with ExitStack() as stack:
            last = self.last(stack, paths[faulty].result())
            starting = self.pair(stack, name, paths[name].result())
            servers, path = self.ready(name, starting), paths[name].result()
            self.identities(name, path, servers)
            self.faults(last, paths[faulty].result())
            self.model(name, path, servers, timed="steps" in self.args.parts)

    def ready(self, name: str, starting: dict[str, Future[Server]]) -> dict[str, Server]:
        """Return the servers that came up; the others are failures."""
        servers = {}
        for who, future in starting.items():
            try:
                servers[who] = future.result()
            except Exception as error:
                self.check(f"{name}-{who}: starts", [str(error)[:400]])
        return servers

    def last(self, stack: ExitStack, path: Path) -> dict[str, Future[Server]]:
        """Start the servers of the last part, where there is time for them."""
        if "faults" not in self.args.parts or self.left() < 60:
            return {}
        chunks = ("--chunked-prefill-size", "256", "--margingate-chunk", "256")
        fault = {"MARGINGATE_TEST_REDUCE": str(REDUCE_ROWS)}
        return {
            "chunks": self.pool.submit(self.start, stack, "chunks", path, True, chunks),
            "broken-reduce": self.pool.submit(
                self.start, stack, "broken-reduce", path, True, (), fault, self.args.stock_gpus
            ),
            "broken-layer": self.pool.submit(self.broken_layer, path),  # type: ignore[dict-item]
        }

    def faults(self, starting: dict[str, Future[Server]], path: Path) -> None:
        """Ask the servers of the last part."""
        for who, future in starting.items():
            try:
                server = future.result(timeout=max(1.0, self.left()))
                if who == "chunks":
                    sizes = self.scale.sizes[-3::2]
                    self.same("chunks of 256", self.target(server, path), server, sizes, ("cold", "warm"))
                elif who == "broken-reduce":
                    self.broken_reduce(server)
            except Exception as error:
                self.check(f"{who}", [f"{type(error).__name__}: {error}"[:400]])

    def give_up(self) -> None:
        """The time is up: leave no server behind, and show what was found."""
        import psutil

        for child in psutil.Process().children(recursive=True):
            child.kill()
        self.check("everything in time", ["the time was up"])
        print(self.table(), flush=True)
        os._exit(124)

    def table(self) -> str:
        """Return everything in at most 15 lines."""
        rows = [
            [name, "holds" if c["holds"] else "FAILS", json.dumps(c["seen"], default=str)[:110]]
            for name, c in self.found["checks"].items()
        ]
        return tables.text(["check", "", "seen"], rows[:14], (0, 1, 2))


@dataclass
class Quiet:
    """Shows nothing of single requests."""

    said: list[str] = field(default_factory=list)

    def phase(self, label: str, total: int) -> None:
        """Note what begins."""
        self.said.append(f"{label}: {total}")

    def done(self) -> None:
        """Say nothing."""


def started(log: Path) -> dict[str, float]:
    """Return the seconds of a server's map, self-test and trials, as its log tells them."""
    text = log.read_text(errors="replace")
    patterns = {
        "map": r"map of .* in ([\d.]+) s,", "self-test": r"self-test passed: .* in ([\d.]+) s", "trial": r"fast path tried in ([\d.]+) s",
        "prefill graphs": r"captured in ([\d.]+) s,", "prefill trial": r"prefill graphs tried .* in ([\d.]+) s",
    }  # fmt: skip
    found = {name: [float(x) for x in re.findall(pattern, text)] for name, pattern in patterns.items()}
    return {name: max(seconds) for name, seconds in found.items() if seconds}


def main(argv: list[str] | None = None) -> int:
    """Run everything; the short table comes last."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tp", type=int, default=2)
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES of our servers; all by default")
    add("--stock-gpus", default="", help="of stock's; the same by default")
    add("--models", default="", help="8b, 14b; both by default")
    add("--parts", default="steps,mixed,faults", help="what to run beside identity (%(default)s)")
    add(
        "--quick",
        action="store_true",
        help="fewer sizes; every server starts at once; faults are put into the last model",
    )
    add("--budget", type=float, default=290, help="seconds (%(default)s)")
    args = parser.parse_args(words)
    args.models = args.models or ("8b" if args.device == "cpu" else "8b,14b")
    if args.device == "cuda":
        prepare(words, Path(__file__))
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    signal.signal(signal.SIGTERM, lambda *_: run.give_up())
    try:
        run.run()
    finally:
        run.save()
        print(run.table(), flush=True)
    return 0 if all(check["holds"] for check in run.found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
