"""Mixtures of experts, weights of 8 bits and further dense models on one GPU: identity, faults and speed against stock. One command.

    python3 tests/gpu/models_gpu.py --out DIR [--models moe,olmoe,mixtral,qwen3-8b,7b,fp8-channel,fp8-block] [--budget 280]   needs .gpu/ like truth.py

For each model stock (its own defaults) and ours share the GPU; whoever is not asked is idle. First the decode step and a mixed
load, in turns, and identity: 24 sequences alone against batches of each size on a cold and a warm prefix cache, which
ours must pass at ``structural`` with no step verified, and stock must fail. Last a server whose experts round otherwise than when
they were probed: found by the trial and left to the gate. Weights are random (random_model.py,
random_fp8.py), so that one bit ends in other tokens. DIR gets results.json and logs; exit status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "support")]

from tensor_parallel import GPU, Run  # noqa: E402
from truth import prepare  # noqa: E402

from sglang_margingate.bench.servers.process import Server  # noqa: E402

BROKEN_ROWS = 48


@dataclass(frozen=True)
class Model:
    """A shape, what is changed of it, and the flags that it is served with."""

    shape: str
    writer: str = "random_model.py"
    change: tuple[tuple[str, int], ...] = ()
    flags: tuple[str, ...] = ()
    slowest_step: float = 1.03


MODELS = {
    "moe": Model("qwen3-30b-a3b-24l", change=(("num_hidden_layers", 8),), slowest_step=1.10),
    "olmoe": Model("olmoe-1b-7b", flags=("--context-length", "4096"), slowest_step=1.10),
    "mixtral": Model("mixtral-8x7b", change=(("num_hidden_layers", 8),), slowest_step=1.10),
    "qwen3-8b": Model("qwen3-8b"),
    "7b": Model("deepseek-r1-distill-qwen-7b"),
    "fp8-channel": Model("llama-3.1-8b", flags=("--quantization", "fp8")),
    "fp8-block": Model("qwen3-8b", "random_fp8.py"),
}


USUAL = "moe,fp8-channel,fp8-block"
SHAPES: dict[str, dict[str, object]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "vocab_size": 50304, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "clip_qkv": None,
        "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "attention_bias": False, "eos_token_id": 50279, "pad_token_id": 1,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None,
        "max_position_embeddings": 32768, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""Configurations that do not lie in .gpu/shapes: what the models' cards say."""


