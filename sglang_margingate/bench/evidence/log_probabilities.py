"""Are log-probabilities the same bits alone and in a batch? Requests of mixed kinds, cold and warm, beside other traffic.

``margingate evidence log-probabilities --prompts 200 --variants log,always,gate+canonical --out FILE.json``

Half of the requests generate greedily and ask for log-probabilities of their tokens, some with the best k, given tokens and
their prompt's; the others are scored: no token is asked for, only log-probabilities of the prompt. Each variant gets a server
of its own. Every request runs alone, on an empty prefix cache; then with 16 in flight beside neighbours that sample and one
that has long prompts scored, on an empty cache (cold) and on one that holds their prompts (warm). All log-probabilities of
an answer must equal those of its run alone in every bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.evidence.alone_vs_batch import Variant
from sglang_margingate.bench.evidence.record import measure_all
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import serve

CONCURRENCY = 16
LONG = 1500
"""Tokens of the prompts that a neighbour has scored."""
VOCABULARY = 200
"""Token ids of the neighbour's prompts lie below it."""


def asking(prompt: Prompt, kind: str, number: int) -> Prompt:
    """Return a prompt that asks for log-probabilities, in one of several ways; ``kind``: ``greedy`` or ``scored``."""
    rng = random.Random(f"{kind}{number}")
    asks: dict[str, Any] = {"return_logprob": True}
    if kind == "scored" or number % 3 == 0:
        asks["logprob_start_len"] = rng.choice((0, 0, 3, 7))
    if number % 2:
        asks["top_logprobs_num"] = rng.choice((1, 2, 5, 20))
    if number % 4 == 2:
        asks["token_ids_logprob"] = rng.sample(range(VOCABULARY), rng.randint(1, 8))
    prompt = replace(prompt, id=f"{kind}/{prompt.id}", asks=tuple(asks.items()))
    return replace(prompt, max_tokens=0) if kind == "scored" else prompt


def requests_of(count: int) -> list[Prompt]:
    """Return ``count`` greedy requests and as many scored ones."""
    prompts = demo_prompts(count)
    return [asking(p, kind, n) for kind in ("greedy", "scored") for n, p in enumerate(prompts)]


@contextmanager
def scored_neighbours(client: Client, workers: int = 1) -> Iterator[Callable[[], int]]:
    """Have long prompts scored meanwhile, without a gate; give what counts those that were."""
    done, count = threading.Event(), [0]

    def work(worker: int) -> None:
        rng = random.Random(worker)
        while not done.is_set():
            params = {"max_new_tokens": 2, "temperature": 1.0, "custom_params": {"margingate_policy": "off"}}
            body = {
                "input_ids": [rng.randrange(5, VOCABULARY) for _ in range(LONG)], "sampling_params": params,
                "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": rng.choice((0, 3, 33)),
            }  # fmt: skip
            code, out = client.post(body)
            assert code == 200, out
            count[0] += 1

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(work, worker) for worker in range(workers)]
        try:
            yield lambda: count[0]
        finally:
            done.set()
        for each in running:
            each.result()


@dataclass
class Outcome:
    """What one variant gave."""

    variant: str
    identical: dict[str, str] = field(default_factory=dict)
    """Answers whose log-probabilities were those of the run alone, of how many, by kind and arrival."""
    labels: dict[str, int] = field(default_factory=dict)
    """Guarantee and log-probabilities as the server labelled them."""
    untrue: list[str] = field(default_factory=list)
    """Requests called exact whose log-probabilities differed."""
    neighbours: int = 0
    max_batch_rows: int = 0


def compare(
    client: Client, requests: Sequence[Prompt], max_new_tokens: int, concurrency: int = CONCURRENCY, label: str = ""
) -> Outcome:
    """Run the requests alone, then together, cold and warm."""
    out = Outcome(label)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    client.flush_cache()
    alone = run_alone(client, requests, **options)
    labels: Counter[str] = Counter()
    for arrival in ("cold", "warm"):
        if arrival == "cold":
            client.flush_cache()
        with scored_neighbours(client) as count:
            together = run_together(client, requests, concurrency, background=requests[:2], **options)
        out.neighbours += count()
        for kind in ("greedy", "scored"):
            pairs = [(a, b) for a, b in zip(alone, together) if b.prompt_id.startswith(kind)]
            out.identical[f"{kind} {arrival}"] = f"{sum(same(a, b) for a, b in pairs)}/{len(pairs)}"
        for a, b in zip(alone, together):
            mg = b.margingate
            labels[f"{mg.get('guarantee')} {mg.get('logprobs')}"] += 1
            out.max_batch_rows = max(out.max_batch_rows, mg.get("max_batch_rows", 0))
            if mg.get("logprobs") == "exact" and not same(a, b):
                out.untrue.append(f"{b.prompt_id} {arrival}")
    out.labels = dict(labels)
    return out


def same(a: Completion, b: Completion) -> bool:
    """Return whether two answers have the same tokens and the same log-probabilities, which must be there."""
    return bool(a.logprobs) and a.logprobs == b.logprobs and a.same_as(b)


def measure(variant: Variant, requests: list[Prompt], max_new_tokens: int, log_dir: Path) -> Outcome:
    """Serve one variant and compare."""
    with serve(variant.flags(), log=log_dir / f"log-probabilities-{variant.stem}.log") as server:
        outcome = compare(server.client, requests, max_new_tokens, label=variant.label)
    print(f"{variant.label}: done", file=sys.stderr, flush=True)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Return the results as a Markdown table."""
    columns = list(outcomes[0].identical)
    rows = []
    for o in outcomes:
        labels = ", ".join(f"{name} {n}" for name, n in sorted(o.labels.items(), key=lambda item: -item[1]))
        rows.append(
            [o.variant, *(o.identical[c] for c in columns), labels, len(o.untrue), o.max_batch_rows, o.neighbours]
        )
    head = ["policy", *columns, "labels", "exact but different", "largest batch", "neighbours' prompts scored"]
    return tables.markdown(head, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print its table; exit status 1 where an answer called exact differed."""
    parser = argparse.ArgumentParser(prog="margingate evidence log-probabilities", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="greedy requests; as many are scored")
    parser.add_argument("--variants", default="log,always,gate+canonical", help="as of alone-vs-batch")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--log-dir", type=Path, default=Path("out"))
    parser.add_argument("--out", type=Path, default=None, help="write the full results as JSON")
    args = parser.parse_args(argv)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    requests = requests_of(args.prompts)
    variants = [Variant.parse(v) for v in args.variants.split(",")]
    outcomes = measure_all(lambda v: measure(v, requests, args.max_new_tokens, args.log_dir), variants, 1, args.out)
    print(table(outcomes))
    return int(any(o.untrue for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
