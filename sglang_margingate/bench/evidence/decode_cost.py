"""What a decode step costs on a running server, by batch size and policy; and whether sequences stay the same.

``margingate evidence decode-cost --base-url URL --arms stock --batches 1,8,32,64 --out FILE.json``

Requests carry token ids (no tokenizer needed) and end at a fixed length. An arm is what the requests ask for:
``stock`` (nothing), ``log``, ``always`` or ``gate@X`` with the threshold X, so one server measures several arms, in
turn within each repeat. Several servers of one session are put side by side by ``--table FILE FILE ...``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_margingate.bench import options, tables
from sglang_margingate.bench.servers.client import Client, Prompt, ServerError, first_difference


@dataclass
class Stream:
    """One request's answer as it arrived."""

    sent: float
    at: list[float] = field(default_factory=list)
    """Seconds of each chunk's arrival."""
    count: list[int] = field(default_factory=list)
    """Tokens received by then."""
    tokens: list[int] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The server and what its prompts are drawn from."""

    url: str
    vocab: int

    def prompt(self, seed: int, tokens: int) -> list[int]:
        """Return random token ids, the same for the same seed."""
        rng = random.Random(seed)
        return [rng.randrange(100, self.vocab) for _ in range(tokens)]

    def verifier(self) -> tuple[float, float]:
        """Return the verify passes so far and the seconds they took; zeros for a server without a verifier."""
        try:
            counters = Client(self.url).status().get("verifier") or {}
        except ServerError:
            counters = {}
        return float(counters.get("passes", 0)), float(counters.get("seconds", 0))

    def flush_cache(self) -> None:
        """Empty the prefix cache, where there is one."""
        Client(self.url).flush_cache()

    def batch(self, prompts: list[list[int]], new: int, custom: dict[str, Any], tag: str | None = None) -> list[Stream]:
        """Send all prompts at once."""
        client = Client(self.url, tagged=bool(custom))
        with ThreadPoolExecutor(len(prompts)) as pool:
            jobs = [
                pool.submit(_request, client, ids, new, custom, tag and f"{tag}-{i}") for i, ids in enumerate(prompts)
            ]
            return [job.result() for job in jobs]


def arm_params(arm: str) -> dict[str, Any]:
    """Return the custom parameters of an arm."""
    policy, _, threshold = arm.partition("@")
    if policy == "stock":
        return {}
    return {"margingate_policy": policy, **({"margingate_threshold": float(threshold)} if threshold else {})}


def _request(client: Client, ids: list[int], new: int, custom: dict[str, Any], rid: str | None) -> Stream:
    """Send one streaming request and note when its tokens arrive."""
    prompt = Prompt(rid or "", "", "", tuple(ids), new)
    out = Stream(time.perf_counter())
    last = b""
    for last in client.stream(client.payload(prompt, new, custom=custom, rid=rid)):
        at = last.rfind(b'"completion_tokens":')
        out.at.append(time.perf_counter())
        out.count.append(int(last[at + 20 : at + 30].split(b",")[0].split(b"}")[0]))
    final = json.loads(last)
    out.tokens, out.meta = final["output_ids"], final["meta_info"]
    return out


def summary(streams: list[Stream]) -> dict[str, float]:
    """Return times in ms and tokens per second of one batch.

    The decode step is read in the window in which every request of the batch is decoding: tokens that one request
    gained there, over the time between; the median over requests.
    """
    begin, end = max(s.at[0] for s in streams), min(s.at[-1] for s in streams)
    steps = []
    for s in streams:
        inside = [(t, n) for t, n in zip(s.at, s.count) if begin <= t <= end]
        if len(inside) > 1 and inside[-1][1] > inside[0][1]:
            steps.append((inside[-1][0] - inside[0][0]) / (inside[-1][1] - inside[0][1]) * 1e3)
    tpot = sorted((s.at[-1] - s.at[0]) / (s.count[-1] - s.count[0]) * 1e3 for s in streams)
    total = max(s.at[-1] for s in streams) - min(s.sent for s in streams)
    found = {
        "step_ms": statistics.median(steps) if steps else float("nan"),
        "tpot_p50_ms": statistics.median(tpot),
        "tpot_p99_ms": tpot[min(len(tpot) - 1, int(0.99 * len(tpot)))],
        "ttft_p50_ms": statistics.median((s.at[0] - s.sent) * 1e3 for s in streams),
        "tokens_per_s": sum(s.count[-1] for s in streams) / total,
    }
    ours = [s.meta["margingate"] for s in streams if s.meta.get("margingate")]
    for key in ("steps", "triggers", "verified", "flips"):
        found[key] = float(sum(o[key] for o in ours))
    return found


def cost(to: Target, arms: list[str], batches: list[int], context: int, new: int, repeats: int) -> dict[str, Any]:
    """Measure every arm at every batch size; the repeats go round all of them."""
    results: dict[str, Any] = {}
    for arm in arms:  # warm up: lazy kernels and caches
        to.batch([to.prompt(9000 + i, context) for i in range(4)], 16, arm_params(arm))
    for repeat in range(repeats):
        for rows in batches:
            for arm in arms:
                # Prompts of an arm's own: a prefix cached by another arm would shorten its prefill.
                seed = 10**7 * arms.index(arm) + 10**5 * rows + 10**3 * repeat
                prompts = [to.prompt(seed + i, context) for i in range(rows)]
                before = to.verifier()
                streams = to.batch(prompts, new, arm_params(arm), f"c{repeat}-{rows}-{arm}")
                found = summary(streams)
                passes, seconds = (b - a for a, b in zip(before, to.verifier()))
                found |= {"passes": passes, "verify_pass_ms": seconds / passes * 1e3 if passes else float("nan")}
                results.setdefault(arm, {}).setdefault(str(rows), []).append(found)
    return results


def prefill(to: Target, arms: list[str], repeats: int) -> dict[str, list[float]]:
    """Return prompt tokens per second of 64 prompts of 100 to 900 tokens that arrive together, by arm."""
    lengths = [100 + 800 * i // 63 for i in range(64)]
    out: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(-1, repeats):  # the first round is a warm-up
        for number, arm in enumerate(arms):
            prompts = [to.prompt(10**6 * (repeat + 2) + 1000 * number + i, n) for i, n in enumerate(lengths)]
            streams = to.batch(prompts, 1, arm_params(arm))
            seconds = max(s.at[-1] for s in streams) - min(s.sent for s in streams)
            if repeat >= 0:
                out[arm].append(sum(lengths) / seconds)
    return out


STATES = ("half warm", "cold", "warm")


def identity(
    to: Target,
    arms: list[str],
    sizes: list[int],
    prompts: int,
    new: int,
    states: tuple[str, ...] = STATES,
    rounds: int = 1,
) -> dict[str, Any]:
    """Compare ``prompts`` sequences alone with the same ones inside batches of each size (fillers make it up).

    Each size runs on an empty prefix cache (cold), with the first half of every prompt cached, and with everything cached
    (warm, which finds what the state before it left). More rounds look for what happens seldom. Of sequences that differ
    everything is kept, margins of each step included: rare ones do not come back when asked to.
    """
    lengths = [225 + 675 * i // max(1, prompts - 1) for i in range(prompts)]
    ids = [to.prompt(i, n) for i, n in enumerate(lengths)]
    out: dict[str, Any] = {}
    for arm in arms:
        custom = arm_params(arm)
        if custom:
            custom["margingate_return_steps"] = True
        alone = [to.batch([p], new, custom)[0] for p in ids]
        for size in sizes:
            for state in states * rounds:
                if state != "warm":
                    to.flush_cache()
                if state == "half warm":
                    to.batch([p[: len(p) // 2] for p in ids], 1, custom)
                parted = _compare(to, ids, alone, size, new, custom)
                found = out.setdefault(arm, {}).setdefault(
                    f"{size} {state}", {"same": 0, "of": 0, "first_difference": []}
                )
                found["same"] += prompts - len(parted)
                found["of"] += prompts
                found["first_difference"] = sorted(
                    [*found["first_difference"], *(p["first_difference"] for p in parted)]
                )
                if custom:  # of a server of ours, which says more than tokens
                    found.setdefault("parted", []).extend(parted)
                print(f"{arm}: batch {size}, {state}: {prompts - len(parted)}/{prompts} identical", flush=True)
    return out


def _compare(
    to: Target, ids: list[list[int]], alone: list[Stream], size: int, new: int, custom: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the sequences that differ from the run alone: which, where, and both runs."""
    group, parted = min(size, len(ids)), []
    for at in range(0, len(ids), group):
        mine = ids[at : at + group]
        fill = [to.prompt(5000 + i, 300 + 9 * i) for i in range(size - len(mine))]
        for k, (want, got) in enumerate(zip(alone[at : at + group], to.batch(mine + fill, new, custom))):
            at_token = first_difference(want.tokens, got.tokens)
            if at_token is not None:
                runs = {"alone": {"tokens": want.tokens, **want.meta}, "together": {"tokens": got.tokens, **got.meta}}
                parted.append({"prompt": at + k, "first_difference": at_token, **runs})
    return parted


