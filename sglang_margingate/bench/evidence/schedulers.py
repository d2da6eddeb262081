"""Is the answer the same whichever scheduler or server gives it? ``--dp-size 2``, and servers behind SGLang's router.

``margingate evidence schedulers --prompts 200 --in-flight 33``

One server with two schedulers, then two servers behind SGLang's router (``pip install 'sglang-margingate[router]'``) under each of its
policies, all on the canonical fast path. Every prompt is run alone first, at one server without a router. Exit status 1 where an
answer differs, carries another label than ``structural``, or where one scheduler or server answered nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from sglang_margingate.bench import options, tables
from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError, run_alone, run_together
from sglang_margingate.bench.servers.process import Server, free_port, serve

POLICIES = ("round_robin", "random", "cache_aware", "power_of_two")
FLAGS = ("--margingate-policy", "gate", "--margingate-fast-path", "canonical", "--margingate-trace", "off")
START_SECONDS = 90.0


@contextmanager
def router(urls: Sequence[str], policy: str, log: Path) -> Iterator[str]:
    """Start SGLang's router in front of servers; give its address once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
               "--prometheus-port", str(free_port()), "--policy", policy, "--worker-urls", *urls]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"the router did not start with {policy}: see {log}")
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).is_success and httpx.get(url + "/v1/models", timeout=5).is_success
    except httpx.HTTPError:
        return False


def answered(servers: Sequence[Server]) -> list[int]:
    """Return the requests that each scheduler has answered."""
    out = []
    for server in servers:
        status = server.client.status()
        out += [each["totals"]["requests"] for each in status.get("schedulers", [status])]
    return out


def row(name: str, alone: list[Completion], found: list[Completion], by: list[int]) -> tuple[list[str], bool]:
    """Return a line of the table, and whether everything holds."""
    same = sum(a.same_as(b) for a, b in zip(alone, found))
    labels = {c.margingate["guarantee"] for c in found}
    holds = same == len(alone) and labels == {"structural"} and min(by) > 0
    return [
        name,
        f"{same}/{len(alone)}",
        ", ".join(sorted(labels)),
        " + ".join(map(str, by)),
        "holds" if holds else "FAILS",
    ], holds


def main(argv: list[str] | None = None) -> int:
    """Run both parts; 0 where every answer is the same."""
    parser = argparse.ArgumentParser(prog="margingate evidence schedulers", description=__doc__)
    add = parser.add_argument
    add("--prompts", type=int, default=200)
    add("--in-flight", type=int, default=33)
    add("--max-new-tokens", type=int, default=64)
    add(
        "--policies",
        type=options.names,
        default=",".join(POLICIES),
        help="of the router; comma-separated, none: no router",
    )
    add("--flags", type=str.split, default=[], help="further flags of every server, as one word")
    add("--log-dir", type=Path, default=Path("out/schedulers"))
    args = parser.parse_args(argv)
    args.log_dir.mkdir(parents=True, exist_ok=True)
    prompts: list[Prompt] = demo_prompts(args.prompts)
    policies = [policy for policy in args.policies if policy != "none"]
    lines: list[list[str]] = []
    fine = True

    def ask(name: str, client: Client, servers: Sequence[Server], alone: list[Completion]) -> None:
        nonlocal fine
        before = answered(servers)
        found = run_together(client, prompts, args.in_flight, max_new_tokens=args.max_new_tokens)
        line, holds = row(name, alone, found, [b - a for a, b in zip(before, answered(servers))])
        lines.append(line)
        fine &= holds
        print(*line, sep="  ", flush=True)

    with serve([*FLAGS, "--dp-size", "2", *args.flags], log=args.log_dir / "dp.log", timeout=400) as server:
        alone = run_alone(server.client, prompts, max_new_tokens=args.max_new_tokens)
        ask("--dp-size 2", server.client, [server], alone)
    if policies:
        with ExitStack() as stack:
            servers = [
                stack.enter_context(serve([*FLAGS, *args.flags], log=args.log_dir / f"server-{k}.log", timeout=400))
                for k in range(2)
            ]
            for policy in policies:
                with router([s.base_url for s in servers], policy, args.log_dir / f"router-{policy}.log") as url:
                    ask(f"router, {policy}", Client(url), servers, alone)
    print(tables.markdown(["", "as alone", "labels", "answered by each", ""], lines, (0, 2, 4)))
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
