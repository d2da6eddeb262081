"""Labels and columns on a GPU, in one command and under five minutes with warm compile caches.

    python3 tests/gpu/truth.py --out DIR                 on the GPU host; needs .gpu/ like session.py, or an installed SGLang
    python3 tests/gpu/truth.py --out DIR --device cpu    the same logic on small shapes, to try it without a GPU

a. the truth sweep on the embedded model, 200 requests: no answer labelled structural or verified differs from its run alone;
b. columns against each other: padded rows are captured sizes, a lone request's step_ms fits its tpot_ms, times go forward;
c. a scoring neighbour of 1,500 tokens beside 24 chaotic sequences of the 8B shape, and a neighbour that is retracted: all
   identical and structural; without a gate the same test fails;
d. a layer broken on purpose is refused, or nothing is labelled above none.

What was found is in DIR/truth.json; exit status 1 where something does not hold. test_truth_gpu.py asserts each by name.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from truth_columns import column_problems  # noqa: E402
from truth_neighbours import NEIGHBOURS, Chaos, Shape  # noqa: E402

from sglang_margingate.bench.evidence.truth_checks import check_traces  # noqa: E402
from sglang_margingate.bench.evidence.truth_plan import EmbeddedWords, Planner  # noqa: E402
from sglang_margingate.bench.evidence.truth_sweep import Result, report, sweep  # noqa: E402
from sglang_margingate.bench.servers.client import ServerError  # noqa: E402
from sglang_margingate.bench.servers.process import Server, serve  # noqa: E402

READY = "MARGINGATE_TRUTH_READY"
OFFLINE = (
    "--dtype bfloat16 --grammar-backend none --sampling-backend pytorch --cuda-graph-backend-prefill disabled "
    "--attention-backend flashinfer --sleep-on-idle --watchdog-timeout 1800"
)
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
BROKEN = {"MARGINGATE_TEST_BREAK": "layers.1.mlp.gate_up_proj"}


@dataclass(frozen=True)
class Scale:
    """What differs between the GPU and the trial of this file on a CPU."""

    shape: Shape
    config: dict[str, Any]
    weights: Path
    common: str
    embedded: str
    chaotic: str
    requests: int
    tolerance: float
    """Of a lone request's median step_ms against its tpot_ms: a consistency of columns, not a speed."""


GPU = Scale(
    shape=Shape(vocab=128_256, lengths=(225, 900), new=64, scored=1500, pool=24_000),
    config=LLAMA_8B,
    weights=Path("/dev/shm/llama-8b"),
    common=OFFLINE,
    embedded="--max-total-tokens 60000 --mem-fraction-static 0.2 --cuda-graph-max-bs-decode 40",
    chaotic="--mem-fraction-static 0.75 --max-running-requests 80 --cuda-graph-max-bs-decode 64",
    requests=200,
    tolerance=0.15,
)
CPU = Scale(
    shape=Shape(vocab=2048, lengths=(60, 240), new=40, scored=600, pool=9_000),
    config=LLAMA_8B | {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 16384},
    weights=Path("/tmp/margingate-truth-chaotic"),
    common="--sleep-on-idle",
    embedded="--max-total-tokens 30000",
    chaotic="",
    requests=40,
    tolerance=0.5,
)  # fmt: skip
SCALES = {"cuda": GPU, "cpu": CPU}


