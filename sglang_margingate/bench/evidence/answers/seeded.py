"""Is seeded sampling the same alone and in a batch? Mixed parameters and seeds, cold and warm, among other traffic.

``margingate evidence seeded --prompts 200 --variants log,always,gate+canonical,gate@0.25 --out FILE.json``

Each variant gets a server of its own. Every request is asked alone, on an empty prefix cache; then with 16 in flight among greedy
requests and others that sample without a seed, on an empty cache (cold) and on one that holds the prompts (warm). Tokens and finish
reason must equal those of the run alone, of the greedy requests too. ``log`` draws with the same noise and verifies nothing:
where a batch changes its logits, answers differ. ``--profile FILE`` gives the threshold of ``gate`` variants without one.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.evidence.alone_vs_batch import Variant, why_different
from sglang_margingate.bench.evidence.record import measure_all
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.prompts.sampled import seeded
from sglang_margingate.bench.servers.client import Client, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import serve

CONCURRENCY = 16
GREEDY_SHARE = 4
"""One greedy request for so many seeded ones."""
UNSEEDED = 2
"""Requests without a seed that run all the while."""


@dataclass
class Outcome:
    """What one variant gave."""

    variant: str
    identical: dict[str, str] = field(default_factory=dict)
    """Answers that were those of the run alone, of how many, by kind and arrival."""
    same: int = 0
    asked: int = 0
    guarantees: dict[str, int] = field(default_factory=dict)
    """Of the seeded requests in the batch."""
    untrue: list[str] = field(default_factory=list)
    """Requests labelled structural or verified that differed."""
    steps: int = 0
    triggers: int = 0
    flips: int = 0
    max_batch_rows: int = 0
    distinct: int = 0
    """Different answers among the seeded runs alone."""
    differences: dict[str, int] = field(default_factory=dict)


def requests_of(count: int, seed: int = 0) -> list[Prompt]:
    """Return ``count`` seeded requests and a quarter as many greedy ones."""
    prompts = demo_prompts(count)
    drawn = [replace(p, id=f"seeded/{p.id}") for p in seeded(prompts, seed, words=True)]
    return drawn + [replace(p, id=f"greedy/{p.id}") for p in prompts[::GREEDY_SHARE]]


def compare(
    client: Client, requests: Sequence[Prompt], max_new_tokens: int, concurrency: int = CONCURRENCY, label: str = "",
    custom: dict[str, Any] | None = None,
) -> Outcome:  # fmt: skip
    """Run the requests alone, then together, cold and warm."""
    out = Outcome(label)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "custom": {"margingate_return_steps": True, **(custom or {})},
    }
    client.flush_cache()
    alone = run_alone(client, requests, **options)
    out.distinct = len({c.tokens for c in alone if c.prompt_id.startswith("seeded")})
    background = [replace(p, draw=()) for p in requests[:UNSEEDED]]
    reasons: Counter[str] = Counter()
    guarantees: Counter[str] = Counter()
    for arrival in ("cold", "warm"):
        if arrival == "cold":
            client.flush_cache()
        order = list(range(len(requests)))
        random.Random(arrival).shuffle(order)
        found = run_together(client, [requests[i] for i in order], concurrency, background=background, **options)
        together = dict(zip(order, found))
        for kind in ("seeded", "greedy"):
            pairs = [(alone[i], together[i]) for i in range(len(requests)) if requests[i].id.startswith(kind)]
            same = sum(a.same_as(b) for a, b in pairs)
            out.identical[f"{kind} {arrival}"] = f"{same}/{len(pairs)}"
            out.same, out.asked = out.same + same, out.asked + len(pairs)
            for a, b in pairs:
                mg = b.margingate
                if kind == "seeded":
                    guarantees[str(mg.get("guarantee"))] += 1
                out.max_batch_rows = max(out.max_batch_rows, mg.get("max_batch_rows", 0))
                for name in ("steps", "triggers", "flips"):
                    setattr(out, name, getattr(out, name) + mg.get(name, 0))
                if not a.same_as(b):
                    reasons[f"{kind}: {why_different(a, b)}"] += 1
                    if mg.get("guarantee") in ("structural", "verified"):
                        out.untrue.append(f"{b.prompt_id} {arrival}")
    out.guarantees, out.differences = dict(guarantees), dict(reasons.most_common())
    return out


def measure(
    variant: Variant, requests: list[Prompt], max_new_tokens: int, log_dir: Path, profile: Path | None
) -> Outcome:
    """Serve one variant and compare."""
    flags = variant.flags()
    if variant.policy == "gate" and variant.threshold is None and profile is not None:
        flags += ["--margingate-profile", str(profile)]
    with serve(flags, log=log_dir / f"seeded-{variant.stem}.log") as server:
        outcome = compare(server.client, requests, max_new_tokens, label=variant.label)
    print(f"{variant.label}: done", file=sys.stderr, flush=True)
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Return the results as a Markdown table."""
    columns = list(outcomes[0].identical)
    rows = []
    for o in outcomes:
        labels = ", ".join(f"{name} {n}" for name, n in sorted(o.guarantees.items(), key=lambda item: -item[1]))
        rate = f"{o.triggers / o.steps:.2%} ({o.triggers:,}/{o.steps:,})" if o.steps else "-"
        rows.append([o.variant, *(o.identical[c] for c in columns), rate, o.flips, labels, o.max_batch_rows])
    head = ["policy", *columns, "trigger rate", "flips", "labels of seeded answers", "largest batch"]
    lines = [tables.markdown(head, rows)]
    for o in outcomes:
        lines += [f"\n{o.variant}: {n} of {o.asked}: {reason}" for reason, n in o.differences.items()]
        lines += [f"\n{o.variant}: labelled and different: {', '.join(o.untrue)}"] if o.untrue else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print its table; exit status 1 where an answer labelled structural or verified differs."""
    parser = argparse.ArgumentParser(prog="margingate evidence seeded", description=__doc__)
    parser.add_argument(
        "--prompts", type=int, default=200, help="seeded requests; a quarter as many greedy ones beside them"
    )
    parser.add_argument(
        "--variants", default="log,always,gate+canonical", help="policy[+fastpath][@threshold], comma-separated"
    )
    parser.add_argument("--profile", type=Path, default=None, help="thresholds of gate variants that name none")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--jobs", type=int, default=1, help="servers at a time; identity does not depend on it")
    parser.add_argument("--log-dir", type=Path, default=Path("out"))
    parser.add_argument("--out", type=Path, default=None, help="write the full results as JSON")
    args = parser.parse_args(argv)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    requests, variants = requests_of(args.prompts), [Variant.parse(v) for v in args.variants.split(",")]
    outcomes = measure_all(
        lambda v: measure(v, requests, args.max_new_tokens, args.log_dir, args.profile), variants, args.jobs, args.out
    )
    print(table(outcomes))
    return 1 if any(o.untrue for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
