"""Measure on this machine how often batching alone changes the demo model's greedy output.

``python -m sglang_margingate.demo.probe_flips [--json FILE]``

Every held-out prompt is decoded twice with bf16 weights: alone, and beside 15 others. Prefill and attention run one
sequence at a time in both cases; only the linear layers and norms of the decode step see the batch, M=1 against M=16.
So padding, masks and prefill cannot cause a difference: what differs comes from the matmul's bits. Part of both runs is
repeated to show that equal shapes give equal bits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sglang_margingate.demo.chat import render_prompt
from sglang_margingate.demo.corpora import CORPORA
from sglang_margingate.demo.hf import load_tokenizer
from sglang_margingate.demo.paths import ModelFilesError, check_model_dir, model_path
from sglang_margingate.demo.prompts import load_prompts

BATCH = 16
NEW_TOKENS = 256
EDGES = (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Histogram edges of the margin: exact ties have a bin of their own, the last bin is open."""


class Trace(NamedTuple):
    """One greedy completion: its tokens and the top-1/top-2 logit margin each was chosen with."""

    tokens: list[int]
    margins: list[float]


class Decoder:
    """A KV-cached bf16 Llama whose attention is computed one sequence at a time, whatever the batch."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text())
        self.weights = {k: t.to(device) for k, t in load_file(str(folder / "model.safetensors")).items()}
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.eps: float = config["rms_norm_eps"]
        self.device = device
        frequency = config["rope_theta"] ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), frequency).repeat(1, 2)
        self.cos, self.sin = angles.cos().bfloat16().to(device), angles.sin().bfloat16().to(device)
        self.head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Root mean square norm in fp32, rounded to bf16 before the weight as in transformers' Llama."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weights[name] * wide.to(x.dtype)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply rotary positions. x: [rows, heads, head_dim]."""
        half = self.head_dim // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * self.cos[positions][:, None] + turned * self.sin[positions][:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """Attention of one sequence. q: [rows, heads, head_dim]; k, v: [length, kv_heads, head_dim]."""
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        q4, k4, v4 = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q4, k4, v4, is_causal=causal)
        return out[0].transpose(0, 1).reshape(q.shape[0], -1)

    def forward(self, tokens: Tensor, positions: Tensor, caches: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
        """Run rows through the model and return their logits [rows, vocab].

        With one cache and several rows this is the prefill of one sequence; else row i is the next token of sequence i.
        The rows' K/V are appended to the caches.
        """
        prefill = len(caches) == 1 and len(tokens) > 1
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.layers):
            w = f"model.layers.{layer}."
            h = self.norm(x, w + "input_layernorm.weight")
            q, k, v = (
                F.linear(h, self.weights[f"{w}self_attn.{p}_proj.weight"]).view(len(tokens), -1, self.head_dim)
                for p in "qkv"
            )
            q, k = self.rotate(q, positions), self.rotate(k, positions)
            if prefill:
                caches[0][layer] = (k, v)
                mixed = self.attend(q, k, v, causal=True)
            else:
                rows = []
                for i, cache in enumerate(caches):
                    past = cache[layer]
                    cache[layer] = (torch.cat((past[0], k[i : i + 1])), torch.cat((past[1], v[i : i + 1])))
                    rows.append(self.attend(q[i : i + 1], *cache[layer], causal=False))
                mixed = torch.cat(rows)
            x = x + F.linear(mixed, self.weights[w + "self_attn.o_proj.weight"])
            h = self.norm(x, w + "post_attention_layernorm.weight")
            gate = F.silu(F.linear(h, self.weights[w + "mlp.gate_proj.weight"]))
            up = F.linear(h, self.weights[w + "mlp.up_proj.weight"])
            x = x + F.linear(gate * up, self.weights[w + "mlp.down_proj.weight"])
        return F.linear(self.norm(x, "model.norm.weight"), self.head)

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], eos: int, new_tokens: int = NEW_TOKENS) -> list[Trace]:
        """Decode the prompts together; every step has ``len(prompts)`` rows, also after some have ended."""
        caches: list[list[tuple[Tensor, Tensor]]] = []
        first = []
        for ids in prompts:
            cache: list[Any] = [None] * self.layers
            tokens = torch.tensor(ids, device=self.device)
            first.append(self.forward(tokens, torch.arange(len(ids), device=self.device), [cache])[-1])
            caches.append(cache)
        logits = torch.stack(first)
        positions = torch.tensor([len(ids) for ids in prompts], device=self.device)
        traces = [Trace([], []) for _ in prompts]
        open_rows = set(range(len(prompts)))
        for _ in range(new_tokens):
            top = logits.float().topk(2, dim=-1)
            chosen = logits.argmax(dim=-1)
            for i in sorted(open_rows):
                traces[i].tokens.append(int(chosen[i]))
                traces[i].margins.append(float(top.values[i, 0] - top.values[i, 1]))
                if int(chosen[i]) == eos:
                    open_rows.discard(i)
            if not open_rows:
                break
            logits = self.forward(chosen, positions, caches)
            positions = positions + 1
        return traces


