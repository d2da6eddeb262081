"""What changes a row's bits in a mixture of experts and in FP8 layers, and what each fixed configuration costs: a GPU, no server.

::

    python3 tests/gpu/expert_bits.py experts --out DIR [--shape .gpu/shapes/qwen3-30b-a3b-24l]
    python3 tests/gpu/expert_bits.py fp8 --out DIR [--seconds 60]

``experts``: the bank of experts with SGLang's own choice of configurations and with each of many fixed ones, by the probe that
servers use (canonical/experts/probe.py); the sum over experts both ways; the router's product; ties in its choice; times.
``fp8``: the classes of M of block-quantised and per-channel products, by back end, with times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sglang_margingate.serving.cpu as cpu

cpu.install_stand_ins()

from sglang_margingate.canonical.experts.table import short  # noqa: E402
from sglang_margingate.canonical.invariance import RowSizes  # noqa: E402
from sglang_margingate.canonical.layer_probe import labels  # noqa: E402
from sglang_margingate.canonical.linear_probe import FP8, LinearKind  # noqa: E402
from sglang_margingate.serving.layers import tuning  # noqa: E402

TIMED = [1, 8, 32, 64, 256, 1024, 4096]
SHAPES = {"8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (28672, 4096), "8B down": (4096, 14336),
          "Qwen3-8B gate_up": (24576, 4096), "Qwen3-8B down": (4096, 12288)}  # fmt: skip


def spans(found: dict[int, int | None]) -> str:
    """Return the classes in words: a{1-64} b{96-1024}."""
    groups: dict[int | None, list[int]] = {}
    for m, label in found.items():
        groups.setdefault(label, []).append(m)
    return " ".join(
        f"{'-' if k is None else chr(97 + k % 26)}{{{RowSizes(tuple(v)).describe()}}}" for k, v in groups.items()
    )


def experts(args: argparse.Namespace) -> dict[str, Any]:
    """Return the bits and times of every configuration, of SGLang's own choice, and of the layers around the experts."""
    bank = tuning.Bank(tuning.shape_in(args.shape))
    fixed = tuning.candidates(bank.own_configs())
    began = time.monotonic()
    workers = tuning.compile_all(args.shape)
    out: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for name, section in (("linear", routers), ("ties", ties)):
        with noted(out):
            out[name] = section(bank)
    for one in workers:
        one.wait()
    out["compile_seconds"] = time.monotonic() - began
    out["fixed"], numbers = {}, {}
    for c in fixed:
        us = bank.measure(c, TIMED)
        out["fixed"][short(c)] = {"bits": None, "us": us}
        print(f"{short(c)}: us {' '.join(f'{each:.0f}' for each in us.values())}", flush=True)
        save(args, out)
    fitting = [c for c in fixed if out["fixed"][short(c)]["us"]]
    for c, found in zip(fitting, bank.bits(fitting)):
        bits = None if found is None else numbers.setdefault(found, str(len(numbers)))
        out["fixed"][short(c)]["bits"] = bits
        print(f"{short(c)}: bits {bits}", flush=True)
    save(args, out)
    for name, c, kernel_sum in (("stock, sum by the kernel", None, True), ("stock", None, False),
                                ("fixed, stock's sum", tuning.config(16, 128, 128, 1, 8, 3), False)):  # fmt: skip
        bank.fix(c, kernel_sum)
        out[name] = {}
        with noted(out[name]):
            out[name] = {"classes": spans(labels(bank.kind(), list(tuning.ROWS))), "us": bank.times(TIMED)}
        save(args, out)
    return out


def routers(bank: tuning.Bank) -> dict[str, str]:
    """Return the classes of the layers around the experts, router first."""
    rows = [*range(1, 261), *range(264, 2049, 8)]
    out = {}
    for outputs, inputs in (
        (bank.shape.experts, bank.shape.hidden),
        (5120, bank.shape.hidden),
        (bank.shape.hidden, 4096),
    ):
        weight = torch.nn.Parameter(torch.empty(outputs, inputs, device="cuda", dtype=torch.bfloat16), False)
        kind = LinearKind("x", weight, None, lambda x, _, w=weight: torch.nn.functional.linear(x, w), False)
        out[f"{outputs}x{inputs}"] = spans(labels(kind, rows[::-1]))
    return out