class Truth:
    """Starts the servers, asks them, and keeps what was found by check."""

    def __init__(self, scale: Scale, device: str, out: Path) -> None:
        self.scale, self.device, self.out = scale, device, out
        self.found: dict[str, dict[str, Any]] = {}
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """Print with the time since the start."""
        print(f"{time.monotonic() - self._began:5.0f} s  {text}", flush=True)

    def check(self, name: str, problems: list[str], **facts: Any) -> None:
        """Note one check: it holds where there are no problems."""
        self.found[name] = {"holds": not problems, "problems": problems, **facts}
        self.say(f"{name}: {'holds' if not problems else '; '.join(problems[:4])}")
        (self.out / "truth.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def start(self, stack: ExitStack, name: str, flags: str, env: dict[str, str] | None = None) -> Server:
        """Start a server that the stack stops; its log and traces are named after it."""
        words = [*self.scale.common.split(), *flags.split(), "--margingate-trace-dir", str(self.out / f"{name}-traces")]
        server = stack.enter_context(serve(words, log=self.out / f"{name}.log", env=env, timeout=420))
        self.say(f"{name} serves")
        return server

    def weights(self) -> Path:
        """Make the chaotic model once: random weights, so that any bit that differs shows soon."""
        folder = self.scale.weights
        if not (folder / "model.safetensors.index.json").exists():
            shape = self.out / "shape"
            shape.mkdir(exist_ok=True)
            (shape / "config.json").write_text(json.dumps(self.scale.config))
            command = [sys.executable, str(HERE / "random_model.py"), str(shape), str(folder), self.device]
            subprocess.run(command, check=True)
            self.say(f"made {folder}")
        return folder

    # ---- the checks -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start the servers while others are asked, and check everything."""
        canonical = "--margingate-policy gate --margingate-fast-path canonical"
        with ExitStack() as tiny, ExitStack() as big, ExitStack() as ungated, ThreadPoolExecutor(3) as pool:
            embedded = pool.submit(self.start, tiny, "embedded", f"{canonical} {self.scale.embedded}")
            shape = self.scale.shape
            chaotic = (
                f"--model-path {self.weights()} --skip-tokenizer-init --context-length {shape.pool + 100} "
                f"--max-total-tokens {shape.pool} --schedule-conservativeness 0.01 {self.scale.chaotic}"
            )
            gated = pool.submit(self.start, big, "chaotic", f"{canonical} {chaotic}")
            self._lone(gated.result(), embedded)
            log = pool.submit(self.start, ungated, "ungated", f"--margingate-policy log {chaotic}")
            result = self._sweep(embedded.result())
            broken = pool.submit(self._broken, f"{canonical} {self.scale.embedded}")
            facts = asyncio.run(Chaos(gated.result().base_url, shape).run(self.say))
            self._neighbours("chaotic", facts, NEIGHBOURS)
            status = gated.result().client.status()
            big.close()
            self._columns("chaotic", status)
            facts = asyncio.run(Chaos(log.result().base_url, shape, gated=False).run(self.say))
            self._inverse(facts)
            broken.result()
            status = embedded.result().client.status()
            tiny.close()
            self._trace(result)
            self._columns("embedded", status)

    def _lone(self, server: Server, others: Future[Server]) -> None:
        """Ask lone requests of 96 tokens, with no other server starting on the device."""
        others.result()
        chaos = Chaos(server.base_url, self.scale.shape)
        asyncio.run(chaos.lone("lone", 8, 96))

    def _sweep(self, server: Server) -> Result:
        planner = Planner(EmbeddedWords(), seed=0, grammar=self.device == "cpu")
        result = asyncio.run(sweep(server.base_url, "mixed", planner.plan(self.scale.requests), 16, self.say))
        report(result)
        self.check("sweep", result.verdict(), facts=result.to_dict())
        return result

    def _trace(self, result: Result) -> None:
        """Hold the sweep's summaries against the trace that its server left."""
        before = len(result.problems)
        run = self._run("embedded")
        checked = check_traces(result.answers, run.steps, run.requests, result.problems)
        problems = result.problems.lines() if len(result.problems) > before else []
        self.check("sweep-trace", problems or ([] if checked else ["no request was checked"]), checked=checked)

    def _run(self, name: str) -> Any:
        from sglang_margingate.trace import list_runs, read_run

        (info,) = list_runs(self.out / f"{name}-traces")
        return read_run(info.path)

    def _columns(self, name: str, status: dict[str, Any]) -> None:
        run = self._run(name)
        lone = self.scale.tolerance if name == "chaotic" else None
        problems, facts = column_problems(run.steps, run.requests, status["invariance"], lone, self.device == "cuda")
        self.check(f"columns-{name}", problems, facts=facts)

    def _neighbours(self, name: str, facts: dict[str, Any], checks: dict[str, Callable[[Any], list[str]]]) -> None:
        for check, of in checks.items():
            self.check(f"{name}-{check}", of(facts[check]), facts=facts[check])

    def _inverse(self, facts: dict[str, Any]) -> None:
        """The ungated server must fail the test that the gated one passed, and claim nothing."""
        neighbours = facts["scoring"]
        differ = [size for size, of in neighbours.items() if of["same"] < of["of"]]
        problems = [] if differ else ["without a gate all sequences are identical: the test has no power"]
        labels = {label for of in neighbours.values() for label in of["labels"]}
        problems += [f"labels without a gate: {sorted(labels)}"] if labels != {"none"} else []
        self.check("ungated-differs", problems, facts=neighbours)

    def _broken(self, flags: str) -> None:
        """A layer that leaks its companions: refused, or every label is none."""
        with ExitStack() as stack:
            try:
                server = self.start(stack, "broken", flags, BROKEN)
            except ServerError as error:
                named = BROKEN["MARGINGATE_TEST_BREAK"] in (self.out / "broken.log").read_text(errors="replace")
                self.check("broken", [] if named else [f"died without naming the layer: {error}"], refused=True)
                return
            labels = asyncio.run(Chaos(server.base_url, Shape(vocab=2048)).labels(24))
        self.check("broken", [] if set(labels) == {"none"} else [f"labels {sorted(set(labels))}"], refused=False)


def prepare(argv: list[str], script: Path = HERE / "truth.py") -> None:
    """On an offline host become the same command with SGLang unpacked and host.sh's environment, once."""
    if not Path(".gpu/host.sh").exists() or READY in os.environ:
        return
    shell = subprocess.run(
        ["bash", "-c", ". .gpu/host.sh; site_up >&2; env -0"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    env = dict(line.split("=", 1) for line in shell.split("\0") if line)
    env |= {"PYTHONPATH": f"{Path.cwd()}/kernels:{env['PYTHONPATH']}", READY: "1"}
    os.execvpe(sys.executable, [sys.executable, str(script), *argv], env)


def main(argv: list[str] | None = None) -> int:
    """Run everything; 0 where everything holds."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(SCALES), default="cuda")
    args = parser.parse_args(words)
    if args.device == "cuda":
        prepare(words)
    args.out.mkdir(parents=True, exist_ok=True)
    truth = Truth(SCALES[args.device], args.device, args.out.resolve())
    truth.run()
    failed = [name for name, found in truth.found.items() if not found["holds"]]
    print("everything holds" if not failed else f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
