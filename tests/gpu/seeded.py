"""Seeded sampling on a GPU: the same tokens alone and in batches, and what a step costs beside stock sampling.

    python3 tests/gpu/seeded.py --out DIR                 on the GPU host; needs .gpu/ like truth.py
    python3 tests/gpu/seeded.py --out DIR --device cpu    the same logic on small shapes

24 chaotic sequences of the 8B shape are asked with seeds and mixed parameters: each alone, then in batches of 2, 8, 33 and 64 made
up with greedy, unseeded and other seeded requests, on an empty prefix cache and on one that holds their prompts. All must be the
same and labelled structural. The ungated server draws with the same noise and must fail. Timed: decode steps of 64 rows, all
seeded, all sampled without a seed by SGLang, all greedy, on our server and on the ungated one with SGLang's own attention.
Found is in DIR/seeded.json; exit status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from log_probabilities import SEQUENCES, SIZES, in_batches, made  # noqa: E402
from truth import SCALES, Truth, prepare  # noqa: E402

from sglang_margingate.bench.evidence.decode_cost import Stream, summary  # noqa: E402
from sglang_margingate.bench.prompts.sampled import seeded  # noqa: E402
from sglang_margingate.bench.servers.client import Client, Prompt, run_alone  # noqa: E402

NEW, TIMED_NEW = 32, 96
ARMS: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 0.8},
    "seeded top-p": {"temperature": 0.8, "top_p": 0.9},
    "seeded all filters": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "unseeded": {"temperature": 0.8},
    "unseeded top-p": {"temperature": 0.8, "top_p": 0.9},
    "greedy": {},
}


def compare(client: Client, requests: list[Prompt], fillers: list[Prompt], sizes: Sequence[int]) -> dict[str, Any]:
    """Return, by size and state of the cache, how many answers are those of the run alone; and how they are labelled."""
    found: dict[str, Any] = {"untrue": [], "largest": 0}
    labels: Counter[str] = Counter()
    alone = []
    for request in requests:
        client.flush_cache()
        alone += run_alone(client, [request], max_new_tokens=NEW)
    for size in sizes:
        for cache in ("cold", "warm"):
            runs = in_batches(client, requests, fillers, size, cache == "cold")
            found[f"{size} {cache}"] = f"{sum(a.same_as(b) for a, b in zip(alone, runs))}/{len(runs)}"
            for a, b in zip(alone, runs):
                labels[str(b.margingate.get("guarantee"))] += 1
                found["largest"] = max(found["largest"], b.margingate.get("max_batch_rows", 0))
                if b.margingate.get("guarantee") in ("structural", "verified") and not a.same_as(b):
                    found["untrue"].append(f"{b.prompt_id} at {size}, {cache}")
    return {**found, "labels": dict(labels), "distinct": len({a.tokens for a in alone})}


def steps(client: Client, arms: Sequence[str], rows: int, vocabulary: int, repeats: int) -> dict[str, list[float]]:
    """Return the decode step in ms of each arm's batches; the repeats go round all arms."""
    out: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(-1, repeats):  # the first round is a warm-up
        for number, arm in enumerate(arms):
            prompts = made(rows, (100, 100), vocabulary, 1000 * (repeat + 2) + number)
            params = [dict(ARMS[arm]) for _ in prompts]
            if arm.startswith("seeded"):
                params = [{**p, "sampling_seed": 10**6 * (repeat + 2) + i} for i, p in enumerate(params)]
            asked = [replace(p, max_tokens=TIMED_NEW, draw=tuple(d.items())) for p, d in zip(prompts, params)]
            # What SGLang draws by itself is measured as stock does it, without a look of ours.
            custom = {"margingate_policy": "off"} if arm.startswith("unseeded") else None
            with ThreadPoolExecutor(rows) as pool:
                streams = list(pool.map(lambda p, c=custom: _stream(client, p, c), asked))
            if repeat >= 0:
                out[arm].append(summary(streams)["step_ms"])
    return out


def _stream(client: Client, prompt: Prompt, custom: dict[str, Any] | None) -> Stream:
    out, last = Stream(time.perf_counter()), b""
    for last in client.stream(client.payload(prompt, TIMED_NEW, custom=custom)):
        at = last.rfind(b'"completion_tokens":')
        out.at.append(time.perf_counter())
        out.count.append(int(last[at + 20 : at + 30].split(b",")[0].split(b"}")[0]))
    out.meta = json.loads(last)["meta_info"]
    return out


def company(count: int, lengths: tuple[int, int], vocabulary: int) -> list[Prompt]:
    """Return fillers: greedy, sampled without a seed, seeded with other parameters, in turn."""
    plain = made(count, lengths, vocabulary, 2)
    other = seeded(plain, seed=9)
    free = [replace(p, draw=(("temperature", 1.0), ("top_p", 0.9))) for p in plain]
    return [(plain, free, other)[n % 3][n] for n in range(count)]


def main(argv: list[str] | None = None) -> int:
    """Run both servers; 0 where everything holds."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(SCALES), default="cuda")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rows", type=int, default=64, help="of the timed batches")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(words)
    if args.device == "cuda":
        prepare(words, Path(__file__).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[args.device]
    sizes = [int(size) for size in args.sizes.split(",")]
    truth = Truth(scale, args.device, args.out.resolve())
    vocabulary = scale.shape.vocab
    requests = seeded(made(SEQUENCES, scale.shape.lengths, vocabulary, 1), seed=1)
    fillers = company(max(sizes), scale.shape.lengths, vocabulary)
    chaotic = f"--model-path {truth.weights()} --skip-tokenizer-init --context-length 4096 --max-total-tokens 90000 {scale.chaotic}"
    stock = "--attention-backend fa3" if args.device == "cuda" else ""
    found: dict[str, Any] = {}
    for name, policy in (("canonical", "gate --margingate-fast-path canonical"), ("ungated", f"log {stock}")):
        with ExitStack() as stack:
            server = truth.start(stack, name, f"--margingate-policy {policy} {chaotic}")
            begun = time.monotonic()
            arms = list(ARMS) if name == "canonical" else ["unseeded", "unseeded top-p", "greedy"]
            found[name] = {"steps": steps(server.client, arms, args.rows, vocabulary, args.repeats)}
            of = sizes if name == "canonical" else (sizes[1:2] or sizes)
            found[name] |= compare(server.client, requests, fillers, of)
            found[name]["seconds"] = round(time.monotonic() - begun, 1)
        (args.out / "seeded.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        shares = ", ".join(f"{key}: {value}" for key, value in found[name].items() if isinstance(value, str))
        truth.say(f"{name}: {shares}; {found[name]['labels']}, largest batch {found[name]['largest']}, labelled but "
                  f"different: {len(found[name]['untrue'])}, {found[name]['seconds']} s")  # fmt: skip
    base = statistics.median(found["ungated"]["steps"]["unseeded"])
    for name, server_found in found.items():
        for arm, times in server_found["steps"].items():
            middle = statistics.median(times)
            print(f"{name}, {arm}: step of {args.rows} rows {middle:.3f} ms ({min(times):.3f} to {max(times):.3f}), "
                  f"{middle / base:.3f} of stock sampling")  # fmt: skip
    whole = f"{SEQUENCES}/{SEQUENCES}"
    held = all(v == whole for v in found["canonical"].values() if isinstance(v, str))
    powerful = any(v != whole for v in found["ungated"].values() if isinstance(v, str))
    print("everything holds" if held and powerful else "FAILED: " + ("no power" if held else "other tokens"))
    return 0 if held and powerful and not found["canonical"]["untrue"] else 1


if __name__ == "__main__":
    sys.exit(main())
