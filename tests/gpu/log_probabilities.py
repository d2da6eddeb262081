"""Log-probabilities on a GPU: the same bits alone and in batches, beside a neighbour that has 1,500 tokens scored.

    python3 tests/gpu/log_probabilities.py --out DIR                 on the GPU host; needs .gpu/ like truth.py
    python3 tests/gpu/log_probabilities.py --out DIR --device cpu    the same logic on small shapes

24 chaotic sequences of the 8B shape ask for log-probabilities of their tokens (some with the best k, given tokens, their
prompt's), and as many are scored only. Each runs alone, then in batches of 2, 8, 33 and 64, on an empty prefix cache and on one
that holds its prompt. Every log-probability must have the same bits, and every answer be called exact. The ungated server
must fail the same comparison. Found is in DIR/log_probabilities.json; exit status 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from truth import SCALES, Truth, prepare  # noqa: E402

from sglang_margingate.bench.evidence.log_probabilities import asking, same, scored_neighbours  # noqa: E402
from sglang_margingate.bench.prompts.random_ids import draw, parse  # noqa: E402
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, run_alone, run_together  # noqa: E402

SEQUENCES, SIZES = 24, (2, 8, 33, 64)
NEW = 32


def made(count: int, lengths: tuple[int, int], vocabulary: int, seed: int) -> list[Prompt]:
    """Return prompts of random token ids."""
    return draw(parse(f"random:{lengths[0]}-{lengths[1]}:{NEW}").prompts(count, seed), vocabulary, seed)


def in_batches(
    client: Client, requests: Sequence[Prompt], fillers: Sequence[Prompt], size: int, cold: bool
) -> list[Completion]:
    """Run the requests in batches of ``size``, fillers making them up."""
    out: list[Completion] = []
    for at in range(0, len(requests), size):
        group = list(requests[at : at + size])
        group += fillers[: size - len(group)]
        if cold:
            client.flush_cache()
        found = run_together(client, group, size, max_new_tokens=NEW)
        out += found[: len(requests[at : at + size])]
    return out


def compare(
    client: Client, kinds: dict[str, list[Prompt]], fillers: list[Prompt], sizes: Sequence[int]
) -> dict[str, Any]:
    """Return, by kind, size and state of the cache, how many answers are those of the run alone; and how they are labelled."""
    found: dict[str, Any] = {"labels": {}, "untrue": [], "largest": 0}
    for kind, requests in kinds.items():
        alone = []
        for request in requests:
            client.flush_cache()
            alone += run_alone(client, [request], max_new_tokens=NEW)
        with scored_neighbours(client) as count:
            for size in sizes:
                for cache in ("cold", "warm"):
                    runs = in_batches(client, requests, fillers, size, cache == "cold")
                    found[f"{kind} {size} {cache}"] = f"{sum(map(same, alone, runs))}/{len(runs)}"
                    for a, b in zip(alone, runs):
                        name = f"{b.margingate.get('guarantee')} {b.margingate.get('logprobs')}"
                        found["labels"][name] = found["labels"].get(name, 0) + 1
                        found["largest"] = max(found["largest"], b.margingate.get("max_batch_rows", 0))
                        if b.margingate.get("logprobs") == "exact" and not same(a, b):
                            found["untrue"].append(f"{b.prompt_id} at {size}, {cache}")
        found[f"{kind}: neighbour's prompts scored"] = count()
    return found


def main(argv: list[str] | None = None) -> int:
    """Run both servers; 0 where everything holds."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=sorted(SCALES), default="cuda")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--canonical-only", action="store_true", help="leave the ungated server out")
    args = parser.parse_args(words)
    if args.device == "cuda":
        prepare(words, Path(__file__).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    scale = SCALES[args.device]
    sizes = [int(size) for size in args.sizes.split(",")]
    truth = Truth(scale, args.device, args.out.resolve())
    prompts = made(SEQUENCES, scale.shape.lengths, scale.shape.vocab, 1)
    kinds = {kind: [asking(p, kind, n) for n, p in enumerate(prompts)] for kind in ("greedy", "scored")}
    fillers = [
        replace(p, asks=(("return_logprob", True), ("top_logprobs_num", n % 3 * 16)) if n % 2 else ())
        for n, p in enumerate(made(max(sizes), scale.shape.lengths, scale.shape.vocab, 2))
    ]
    chaotic = f"--model-path {truth.weights()} --skip-tokenizer-init --context-length 4096 --max-total-tokens 90000 {scale.chaotic}"
    if args.device == "cuda":
        chaotic += f" --cuda-graph-max-bs-decode {max(sizes) + 8}"  # the class must hold the neighbour too
    found: dict[str, Any] = {}
    for name, policy in (("canonical", "gate --margingate-fast-path canonical"), ("ungated", "log")):
        if name == "ungated" and args.canonical_only:
            continue
        with ExitStack() as stack:
            server = truth.start(stack, name, f"--margingate-policy {policy} {chaotic}")
            begun = time.monotonic()
            of = sizes if name == "canonical" else (sizes[1:2] or sizes)
            found[name] = {
                "logprobs": server.client.status().get("logprobs"),
                **compare(server.client, kinds, fillers, of),
            }
            found[name]["seconds"] = round(time.monotonic() - begun, 1)
        (args.out / "log_probabilities.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        shares = {key: value for key, value in found[name].items() if isinstance(value, str)}
        for kind in kinds:
            line = ", ".join(
                f"{key.removeprefix(kind)[1:]}: {value}" for key, value in shares.items() if key.startswith(kind)
            )
            truth.say(f"{name}, {kind}: {line}")
        truth.say(f"{name}: {found[name]['labels']}, largest batch {found[name]['largest']}, exact but different: "
                  f"{len(found[name]['untrue'])}, {found[name]['seconds']} s, trial {found[name]['logprobs']}")  # fmt: skip
    whole = f"{SEQUENCES}/{SEQUENCES}"
    held = all(v == whole for k, v in found["canonical"].items() if isinstance(v, str))
    powerful = args.canonical_only or any(v != whole for v in found["ungated"].values() if isinstance(v, str))
    print("everything holds" if held and powerful else "FAILED: " + ("no power" if held else "other bits"))
    return 0 if held and powerful and not found["canonical"]["untrue"] else 1


if __name__ == "__main__":
    sys.exit(main())
