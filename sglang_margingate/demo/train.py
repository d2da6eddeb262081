"""Train the demo model.

``python -m sglang_margingate.demo.train --out DIR --minutes 3.2`` on a CUDA GPU. DIR must hold the tokenizer
(``python -m sglang_margingate.demo.tokenizer --out DIR``). A run that was stopped goes on from its checkpoint when the
same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sglang_margingate.demo.chat import ASSISTANT, EOS, PAD, render_prompt
from sglang_margingate.demo.corpora import TRAIN, generate
from sglang_margingate.demo.network import PRESETS, Llama, save_hf

SHARES = {"arith": 0.45, "code": 0.3, "story": 0.25}
LEARN = 0x8000
"""Bit set on a token id that the loss counts: completions and their end, not prompts."""
IDS = 0x7FFF
LOG_EVERY = 10
Z_LOSS = 1e-3


def build_rows(job: tuple[str, int, int, int]) -> np.ndarray:
    """Generate `documents` documents and pack them into rows [n, length + 1] of uint16.

    Every row starts with a document; the last one of a row is cut. Rows look like a chat of several turns.
    """
    tokenizer_file, seed, documents, length = job
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = random.Random(seed)
    names = rng.choices(list(SHARES), weights=list(SHARES.values()), k=documents)
    drawn = [generate(name, rng, TRAIN) for name in names]
    texts = [render_prompt(d.prompt) + d.completion + EOS for d in drawn]
    assistant = tokenizer.token_to_id(ASSISTANT)
    rows: list[np.ndarray] = []
    row = np.empty(0, dtype=np.uint16)
    for encoding in tokenizer.encode_batch_fast(texts):
        ids = np.array(encoding.ids, dtype=np.uint16)
        ids[int(np.argmax(ids == assistant)) + 1 :] |= LEARN
        row = np.concatenate((row, ids))
        if len(row) > length:
            rows.append(row[: length + 1])
            row = np.empty(0, dtype=np.uint16)
    return np.stack(rows) if rows else np.empty((0, length + 1), dtype=np.uint16)


def build_data(tokenizer_file: Path, documents: int, length: int, seed: int, workers: int) -> np.ndarray:
    """Generate the training rows on `workers` processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shard = min(5000, documents)  # not by `workers`: their number must not change the data
    count = documents // shard
    jobs = [(str(tokenizer_file), seed * 1_000_003 + i, shard, length) for i in range(count)]
    quiet = not sys.stderr.isatty()
    if workers <= 1:
        return np.concatenate([build_rows(job) for job in tqdm(jobs, desc="corpus", disable=quiet)])
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return np.concatenate(list(tqdm(pool.imap(build_rows, jobs), total=count, desc="corpus", disable=quiet)))


def learning_rate(progress: float, step: int, peak: float, warmup: int) -> float:
    """Warm up, hold, and fall to zero over the last 40% (`progress` in 0..1 is of time or of steps)."""
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1.0 - progress) / 0.4))


