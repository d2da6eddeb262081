"""Does a gated server leak K/V slots? Many mixed requests, a third of them hung up on, then SGLang's own idle check.

``margingate evidence soak --requests 1000``

Gated, ungated and sampled requests over shared prefixes, streams that are closed after a few tokens, penalties and a
regex, on a small K/V pool so that eviction and retraction happen as well. SGLang checks its books whenever it is idle
and ends the server on a leak; the run passes when the server is alive, its cache can be flushed, and its log names none.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from sglang_margingate.bench.prompts.embedded import shared_prompts
from sglang_margingate.bench.servers.process import GATE_ALONE, Server, serve

SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "custom_params": {"margingate_policy": "always"}},
    {"temperature": 0, "custom_params": {"margingate_policy": "off"}},
    {"temperature": 0, "custom_params": {"margingate_threshold": 2.0}},
    {"temperature": 0, "frequency_penalty": 0.5},
    {"temperature": 0, "regex": "[a-z ]{5,12}"},
    {"temperature": 1.0, "top_p": 0.9},
)


def one(server: Server, number: int, texts: list[str]) -> str:
    """Send one request, hang up on a third of them, and return what became of it."""
    rng = random.Random(number)
    hang_up = number % 3 == 0
    params = {**rng.choice(SAMPLING), "max_new_tokens": rng.randint(1, 40)}
    body: dict[str, Any] = {"text": rng.choice(texts), "sampling_params": params}
    if not hang_up:
        return f"HTTP {server.client.post(body)[0]}"
    with closing(server.client.stream(body)) as chunks:
        for n, _ in enumerate(chunks):
            if n >= rng.randint(0, 6):
                return "hung up"
    return "ended first"


def idle(server: Server, seconds: float = 60.0) -> bool:
    """Wait until the server runs nothing; return whether its cache could be flushed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.client.flush_cache():
            time.sleep(2)  # one more idle check after the flush
            return True
    return False


def main(argv: list[str] | None = None) -> int:
    """Run the soak; exit status 0 means no leak."""
    parser = argparse.ArgumentParser(prog="margingate evidence soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=6000, help="tokens of the K/V pool")
    parser.add_argument("--log", type=Path, default=Path("out/soak.log"))
    args = parser.parse_args(argv)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    texts = [p.text for p in shared_prompts(60)]
    flags = [*GATE_ALONE, "--margingate-threshold", "0.0625", "--margingate-audit-rate", "0.05",
             "--max-total-tokens", str(args.pool), "--schedule-conservativeness", "0.3", "--margingate-trace", "off"]  # fmt: skip
    with serve(flags, log=args.log) as server:
        with ThreadPoolExecutor(16) as pool:
            outcomes = Counter(pool.map(lambda n: one(server, n, texts), range(args.requests)))
        flushed = idle(server)
        alive = server.alive()
        totals = server.client.status()["totals"] if alive else {}
    leak = "leak" in args.log.read_text()
    print(f"{args.requests} requests: {dict(outcomes)}")
    print(f"alive {alive}, idle and flushed {flushed}, leak in the log {leak}; {totals}")
    return 0 if alive and flushed and not leak else 1


if __name__ == "__main__":
    sys.exit(main())