def first_difference(a: Trace, b: Trace) -> int | None:
    """Return the first step at which the two chose different tokens."""
    for i, (x, y) in enumerate(zip(a.tokens, b.tokens)):
        if x != y:
            return i
    return None


def histogram(margins: list[float]) -> list[int]:
    """Count margins: exactly 0, then each interval ``(EDGES[i], EDGES[i + 1]]``, then above the last edge."""
    counts = np.bincount(np.searchsorted(EDGES, np.asarray(margins), side="left"), minlength=len(EDGES) + 1)
    return [int(c) for c in counts]


def histogram_labels() -> list[str]:
    """Name the bins of `histogram`."""
    return ["0 (tie)", *(f"<= {edge:g}" for edge in EDGES[1:]), f"> {EDGES[-1]:g}"]


def summarise(alone: list[Trace], batched: list[Trace]) -> dict[str, Any]:
    """Compare both runs of one dataset."""
    where = [first_difference(a, b) for a, b in zip(alone, batched)]
    flips = [(step, a.margins[step], b.margins[step]) for step, a, b in zip(where, alone, batched) if step is not None]
    margins = [m for trace in alone for m in trace.margins]
    return {
        "n": len(alone),
        "flipped": len(flips),
        "steps": len(margins),
        "first_flip_step": sorted(step for step, _, _ in flips),
        "margin_alone_at_flip": sorted(m for _, m, _ in flips),
        "margin_batched_at_flip": sorted(m for _, _, m in flips),
        "histogram": dict(zip(histogram_labels(), histogram(margins))),
        "steps_above_1": sum(m > 1.0 for m in margins),
    }


def quartiles(values: list[float] | list[int]) -> str:
    """Give min, quartiles and max in one line."""
    if not values:
        return "-"
    return " / ".join(f"{q:g}" for q in np.percentile(values, (0, 25, 50, 75, 100)))


def cpu_name() -> str:
    """Name the processor."""
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """Describe what the numbers were taken on."""
    try:
        cpu = cpu_name()
    except OSError:
        cpu = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "date": time.strftime("%Y-%m-%d"),
    }


