"""One GPU session on an offline host, cut to fit into short device time.

    python3 tests/gpu/session.py --out DIR STAGE...     stages in this order, see STAGES
    MARGINGATE_SESSION_LANE=1 python3 tests/gpu/session.py --out DIR --port 31000 STAGE...     a lane beside it

A stage is one server and what is asked of it. Commands that are *timed* have the GPU to themselves: lanes are stopped
(SIGSTOP) meanwhile. While a stage runs its other commands (identity of sequences), the next stage's server starts already.
So device time goes into measurements, not into waiting for weights; a start takes 75 s with saved compile caches.

Needs .gpu/ in the working directory (gpu/build_site.sh of the workplace; where only 64 MiB travel, repacked without cudnn,
llguidance and torchao/_C*.so by xz -9e), unpacks it, and makes random weights of the 8B shape (random_model.py). Start lanes
once /tmp/site/.ok is there. Every command's output is in DIR/STAGE.txt, a server's log in DIR/STAGE.log, and what happened
when in DIR/session.txt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BIG, TINY = "/dev/shm/llama-8b", "sglang_margingate/demo/model"
LANE = "MARGINGATE_SESSION_LANE"
OFFLINE = "--dtype bfloat16 --grammar-backend none --sampling-backend pytorch --cuda-graph-backend-prefill disabled"
FLASHINFER = f"{OFFLINE} --attention-backend flashinfer"
SHAPE = f"--model-path {BIG} --skip-tokenizer-init --context-length 40960 --max-total-tokens 90000 --stream-interval 4"
SIZES = "--mem-fraction-static 0.75 --max-running-requests 80 --cuda-graph-max-bs-decode 64"
ALL_8B = f"{FLASHINFER} {SHAPE} {SIZES}"
OWN_8B = f"--dtype bfloat16 --grammar-backend none --sampling-backend pytorch {SHAPE} {SIZES}"
"""SGLang's own defaults for the machine: on Hopper FlashAttention-3 and prefills in CUDA graph pieces."""
ALL_TINY = (
    f"{FLASHINFER} --model-path {TINY} --context-length 2048 --max-total-tokens 60000 --mem-fraction-static 0.2 "
    "--cuda-graph-max-bs-decode 40 --sleep-on-idle --watchdog-timeout 1800 --margingate-trace off"
)
OURS, STOCK = "sglang_margingate.launch_server", "sglang.launch_server"
GATES = "gate@0.01,gate@0.05,gate@0.1505,gate@0.1856,gate@0.495"
COST = "python3 -m sglang_margingate.bench.evidence.decode_cost --base-url {url}"
CLI = "python3 -m sglang_margingate.cli"


@dataclass(frozen=True)
class Stage:
    """A server (none: commands only) and the commands to run against it; {url} and {out} are filled in.

    With ``after`` it does not start before the stage before it has ended, whose files it needs.
    """

    module: str = ""
    flags: str = ""
    timed: tuple[str, ...] = ()
    untimed: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    after: bool = False


def cost(tag: str, arms: str, more: str = "") -> str:
    return f"{COST} --tag {tag} --new 96 --arms {arms} {more} --out {{out}}/{tag}.json"


def long(tag: str, arm: str) -> tuple[str, str]:
    """The step at long contexts."""
    more = f"--tag {tag} --arms {arm} --new 48"
    return (
        f"{COST} {more} --context 8192 --batches 1,8 --out {{out}}/{tag}-8k.json",
        f"{COST} {more} --context 32000 --batches 1 --out {{out}}/{tag}-32k.json",
    )


def identity(tag: str, arm: str, more: str = "") -> str:
    return f"{COST} --tag {tag} --repeats 0 --identity-arms {arm} {more} --out {{out}}/{tag}-identity.json"