class Models(Run):
    """The tests of several GPUs with one of them, for models of other kinds."""

    def __init__(self, args: argparse.Namespace) -> None:
        args.tp, args.quick = 1, False
        super().__init__(args)
        self.flags: tuple[str, ...] = ()
        self.repeats = args.repeats
        if self.cpu:
            return
        # Two servers that load at once see each other's weights come: a share that leaves room for both, and a pool of a set size.
        share = GPU.flags.replace("--mem-fraction-static 0.9", "--mem-fraction-static 0.6")
        self.scale = replace(GPU, flags=share, stock_sizes=GPU.sizes if args.all_sizes else (2, 8, 33))

    def weights(self, model: str) -> Path:
        """Return a model's folder; random weights are made where there are none."""
        if self.cpu:
            import tiny_moe

            return tiny_moe.write(self.out / model, model)
        wanted = MODELS[model]
        change = dict(wanted.change) | ({"num_hidden_layers": self.args.layers} if self.args.layers else {})
        name = f"{model}-{self.args.layers}" if self.args.layers else model
        folder, shape = Path("/dev/shm", f"margingate-{name}"), Path("/tmp", f"shape-{name}")
        if not (folder / "model.safetensors.index.json").exists():
            shape.mkdir(exist_ok=True)
            known = SHAPES.get(wanted.shape)
            config = known or json.loads(Path(".gpu/shapes", wanted.shape, "config.json").read_text())
            (shape / "config.json").write_text(json.dumps(config | change))
            command = [sys.executable, str(HERE / wanted.writer), str(shape), str(folder)]
            subprocess.run(command, check=True, timeout=200, stdout=subprocess.DEVNULL)
            self.say(f"made {folder}")
        return folder

    def start(self, stack: ExitStack, name: str, model: Path, ours: bool, more: tuple[str, ...] = (),
              env: dict[str, str] | None = None, gpus: str = "") -> Server:  # fmt: skip
        """Start a server with the model's own flags; DeepGEMM compiles what is asked for, not every number of rows first."""
        around = {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "false", **(env or {})}
        return super().start(stack, name, model, ours, (*more, *self.flags), around, gpus)

    def run(self) -> None:
        """Run everything that fits, the most telling first."""
        for name in self.args.models.split(","):
            if self.left() < 100:
                self.say(f"{name} is left out: {self.left():.0f} s left")
                continue
            self.flags, self.slowest = MODELS[name].flags, MODELS[name].slowest_step
            path = self.weights(name)
            with ExitStack() as stack:
                self.ask(name, path, self.ready(name, self.pair(stack, name, path)))
            if name == "moe" and not self.cpu and "faults" in self.args.parts and self.left() > 90:
                self.broken_experts(path)
            self.save()

    def ask(self, name: str, path: Path, servers: dict[str, Server]) -> None:
        """Ask one model's servers, one after another."""
        if "ours" in servers:
            self.found.setdefault("map", {})[name] = servers["ours"].client.status()["invariance"]
            self.save()
            self.same(
                f"{name}-ours", self.target(servers["ours"], path), servers["ours"], self.scale.sizes, ("cold", "warm")
            )
        if len(servers) == 2 and self.left() > 30:
            self.steps(name, {who: self.target(server, path) for who, server in servers.items()})
        if "stock" in servers and self.left() > 20:
            self.same(
                f"{name}-stock",
                self.target(servers["stock"], path),
                servers["stock"],
                self.scale.stock_sizes,
                ("cold",),
            )
        if len(servers) == 2 and self.left() > 140:
            self.mixed(name, servers, self.target(servers["ours"], path).vocab)

    def broken_experts(self, path: Path) -> None:
        """Experts that round otherwise than when they were probed: the trial finds it, nothing is claimed."""
        with ExitStack() as stack:
            server = self.start(stack, "broken-experts", path, True, (), {"MARGINGATE_TEST_EXPERTS": str(BROKEN_ROWS)})
            status = server.client.status()
        notes = [
            note for note in status["invariance"]["notes"] if re.search(r"decode differs from the verify at \d+", note)
        ]
        problems = (
            [] if notes and not status["invariance"]["decode_ok"] else [f"notes: {status['invariance']['notes']}"]
        )
        self.check("experts broken on purpose are found", problems, notes)


def main(argv: list[str] | None = None) -> int:
    """Run everything; the short table comes last."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: the same logic with a tiny mixture, without a GPU",
    )
    add("--models", default=USUAL, help=f"of {', '.join(MODELS)} (%(default)s)")
    add("--parts", default="faults", help="faults: a server with broken experts, too")
    add("--layers", type=int, default=0, help="of a model, where it is not to be the usual number")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES of our server; all by default")
    add("--stock-gpus", default="", help="of stock's; the same by default")
    add("--repeats", type=int, default=4, help="of the decode steps (%(default)s)")
    add("--all-sizes", action="store_true", help="ask stock at every size as well")
    add("--budget", type=float, default=280, help="seconds (%(default)s)")
    args = parser.parse_args(words)
    if args.device == "cuda":
        prepare(words, Path(__file__))
    args.out.mkdir(parents=True, exist_ok=True)
    run = Models(args)
    signal.signal(signal.SIGTERM, lambda *_: run.give_up())
    try:
        run.run()
    finally:
        run.save()
        print(run.table(), flush=True)
    return 0 if all(check["holds"] for check in run.found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