def ties(bank: tuning.Bank) -> dict[str, Any]:
    """Return how the router's choice breaks ties: at every place and number of rows alike, and by which rule."""
    from sglang.srt.layers.moe.topk import fused_topk

    generator = torch.Generator("cuda").manual_seed(0)
    row = torch.randint(
        0, 4, (bank.shape.experts,), generator=generator, device="cuda"
    ).bfloat16()  # four values: full of ties
    chosen = set()
    for m in (1, 2, 3, 8, 31, 32, 33, 64, 65, 256, 1024, 4096):
        scores = torch.randn(m, bank.shape.experts, generator=generator, device="cuda").bfloat16()
        for place in {0, m // 2, m - 1}:
            scores[place] = row
        weights, ids = fused_topk(torch.empty(m, 8, device="cuda"), scores, bank.shape.top_k, True)
        for place in {0, m // 2, m - 1}:
            chosen.add((tuple(ids[place].tolist()), tuple(weights[place].tolist())))
    lowest = sorted(range(bank.shape.experts), key=lambda e: (-float(row[e]), e))[: bank.shape.top_k]
    return {"answers": len(chosen), "lowest index wins": {tuple(lowest)} == {ids for ids, _ in chosen}}


def ways(outputs: int, inputs: int) -> list[LinearKind]:
    """Return one product of this shape by every back end; the last one, bf16, to compare times with."""
    from sglang.srt.layers.quantization import fp8_utils

    block = [128, 128]
    weight = torch.nn.Parameter(torch.randn(outputs, inputs, device="cuda").to(FP8), False)
    scale = torch.nn.Parameter(torch.rand(outputs // 128, inputs // 128, device="cuda"), False)
    across = torch.nn.Parameter(weight.data.t(), False)
    channel = torch.nn.Parameter(torch.rand(outputs, 1, device="cuda"), False)
    plain = torch.nn.Parameter(torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16), False)
    by_block = {
        "deepgemm": fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback,
        "cutlass block": fp8_utils.cutlass_w8a8_block_fp8_linear_with_fallback,
        "triton block": fp8_utils.triton_w8a8_block_fp8_linear,
    }

    def blocks(run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda x, _: run(x, weight, block, scale)

    return [
        *(LinearKind("", weight, None, blocks(run), False, way, scales=((scale, 1.0),)) for way, run in by_block.items()),
        LinearKind(
            "", across, None, lambda x, _: fp8_utils.apply_fp8_linear(x, across, channel, cutlass_fp8_supported=True), False,
            "cutlass channel", scales=((channel, 1.0),), inputs_first=True,
        ),
        LinearKind("", plain, None, lambda x, _: torch.nn.functional.linear(x, plain), False, "bf16"),
    ]  # fmt: skip


def fp8(args: argparse.Namespace) -> dict[str, Any]:
    """Return the classes of M, and times, of FP8 products by back end; the classes from one process a shape, all at once."""
    if args.warm is not None:
        name, shape = list(SHAPES.items())[args.warm]
        return {f"{name}, {kind.method}": classes(kind, args.seconds) for kind in ways(*shape) if kind.method != "bf16"}
    workers = [worker(args, k) for k in range(len(SHAPES))]
    out: dict[str, Any] = {}
    for k, one in enumerate(workers):
        one.wait()
        kept = Path(args.out, f"fp8-{k}.json")
        out |= json.loads(kept.read_text()) if kept.exists() else {}
    for name, shape in SHAPES.items():
        for kind in ways(*shape):
            found = out.setdefault(f"{name}, {kind.method}", {})
            with noted(found):
                found["us"] = {}
                for m in TIMED:
                    found["us"][m] = tuning.graphed(
                        partial(kind.apply, torch.randn(m, shape[1], device="cuda").bfloat16(), None)
                    )
            save(args, out)
    return out


def classes(kind: LinearKind, seconds: float) -> dict[str, Any]:
    """Return the classes of M as far as the time goes, the small M first. DeepGEMM compiles as it goes."""
    rows = [*range(1, 137), *range(144, 1025, 16), 1536, 2048, 4096, 8192]
    said: dict[str, Any] = {}
    began = time.monotonic()
    with noted(said):
        found = labels(kind, rows, seconds * (0.6 if kind.method == "deepgemm" else 0.13))
        said |= {"classes": spans(found), "rows": len(found)}
    return said | {"seconds": round(time.monotonic() - began, 1)}


def worker(args: argparse.Namespace, share: int) -> subprocess.Popen[bytes]:
    """Start this script again for one share of the work."""
    command = [
        sys.executable,
        __file__,
        args.what,
        "--shape",
        args.shape,
        "--out",
        args.out,
        "--seconds",
        str(args.seconds),
    ]
    return subprocess.Popen([*command, "--warm", str(share)])


def save(args: argparse.Namespace, out: dict[str, Any]) -> None:
    share = "" if args.warm is None else f"-{args.warm}"
    Path(args.out, f"{args.what}{share}.json").write_text(json.dumps(out, indent=1))


@contextmanager
def noted(said: dict[str, Any]) -> Iterator[None]:
    """Let what fails be part of the answer: the rest of the session is not lost with it."""
    try:
        yield
    except Exception as error:
        said["error"] = f"{type(error).__name__}: {error}"[:300]


def table(out: dict[str, Any], what: str) -> list[str]:
    """Return the result in at most a dozen lines."""

    def us(found: dict[str, Any]) -> str:
        return " ".join(f"{value:.0f}" for value in found.get("us", {}).values())

    if what == "fp8":
        return [
            f"{name:26} {found.get('classes', found.get('error', ''))[:70]} | us {us(found)}"
            for name, found in out.items()
        ]
    holding = {name: found for name, found in out["fixed"].items() if found["bits"] is not None}
    lines = [f"router {out.get('linear')}"[:200], f"ties {out.get('ties')}"]
    lines += [
        f"{name:28} {out[name].get('classes', out[name])!s:.90} | us {us(out[name])}"
        for name in out
        if name.startswith(("stock,", "fixed,"))
    ]
    lines.append(f"stock {out['stock'].get('classes', out['stock'])!s:.90} | us {us(out['stock'])}")
    lines.append(f"{len(holding)} of {len(out['fixed'])} fixed configurations hold at all counts; "
                 f"bits of those: {' '.join(sorted({found['bits'] for found in holding.values()}))}")  # fmt: skip
    for m in (64, 1024):
        best = sorted(holding, key=lambda name: holding[name]["us"][m])[:2]
        lines += [f"best at {m}: {name} bits {holding[name]['bits']} | us {us(holding[name])}" for name in best]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("experts", "fp8"))
    parser.add_argument("--shape", default=".gpu/shapes/qwen3-30b-a3b-24l")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=90, help="of probing FP8 shapes, all together")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    tuning.publish(args.shape)
    out = {"experts": experts, "fp8": fp8}[args.what](args)
    save(args, out)
    if args.warm is None:
        print("\n".join(table(out, args.what)))


if __name__ == "__main__":
    main()