def table(files: list[Path]) -> str:
    """Return all servers' arms side by side, as ratios to the server tagged ``stock`` (or the first file)."""
    documents = sorted((json.loads(f.read_text()) for f in files), key=lambda d: d["tag"] != "stock")
    base = next(iter(documents[0]["cost"].values()))
    head = [
        *("server, arm", "batch", "step, ms (min to max)", "of stock", "tokens/s"),
        *("TPOT p50, ms", "p99", "triggered", "verify pass, ms"),
    ]
    out = []
    for d in documents:
        for arm, by_rows in d["cost"].items():
            for rows, runs in by_rows.items():
                mid = {k: statistics.median(r[k] for r in runs) for k in runs[0]}
                steps = [r["step_ms"] for r in runs]
                of = mid["step_ms"] / statistics.median(r["step_ms"] for r in base[rows])
                out.append(
                    [
                        f"{d['tag']}, {arm}",
                        rows,
                        f"{mid['step_ms']:.2f} ({min(steps):.2f} to {max(steps):.2f})",
                        f"{of:.3f}",
                        f"{mid['tokens_per_s']:.0f}",
                        f"{mid['tpot_p50_ms']:.2f}",
                        f"{mid['tpot_p99_ms']:.2f}",
                        f"{mid['triggers'] / mid['steps']:.2%}" if mid["steps"] else "-",
                        f"{mid['verify_pass_ms']:.2f}" if mid.get("passes") else "-",
                    ]
                )
    return tables.markdown(head, out)


