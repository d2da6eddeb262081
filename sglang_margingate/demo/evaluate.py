"""Score a demo model on the held-out prompts through transformers.

``python -m sglang_margingate.demo.evaluate --model DIR --out evaluation.json``

Greedy decoding of at most 256 tokens. ``arith``: the last ``Answer:`` line equals the answer. ``code``: the output
parses, and running it (in a child process, alone, with a time limit) shows whether its own worked call holds. All:
whether the end-of-text token came, and whether the output fell into a loop.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sglang_margingate.demo.chat import render_prompt
from sglang_margingate.demo.corpora import CORPORA
from sglang_margingate.demo.corpora.arith import read_answer
from sglang_margingate.demo.hf import load_model, load_tokenizer
from sglang_margingate.demo.paths import ModelFilesError, check_model_dir, model_path
from sglang_margingate.demo.prompts import Prompt, load_prompts

NEW_TOKENS = 256
LOOP_SPAN = 64
LOOP_PERIOD = 32


def has_loop(ids: list[int], span: int = LOOP_SPAN, longest: int = LOOP_PERIOD) -> bool:
    """Say whether some `span` consecutive tokens repeat with a period of at most `longest` tokens."""
    for period in range(1, longest + 1):
        run = 0
        for i in range(period, len(ids)):
            run = run + 1 if ids[i] == ids[i - period] else 0
            if run + period >= span:
                return True
    return False


def parses(source: str) -> bool:
    """Say whether the text is Python with a function in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef) for node in tree.body)


def call_holds(source: str, timeout_s: float = 10.0) -> bool:
    """Run the text alone in a child process: its assert must pass, its printed line equal the trailing comment."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-I", "-c", source], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        last = source.rstrip().splitlines()[-1]
        said = last.split("  # ", 1)[1].strip("'\"") if last.startswith("print(") and "  # " in last else ""
        return done.returncode == 0 and done.stdout.strip() == said
    return False


def complete(model: Any, tokenizer: Any, prompts: list[Prompt], batch: int) -> list[list[int]]:
    """Decode greedily; returns the new token ids of each prompt, the end-of-text token included where it came."""
    import torch

    outputs: list[list[int]] = []
    for at in range(0, len(prompts), batch):
        texts = [render_prompt(p.prompt) for p in prompts[at : at + batch]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        inputs = inputs.to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            outputs.append(row[:end])
    return outputs


def score(prompts: list[Prompt], outputs: list[list[int]], texts: list[str], eos: int) -> dict[str, Any]:
    """Count what holds for one dataset; every share is given as a count of `n`."""
    result: dict[str, Any] = {
        "n": len(prompts),
        "ended": sum(ids[-1:] == [eos] for ids in outputs),
        "loops": sum(has_loop(ids) for ids in outputs),
        "mean_tokens": round(sum(map(len, outputs)) / max(1, len(outputs)), 1),
    }
    if prompts and prompts[0].dataset == "arith":
        result["exact_match"] = sum(read_answer(text) == p.answer for p, text in zip(prompts, texts))
    if prompts and prompts[0].dataset == "code":
        result["parse"] = sum(parses(text) for text in texts)
        result["worked_call_holds"] = sum(parses(text) and call_holds(text) for text in texts)
    result["samples"] = [{"prompt": p.prompt, "output": text} for p, text in list(zip(prompts, texts))[:2]]
    return result


def main() -> None:
    """Score the model and write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.demo.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--out", type=Path, default=None, help="write the numbers as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--limit", type=int, default=None, help="only the first prompts of each dataset")
    args = parser.parse_args()
    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        parser.error("--batch and --limit must be at least 1")
    try:
        check_model_dir(args.model)
    except ModelFilesError as error:
        sys.exit(f"error: {error}")
    import torch
    from tqdm import tqdm

    tokenizer, model = load_tokenizer(args.model), load_model(args.model, args.device)
    results: dict[str, Any] = {}
    for dataset in tqdm(list(CORPORA), desc="evaluate", disable=not sys.stderr.isatty()):
        prompts = load_prompts(dataset, args.limit)
        outputs = complete(model, tokenizer, prompts, args.batch)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs]
        results[dataset] = score(prompts, outputs, texts, tokenizer.eos_token_id)
    for dataset, r in results.items():
        counts = [f"{k} {v}/{r['n']}" for k, v in r.items() if k not in ("n", "samples", "mean_tokens")]
        print(f"{dataset}: {', '.join(counts)}; mean {r['mean_tokens']} tokens")
    for sample in results["story"]["samples"]:
        print(f"\n> {sample['prompt']}\n{sample['output']}")
    if args.out:
        taken = {"date": time.strftime("%Y-%m-%d"), "device": args.device, "torch": torch.__version__}
        args.out.write_text(json.dumps({**taken, "new_tokens": NEW_TOKENS, "datasets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