def loss_of(model: Any, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the mean cross entropy over the tokens marked `LEARN`, and the loss to descend on.

    The second adds `Z_LOSS` times the squared log-sum-exp. It pulls the likely tokens' logits to around zero, where
    bf16 is fine-grained: without it they lie near 20, where bf16 steps are 0.125 and nearly every free choice is an
    exact tie. batch: [rows, length + 1] of int32.
    """
    tokens = (batch & IDS).long()
    target = torch.where((batch[:, 1:] & LEARN) != 0, tokens[:, 1:], -100)
    logits = model(tokens[:, :-1])
    logits = logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, target.flatten(), ignore_index=-100)
    return loss, loss + Z_LOSS * logits.logsumexp(-1).square().mean()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m sglang_margingate.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model folder; must hold the tokenizer")
    parser.add_argument("--work", type=Path, default=Path("out/train"), help="checkpoint and loss curve")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="embedded")
    parser.add_argument("--minutes", type=float, default=3.2, help="training time; the schedule ends with it")
    parser.add_argument("--steps", type=int, default=None, help="end after this many steps, if that is sooner")
    parser.add_argument("--documents", type=int, default=1_300_000)
    parser.add_argument("--rows", type=int, default=128, help="rows in a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    args = parser.parse_args(argv)
    for name in ("minutes", "documents", "rows", "length", "warmup", "checkpoint_every"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.length > PRESETS[args.preset].max_positions:
        parser.error(f"--length must be at most {PRESETS[args.preset].max_positions}, the model's context")
    return args


def compiled(model: Llama, device: str, sample: torch.Tensor) -> Any:
    """Return the model through torch.compile where that works here, else the model itself."""
    try:
        fast = torch.compile(model)
        with torch.autocast(device, torch.bfloat16):
            loss_of(fast, sample)[1].backward()
        model.zero_grad(set_to_none=True)
        return fast
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}): training without it", flush=True)
        model.zero_grad(set_to_none=True)
        return model


def main(argv: list[str] | None = None) -> None:
    """Run the training from scratch or from its checkpoint."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        fix = "run this on a GPU host, or pass --device cpu --preset tiny --steps 20 to try the script"
        sys.exit(f"error: no CUDA GPU here: {fix}")
    tokenizer_file = args.out / "tokenizer.json"
    if not tokenizer_file.is_file():
        fix = f"run `python -m sglang_margingate.demo.tokenizer --out {args.out}` first"
        sys.exit(f"error: {tokenizer_file} is missing: {fix}")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)

    began = time.monotonic()
    data = build_data(tokenizer_file, args.documents, args.length, args.seed, args.workers)
    corpus_s = time.monotonic() - began
    if len(data) < args.rows:
        sys.exit(
            f"error: {args.documents} documents fill {len(data)} rows, fewer than --rows {args.rows}: raise --documents"
        )
    print(f"corpus: {data.shape[0]} rows, {data.size / 1e6:.0f} M tokens, {corpus_s:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    shape = PRESETS[args.preset]
    model = Llama(shape).to(args.device)
    # Decay would pull the embeddings of interchangeable words together until no rounding could tell them apart.
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed_tokens" in n]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = args.work / "checkpoint.pt", args.work / "loss_curve.csv"
    step, spent = 0, 0.0
    if checkpoint.is_file():
        try:
            saved = torch.load(checkpoint, map_location=args.device, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step, spent = saved["step"], saved["spent"]
        except Exception:  # a damaged pickle raises nearly anything
            sys.exit(f"error: {checkpoint} is damaged or of another preset: delete it, or pass another --work")
        print(f"going on from {checkpoint}: step {step}, {spent:.0f} s spent", flush=True)
        if curve.is_file():  # what was logged after the checkpoint is trained and logged anew
            header, *lines = curve.read_text().splitlines(keepends=True)
            curve.write_text("".join([header, *(line for line in lines if int(line.split(",")[0]) <= step)]))
    elif curve.is_file():
        curve.unlink()

    def save_checkpoint() -> None:
        part = checkpoint.with_suffix(".part")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
        torch.save(state, part)
        part.replace(checkpoint)

    rows = torch.from_numpy(data.view(np.int16)).to(args.device)
    limit = args.minutes * 60
    start = time.monotonic() - spent
    sample = rows[: args.rows].int()
    run = model if args.no_compile or args.device == "cpu" else compiled(model, args.device, sample)
    per_pass = max(1, rows.shape[0] // args.rows)
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    loss_value = float("nan")
    first_curve = not curve.is_file()

    stops: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: stops.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    quiet = not sys.stderr.isatty()
    with tqdm(total=1.0, desc="train", bar_format=layout, disable=quiet) as bar, curve.open("a", newline="") as file:
        writer = csv.writer(file)
        if first_curve:
            writer.writerow(("step", "seconds", "tokens", "learning_rate", "loss"))
        while True:
            spent = time.monotonic() - start
            if stops:
                save_checkpoint()
                sys.exit(f"stopped at step {step}: the same command goes on from {checkpoint}")
            progress = spent / limit
            if args.steps:
                progress = max(progress, step / args.steps)
            if progress >= 1.0:
                break
            if step // per_pass != epoch:
                epoch = step // per_pass
                order = torch.from_numpy(np.random.default_rng((args.seed, epoch)).permutation(rows.shape[0]))
            at = (step % per_pass) * args.rows
            batch = rows[order[at : at + args.rows].to(args.device)].int()
            rate = learning_rate(progress, step, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(args.device, torch.bfloat16):
                loss, objective = loss_of(run, batch)
            objective.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % LOG_EVERY == 0:
                loss_value = loss.item()  # also waits for the device, so that the clock above is true
                if loss_value != loss_value:
                    sys.exit(f"error: the loss is not a number at step {step}: lower --lr and delete {checkpoint}")
                tokens = step * args.rows * args.length
                writer.writerow((step, f"{spent:.2f}", tokens, f"{rate:.3e}", f"{loss_value:.4f}"))
                note = f"step {step}  loss {loss_value:.4f}  {tokens / 1e6:.0f} M tokens"
                bar.set_postfix_str(note, refresh=False)
                bar.update(progress - bar.n)
                if quiet and step % (20 * LOG_EVERY) == 0:
                    print(f"{spent:5.0f} s  {note}", flush=True)
            if step % args.checkpoint_every == 0:
                save_checkpoint()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    with contextlib.suppress(OSError):
        save_checkpoint()
    save_hf(model, args.out, eos, pad)
    (args.out / "loss_curve.csv").write_text(curve.read_text())
    log = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "compiled": run is not model,
        "steps": step,
        "tokens": step * args.rows * args.length,
        "corpus_tokens": int(data.size),
        "corpus_seconds": round(corpus_s, 1),
        "training_seconds": round(spent, 1),
        "final_loss": loss_value,
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(f"done: {step} steps, {spent:.0f} s, loss {loss_value:.4f}, wrote {args.out}", flush=True)


if __name__ == "__main__":
    main()