def main(argv: list[str] | None = None) -> int:
    """Measure, or put measured files side by side."""
    parser = argparse.ArgumentParser(prog="margingate evidence decode-cost", description=__doc__)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:30000")
    add("--tag", default="server", help="name of the server in the table")
    add("--arms", type=options.names, default="stock", help="stock, log, always, gate@THRESHOLD; comma-separated")
    add("--batches", type=options.names, default="1,8,32,64", help="requests at a time")
    add("--context", type=int, default=512, help="prompt tokens")
    add("--new", type=int, default=128, help="generated tokens")
    add("--repeats", type=int, default=3)
    add("--prefill-arms", type=options.names, default="", help="arms whose prefill throughput to measure")
    add("--identity-arms", type=options.names, default="", help="arms to compare alone with in a batch")
    add("--identity-sizes", type=options.names, default="2,8,20,33,64")
    add("--identity-prompts", type=int, default=24)
    add("--identity-states", type=options.names, default=",".join(STATES), help="of the prefix cache; comma-separated")
    add("--identity-rounds", type=int, default=1, help="how often each size runs in each state")
    add("--identity-new", type=int, default=96, help="generated tokens there")
    add("--vocab", type=int, default=128_256, help="of the served model (Llama 3.1's)")
    add("--out", type=Path, default=None)
    add("--table", type=Path, nargs="+", default=None, metavar="FILE", help="print the table of measured files")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.table))
        return 0
    to = Target(args.base_url, args.vocab)
    document: dict[str, Any] = {"tag": args.tag, "command": sys.argv[1:], "cost": {}, "identity": {}}
    sizes = [int(b) for b in args.batches]
    if args.repeats:
        document["cost"] = cost(to, args.arms, sizes, args.context, args.new, args.repeats)
    if args.prefill_arms:
        document["prefill"] = prefill(to, args.prefill_arms, 5)
        for arm, rates in document["prefill"].items():
            print(
                f"{args.tag}, {arm}: prefill {statistics.median(rates):.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f})"
            )
    if args.identity_arms:
        if unknown := set(args.identity_states) - set(STATES):
            parser.error(f"--identity-states: {', '.join(sorted(unknown))}: use {', '.join(STATES)}")
        document["identity"] = identity(
            to, args.identity_arms, [int(b) for b in args.identity_sizes], args.identity_prompts, args.identity_new,
            tuple(args.identity_states), args.identity_rounds,
        )  # fmt: skip
    if args.out is not None:
        options.write(args.out, json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