REPEAT = "python3 tests/gpu/repeat_kernels.py"
COMPARE = "python3 tests/gpu/compare.py {url}"
CHECK = f"{CLI} check --base-url {{url}} --repeats 1"
STAGES: dict[str, Stage] = {
    "kernels": Stage(
        timed=(
            "python3 kernels/benchmarks/bench_top2_margin.py --json {out}/top2.json",
            "python3 kernels/benchmarks/bench_top2_margin.py --tune --json {out}/top2-tune.json",
        )
    ),
    "kernel-tests": Stage(untimed=("python3 -m pytest -q -p no:cacheprovider tests/gpu/test_kernels_gpu.py",)),
    "fa3": Stage(  # why FlashInfer's prefill is not repeatable: its kernel with one warp held up
        untimed=("python3 tests/gpu/fa3_barrier.py --folder /tmp/fa3 --json {out}/fa3.json",)
    ),
    "repeat": Stage(  # races: the three prefills in turns, then every kernel
        untimed=(
            f"{REPEAT} --seconds 30 --only eight --json {{out}}/repeat-eight.json",
            f"{REPEAT} --seconds 3 --json {{out}}/repeat.json",
        )
    ),
    "stock": Stage(
        STOCK,
        f"{OWN_8B} --disable-radix-cache",
        (cost("stock", "stock", "--prefill-arms stock"), *long("stock", "stock")),
        (identity("stock", "stock"),),
    ),
    "stock-flashinfer": Stage(
        STOCK,
        f"{ALL_8B} --disable-radix-cache",
        (cost("stock-flashinfer", "stock", "--prefill-arms stock"), *long("stock-flashinfer", "stock")),
    ),
    "log": Stage(
        OURS,
        f"{ALL_8B} --disable-radix-cache --margingate-policy log --margingate-trace-dir {{out}}/traces",
        (cost("log", "log"),),
    ),
    "window": Stage(
        OURS,
        f"{ALL_8B} --margingate-fast-path stock --margingate-radix off --margingate-trace-dir {{out}}/traces",
        (cost("window", f"{GATES},always"),),
        (identity("window", "always"),),
        {"MARGINGATE_TEST_SHARE": "1"},
    ),
    "column": Stage(
        OURS,
        f"{ALL_8B} --margingate-fast-path stock --margingate-radix off --margingate-repair column "
        "--margingate-trace-dir {out}/traces",
        (cost("column", GATES),),
        (),
        {"MARGINGATE_TEST_SHARE": "1"},
    ),
    "deterministic": Stage(
        STOCK, f"{OWN_8B} --enable-deterministic-inference", (cost("deterministic", "stock", "--prefill-arms stock"),)
    ),
    "canonical": Stage(  # the default on a GPU: no flag of ours names the fast path
        OURS,
        f"{ALL_8B} --margingate-trace-dir {{out}}/traces",
        (cost("canonical", "gate", "--prefill-arms gate"), *long("canonical", "gate")),
        (identity("canonical", "gate"),),
    ),
    "canonical256": Stage(
        OURS,
        f"{ALL_8B} --chunked-prefill-size 256 --margingate-chunk 256 --margingate-trace off",
        (),
        (identity("canonical256", "gate", "--identity-sizes 8,64"),),
    ),
    "stress": Stage(  # looks for what differed once in 1,416 sequences (docs/benchmarks.md): many short ones
        OURS,
        f"{ALL_8B} --margingate-trace off",
        (),
        (
            identity(
                "stress",
                "gate",
                "--identity-sizes 2,3,1 --identity-states 'half warm,cold' --identity-rounds 15 --identity-new 16",
            ),
        ),
    ),
    "default": Stage(  # SGLang's own sizes for decode graphs and running requests, our own attention backend
        OURS,
        f"{OFFLINE} {SHAPE} --mem-fraction-static 0.75 --margingate-trace off",
        (cost("default", "gate"),),
        (identity("default", "gate", "--identity-sizes 8,64,100"),),
    ),
    "tiny": Stage(OURS, ALL_TINY, (), (f"{COMPARE} tiny 200 8,33 gate",)),
    "tiny-log": Stage(
        OURS,
        f"{ALL_TINY} --margingate-policy log",
        (),
        (f"{CHECK} --limit 40 --phases alone,together,staggered --expect-fail", f"{COMPARE} log 48 8,33 stock"),
    ),
    "tiny-calibrate": Stage(
        OURS,
        f"{ALL_TINY} --margingate-fast-path stock --margingate-audit-rate 1.0",
        (),
        (
            f"{CLI} calibrate --base-url {{url}} --dataset arith --transfer code,story --limit 200 -o {{out}}/arith.json",
            f"{CLI} calibrate --base-url {{url}} --dataset arith,code,story --limit 200 -o {{out}}/profile.json",
        ),
    ),
    "tiny-gate": Stage(
        OURS,
        f"{ALL_TINY} --margingate-fast-path stock --margingate-profile {{out}}/profile.json",
        (),
        (
            f"{CHECK} --limit 200 --phases alone,together,staggered,traffic --json {{out}}/check.json",
            f"{COMPARE} gate 200 8,33 gate",
        ),
        after=True,
    ),
    "tiny-broken": Stage(  # must refuse to start
        OURS, f"{ALL_TINY} --margingate-fast-path stock", env={"MARGINGATE_TEST_BREAK": "layers.1.mlp.gate_up_proj"}
    ),
    "bench": Stage(
        timed=(
            f"{CLI} bench --dataset random:512:96 --limit 24 --concurrency 16 --repeats 2 --share 100 "
            "--modes stock,canonical,gate --trace-dir {out}/traces -o {out}/bench.json "
            f"--mode-flags stock=--disable-radix-cache -- {OWN_8B}",
        )
    ),
}