def report(result: dict[str, Any]) -> str:
    """Write the result as text."""
    m = result["machine"]
    lines = [
        f"{m['device']}, {m['threads']} thread(s), torch {m['torch']}, {m['date']}; alone (M=1) against"
        f" {result['batch']} at once, at most {result['new_tokens']} tokens, greedy bf16"
    ]
    total, flipped = 0, 0
    for dataset, r in result["datasets"].items():
        total, flipped = total + r["n"], flipped + r["flipped"]
        lines += [
            "",
            f"{dataset}: {r['flipped']}/{r['n']} prompts flip ({100 * r['flipped'] / max(1, r['n']):.1f}%)",
            f"  first flip at step   (min / quartiles / max): {quartiles(r['first_flip_step'])}",
            f"  margin there, alone  (min / quartiles / max): {quartiles(r['margin_alone_at_flip'])}",
            f"  margin there, batched(min / quartiles / max): {quartiles(r['margin_batched_at_flip'])}",
            f"  steps with a margin above 1: {r['steps_above_1']}/{r['steps']}",
        ]
        largest = max(r["histogram"].values())
        for label, count in r["histogram"].items():
            share = 100 * count / max(1, r["steps"])
            lines.append(f"  {label:>9} {count:7d} {share:5.1f}% {'#' * round(40 * count / max(1, largest))}")
    lines += ["", f"all: {flipped}/{total} prompts flip ({100 * flipped / max(1, total):.1f}%)"]
    lines.append(f"the same shape again gave the same bits for {result['repeat_equal']}/{result['repeat_n']} prompts")
    if flipped == 0:
        lines.append(
            "This machine gives no batch flip: its bf16 matmul gives these shapes the same bits at M=1 and at"
            f" M={result['batch']}. On an x86 CPU try ONEDNN_MAX_CPU_ISA=AVX512_CORE, or let a test inject a flip."
        )
    return "\n".join(lines)


def probe(
    folder: Path, datasets: list[str], limit: int | None, batch: int, new_tokens: int, device: str
) -> dict[str, Any]:
    """Decode all prompts alone and in batches, and compare."""
    tokenizer = load_tokenizer(folder)
    decoder = Decoder(folder, device)
    eos: int = tokenizer.eos_token_id
    results: dict[str, Any] = {}
    repeat_n = repeat_equal = 0
    for dataset in datasets:
        ids = [tokenizer(render_prompt(p.prompt))["input_ids"] for p in load_prompts(dataset, limit)]
        alone: list[Trace] = []
        batched: list[Trace] = []
        quiet = not sys.stderr.isatty()
        for at in tqdm(range(0, len(ids), batch), desc=dataset, disable=quiet):
            group = ids[at : at + batch]
            rows = group + ids[: batch - len(group)]  # the last group is filled up, so that M is the same for all
            rows += [rows[-1]] * (batch - len(rows))
            alone += [decoder.decode([row], eos, new_tokens)[0] for row in group]
            batched += decoder.decode(rows, eos, new_tokens)[: len(group)]
            if at == 0:
                once, again = [decoder.decode([rows[0]], eos, new_tokens)[0]], decoder.decode(rows, eos, new_tokens)
                repeat_n += len(group) + 1
                repeat_equal += int(once[0] == alone[0]) + sum(a == b for a, b in zip(again, batched))
        results[dataset] = summarise(alone, batched)
    return {
        "machine": machine(device),
        "model": folder.name,
        "engine": "own KV-cached loop; attention and prefill one sequence at a time, linear layers batched",
        "batch": batch,
        "new_tokens": new_tokens,
        "repeat_n": repeat_n,
        "repeat_equal": repeat_equal,
        "datasets": results,
    }


def main() -> None:
    """Measure, print and optionally write the result."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.demo.probe_flips", description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--dataset", action="append", choices=tuple(CORPORA), help="default: all; may be repeated")
    parser.add_argument("--limit", type=int, default=None, help="only the first prompts of each dataset")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="also write the result here")
    args = parser.parse_args()
    if args.batch < 2:
        parser.error("--batch must be at least 2: one row is what 'alone' already is")
    if args.new_tokens < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--limit and --new-tokens must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here: leave --device away to probe the CPU")
    try:
        check_model_dir(args.model)
    except ModelFilesError as error:
        sys.exit(f"error: {error}")
    result = probe(args.model, args.dataset or list(CORPORA), args.limit, args.batch, args.new_tokens, args.device)
    print(report(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
