"""Are sequences the same alone and in a batch? One table over policies, repairs and thresholds.

``margingate evidence alone-vs-batch --prompts 200 --variants log,gate@0.0625,always --out FILE.json``

Each variant gets a server of its own. Every prompt is completed alone, then with 16 requests in flight that arrive
together, staggered, and among non-greedy neighbours; tokens and finish reason must equal the run alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.evidence.record import measure_all
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import serve

CONCURRENCY = 16
ARRIVALS = ("together", "staggered", "mixed")


@dataclass(frozen=True)
class Variant:
    """One server to compare: ``policy[-repair][+fastpath][@threshold]``: ``gate-column@0.25``, ``gate+canonical``."""

    policy: str
    repair: str = "window"
    threshold: float | None = None
    fast_path: str = "stock"

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read the short form."""
        head, _, threshold = text.partition("@")
        head, _, fast_path = head.partition("+")
        policy, _, repair = head.partition("-")
        return cls(policy, repair or "window", float(threshold) if threshold else None, fast_path or "stock")

    @property
    def label(self) -> str:
        """A readable name."""
        repair = "" if self.policy != "gate" else f" {self.repair}"
        path = "" if self.fast_path == "stock" else f", {self.fast_path} fast path"
        return self.policy + repair + path + ("" if self.threshold is None else f" @{self.threshold:g}")

    @property
    def stem(self) -> str:
        """The name in files."""
        return self.label.replace(" ", "-").replace("@", "").replace(",", "")

    def flags(self) -> list[str]:
        """Return the server flags."""
        flags = ["--margingate-policy", self.policy, "--margingate-repair", self.repair, "--margingate-trace", "off"]
        flags += ["--margingate-fast-path", self.fast_path]
        return flags if self.threshold is None else [*flags, "--margingate-threshold", str(self.threshold)]


@dataclass
class Outcome:
    """What one variant gave, over all arrivals."""

    variant: str
    prompts: int
    identical: dict[str, int] = field(default_factory=dict)
    by_dataset: dict[str, dict[str, str]] = field(default_factory=dict)
    steps: int = 0
    triggers: int = 0
    flips: int = 0
    missed: int = 0
    audited: int = 0
    guarantees: dict[str, int] = field(default_factory=dict)
    max_batch_rows: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    differences: dict[str, int] = field(default_factory=dict)
    """Why sequences differ from the run alone."""


def why_different(alone: Completion, other: Completion) -> str:
    """Say which way two runs of one prompt parted, from the per-token record of both."""
    step = alone.first_difference(other)
    a, b = alone.margingate.get("per_token"), other.margingate.get("per_token")
    if step is None:
        return "same tokens, other finish reason"
    if not a or not b or step >= min(len(a["margin"]), len(b["margin"])):
        return "no record of the step"
    verified = (a["verified"][step], b["verified"][step])
    if all(verified):
        return "verified in both runs, and the verifies disagreed: they read columns that still carried the batch"
    if any(verified):
        return "verified in one run only: the margin lay on both sides of the threshold"
    if alone.margingate.get("policy") == "log":
        return "not verified: the policy verifies nothing"
    return "missed: not verified in either run, margin above the threshold"


def measure(variant: Variant, prompts: list[Prompt], max_new_tokens: int, log_dir: Path) -> Outcome:
    """Serve one variant and compare all arrivals with the run alone."""
    with serve(variant.flags(), log=log_dir / f"{variant.stem}.log") as server:
        client: Client = server.client
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if variant.policy != "off":
            options["custom"] = {"margingate_return_steps": True}
        runs: dict[str, list[Completion]] = {}
        seconds: dict[str, float] = {}
        for arrival in ("alone", *ARRIVALS):
            client.flush_cache()
            start = time.perf_counter()
            if arrival == "alone":
                runs[arrival] = run_alone(client, prompts, **options)
            else:
                options["stagger_seconds"] = 0.4 if arrival == "staggered" else 0.0
                options["background"] = prompts[:3] if arrival == "mixed" else ()
                runs[arrival] = run_together(client, prompts, CONCURRENCY, **options)
            seconds[arrival] = round(time.perf_counter() - start, 2)
            print(f"{variant.label}: {arrival} done in {seconds[arrival]:.0f} s", file=sys.stderr, flush=True)
    return summarise(variant, prompts, runs, seconds)


def summarise(
    variant: Variant, prompts: list[Prompt], runs: dict[str, list[Completion]], seconds: dict[str, float]
) -> Outcome:
    """Compare every arrival with the run alone."""
    out = Outcome(variant.label, len(prompts), seconds=seconds)
    reasons: Counter[str] = Counter()
    guarantees: Counter[str] = Counter()
    for arrival in ARRIVALS:
        pairs = list(zip(runs["alone"], runs[arrival], prompts))
        out.identical[arrival] = sum(a.same_as(b) for a, b, _ in pairs)
        for dataset in sorted({p.dataset for p in prompts}):
            mine = [a.same_as(b) for a, b, p in pairs if p.dataset == dataset]
            out.by_dataset.setdefault(dataset, {})[arrival] = f"{sum(mine)}/{len(mine)}"
        for a, b, _ in pairs:
            if not a.same_as(b):
                reasons[why_different(a, b)] += 1
            mg = b.margingate
            guarantees[mg.get("guarantee", "none")] += 1
            out.max_batch_rows = max(out.max_batch_rows, mg.get("max_batch_rows", 0))
            for key in ("steps", "triggers", "flips", "missed", "audited"):
                setattr(out, key, getattr(out, key) + mg.get(key, 0))
    out.differences, out.guarantees = dict(reasons.most_common()), dict(guarantees)
    return out


def table(outcomes: list[Outcome]) -> str:
    """Return the results as a Markdown table."""
    rows = []
    for o in outcomes:
        rate = f"{o.triggers / o.steps:.2%} ({o.triggers:,}/{o.steps:,})" if o.steps else "-"
        rows.append([o.variant, *(f"{o.identical[a]}/{o.prompts}" for a in ARRIVALS), rate, o.flips, o.max_batch_rows])
    lines = [tables.markdown(["policy", *ARRIVALS, "trigger rate", "flips repaired", "largest batch"], rows)]
    for o in outcomes:
        lines += [f"\n{o.variant}: {n} of {3 * o.prompts}: {reason}" for reason, n in o.differences.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(prog="margingate evidence alone-vs-batch", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts of the embedded model")
    parser.add_argument(
        "--variants", default="log,gate@0.0625,always", help="policy[-repair][+fastpath][@threshold], comma-separated"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--jobs", type=int, default=1, help="servers at a time; identity does not depend on it, times do"
    )
    parser.add_argument("--log-dir", type=Path, default=Path("out"))
    parser.add_argument("--out", type=Path, default=None, help="write the full results as JSON")
    args = parser.parse_args(argv)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    prompts = demo_prompts(args.prompts)
    variants = [Variant.parse(v) for v in args.variants.split(",")]
    outcomes = measure_all(
        lambda v: measure(v, prompts, args.max_new_tokens, args.log_dir), variants, args.jobs, args.out
    )
    print(table(outcomes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