class Session:
    """Runs stages one after another, with the next server on its way while the GPU need not be quiet."""

    def __init__(self, out: Path, port: int) -> None:
        self.out, self.port, self.lane, self.began = out, port, LANE in os.environ, time.monotonic()
        self.env: dict[str, str] = {}

    def prepare(self, stages: list[str]) -> None:
        """Unpack SGLang, take over the environment that its host.sh sets, and make the weights that the stages need."""
        command = ["bash", "-c", ". .gpu/host.sh; site_up >&2; env -0"]
        shell = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        self.env = dict(line.split("=", 1) for line in shell.split("\0") if line)
        self.env["PYTHONPATH"] = f"{Path.cwd()}/kernels:{self.env['PYTHONPATH']}"
        if any(BIG in str(STAGES[name]) for name in stages) and not Path(BIG, "model.safetensors.index.json").exists():
            command = [sys.executable, "tests/gpu/random_model.py", ".gpu/shapes/llama-3.1-8b", BIG]
            subprocess.run(command, env=self.env, check=True)
        self.say("prepared")

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:6.0f} s  {text}"
        with (self.out / "session.txt").open("a") as file:
            print(line, file=file)
        print(line, flush=True)

    def run(self, stages: list[str]) -> None:
        port, server = self.port, self.start(stages[0], self.port)
        for at, name in enumerate(stages):
            stage, following = STAGES[name], None
            ready = server is None or self.wait(name, server)
            url = f"http://127.0.0.1:{port}"
            if ready and stage.timed:
                with self.quiet():
                    for command in stage.timed:
                        self.command(name, command, url)
            port += 1
            early = at + 1 < len(stages) and bool(stage.untimed) and not STAGES[stages[at + 1]].after
            if early:
                following = self.start(stages[at + 1], port)
            for command in stage.untimed if ready else ():
                self.command(name, command, url)
            self.stop(server)
            self.say(f"{name} done")
            if not early and at + 1 < len(stages):
                following = self.start(stages[at + 1], port)
            server = following

    def start(self, name: str, port: int) -> subprocess.Popen[bytes] | None:
        stage = STAGES[name]
        if not stage.module:
            return None
        flags = shlex.split(stage.flags.format(out=self.out))
        command = [sys.executable, "-m", stage.module, "--port", str(port), *flags]
        with (self.out / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=self.env | stage.env, start_new_session=True
            )

    def wait(self, name: str, server: subprocess.Popen[bytes]) -> bool:
        log = self.out / f"{name}.log"
        for _ in range(420):
            if b"fired up" in log.read_bytes():
                self.say(f"{name} serves")
                return True
            if server.poll() is not None:
                break
            time.sleep(1)
        said = [line for line in log.read_text(errors="replace").splitlines() if "refus" in line or "Error" in line]
        self.say(f"{name} did not start: {' | '.join(said[-2:])[:400]}")
        return False

    def stop(self, server: subprocess.Popen[bytes] | None) -> None:
        if server is None or server.poll() is not None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(server.pid, sign)
                server.wait(timeout=6)
        time.sleep(2)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep the lanes stopped, those too that somebody starts meanwhile."""
        self.lanes(signal.SIGSTOP)
        over = threading.Event()

        def hold() -> None:
            while not over.wait(0.5):
                self.lanes(signal.SIGSTOP)

        holder = threading.Thread(target=hold)
        holder.start()
        try:
            yield
        finally:
            over.set()
            holder.join()
            self.lanes(signal.SIGCONT)

    def lanes(self, sign: signal.Signals) -> None:
        """Stop or continue every process of the lanes, twice: one may have been starting another."""
        for _ in range(0 if self.lane else 2):
            for folder in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if f"{LANE}=".encode() in (folder / "environ").read_bytes():
                        os.kill(int(folder.name), sign)
            time.sleep(0.2)

    def command(self, name: str, command: str, url: str) -> None:
        began = time.monotonic()
        with (self.out / f"{name}.txt").open("a") as log:
            print(f"$ {command}", file=log, flush=True)
            words = shlex.split(command.format(out=self.out, url=url))
            try:
                limit = None if self.lane else 540  # a lane's clock goes on while it is stopped
                code = subprocess.run(
                    words, stdout=log, stderr=subprocess.STDOUT, env=self.env, timeout=limit, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        self.say(f"{name}: exit {code} after {time.monotonic() - began:.0f} s: {command[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=sorted(STAGES), metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--port", type=int, default=30000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    session = Session(args.out.resolve(), args.port)
    session.prepare(args.stages)
    session.run(args.stages)


if __name__ == "__main__":
    main()
