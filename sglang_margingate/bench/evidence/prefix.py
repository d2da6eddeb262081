"""Does a prefix hit change the output, and what is left of the hit rate? One table over radix policies.

``margingate evidence prefix --prompts 200 --radix canonical,stock,off --out prefix.json``

Prompts of at least 300 tokens in groups that share 0 to 90% of them are completed cold (cache flushed before each),
warm (again, everything cached), partly warm (after the other prompts of their group), interleaved in one batch, and
under a small K/V pool that forces eviction and retraction; conversations of four turns are continued through the
cache and sent cold. Tokens and finish reason must equal the cold run.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.evidence.record import measure_all
from sglang_margingate.bench.prompts.embedded import conversations, shared_prompts
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import serve
from sglang_margingate.demo.chat import ASSISTANT, EOS, USER

POOL_TOKENS = 160_000
"""Holds all prompts of the default run: a warm run is warm."""
SMALL_POOL_TOKENS = 6000


@dataclass
class Outcome:
    """What one radix policy gave."""

    label: str
    identical: dict[str, str] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    ttft_ms: dict[str, float] = field(default_factory=dict)
    retractions: int = 0
    guarantees: dict[str, int] = field(default_factory=dict)


def talk(client: Client, number: int, messages: list[str], max_new_tokens: int, cold: bool) -> list[Completion]:
    """Run one conversation; ``cold`` empties the cache before every turn."""
    history, out = "", []
    for turn, message in enumerate(messages):
        if cold:
            client.flush_cache()
        history += f"{USER}{message}{ASSISTANT}"
        done = client.generate(Prompt(f"c{number}t{turn}", history, "chat"), max_new_tokens=max_new_tokens)
        out.append(done)
        history += done.text + EOS
    return out


def run_cold(client: Client, prompts: list[Prompt], **options: Any) -> list[Completion]:
    """Complete each prompt alone on an empty cache."""
    out = []
    for prompt in prompts:
        client.flush_cache()
        out.append(client.generate(prompt, **options))
    return out


def count_same(cold: list[Completion], other: list[Completion]) -> str:
    """Return ``n/N`` identical sequences."""
    return f"{sum(a.same_as(b) for a, b in zip(cold, other))}/{len(cold)}"


def measure(label: str, flags: list[str], prompts: list[Prompt], chats: int, tokens: int, log_dir: Path) -> Outcome:
    """Serve one radix policy and compare every cache state with the cold run."""
    out = Outcome(label)

    def note(state: str, runs: list[Completion], cold: list[Completion]) -> None:
        out.identical[state] = count_same(cold, runs)
        out.cached[state] = sum(r.meta.get("cached_tokens", 0) for r in runs)
        out.prompt_tokens[state] = sum(r.meta.get("prompt_tokens", 0) for r in runs)
        out.retractions += sum(r.meta.get("num_retractions") or 0 for r in runs)
        for r in runs:
            g = r.margingate.get("guarantee", "none")
            out.guarantees[g] = out.guarantees.get(g, 0) + 1
        print(f"{label}: {state}: {out.identical[state]}, cached {out.cached[state]:,}", file=sys.stderr, flush=True)

    options: dict[str, Any] = {"max_new_tokens": tokens}
    large = [*flags, "--max-total-tokens", str(POOL_TOKENS)]
    with serve(large, log=log_dir / f"prefix-{label}.log") as server:
        client = server.client
        cold = run_cold(client, prompts, **options)
        out.ttft_ms["cold"] = first_token_ms(client, prompts[:20], flush=True)
        client.flush_cache()
        note("partly warm", run_alone(client, prompts, **options), cold)
        note("warm", run_alone(client, prompts, **options), cold)
        out.ttft_ms["warm"] = first_token_ms(client, prompts[:20], flush=False)
        client.flush_cache()
        note("interleaved", run_together(client, prompts, 16, **options), cold)
        dialogues = conversations(chats, 4)
        warm_talk = [c for i, m in enumerate(dialogues) for c in talk(client, i, m, tokens, cold=False)]
        cold_talk = [c for i, m in enumerate(dialogues) for c in talk(client, i, m, tokens, cold=True)]
        note("4-turn conversations", warm_talk, cold_talk)
    small = [*flags, "--max-total-tokens", str(SMALL_POOL_TOKENS)]
    with serve(small, log=log_dir / f"prefix-{label}-small.log") as server:
        note("small pool", run_together(server.client, prompts, 16, **options), cold)
    return out


def first_token_ms(client: Client, prompts: list[Prompt], flush: bool) -> float:
    """Return the median time of a one-token completion, in ms."""
    times = []
    for prompt in prompts:
        if flush:
            client.flush_cache()
        times.append(client.generate(prompt, max_new_tokens=1).seconds * 1e3)
    return round(sorted(times)[len(times) // 2], 1)


def table(outcomes: list[Outcome]) -> str:
    """Return the results as a Markdown table."""
    states = list(outcomes[0].identical)
    rows = []
    for o in outcomes:
        hits = ", ".join(f"{o.cached[s]:,}/{o.prompt_tokens[s]:,}" for s in ("partly warm", "warm"))
        ttft = ", ".join(f"{o.ttft_ms[s]:.0f} ms" for s in ("cold", "warm"))
        rows.append([o.label, *(o.identical[s] for s in states), hits, ttft])
    return tables.markdown(
        ["radix", *states, "cached of prompt tokens (partly warm, warm)", "first token cold, warm"], rows
    )


def main(argv: list[str] | None = None) -> int:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(prog="margingate evidence prefix", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--conversations", type=int, default=20, help="conversations of four turns")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--policy", default="gate", choices=("gate", "always"))
    parser.add_argument("--threshold", default="0.0625")
    parser.add_argument("--radix", default="canonical,stock,off", help="comma-separated; canonical@32 sets the chunk")
    parser.add_argument("--jobs", type=int, default=1, help="servers at a time")
    parser.add_argument("--log-dir", type=Path, default=Path("out"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    prompts = shared_prompts(args.prompts)

    def one(entry: str) -> Outcome:
        radix, _, chunk = entry.partition("@")
        flags = ["--margingate-policy", args.policy, "--margingate-fast-path", "stock", "--margingate-threshold", args.threshold, "--margingate-radix", radix,
                 "--margingate-trace", "off"]  # fmt: skip
        flags += ["--margingate-chunk", chunk] if chunk else []
        return measure(entry.replace("@", "-"), flags, prompts, args.conversations, args.max_new_tokens, args.log_dir)

    print(table(measure_all(one, args.radix.split(","), args.jobs, args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
