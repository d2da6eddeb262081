"""``margingate check``: does this server give the same tokens whatever the batch?"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_margingate.bench import options

EPILOG = """\
exit status: 0 the outputs are identical (with --expect-fail: they are not); 1 the opposite; 2 the check could not be
made: server unreachable or died, no batch formed, wrong input. Ctrl-C writes the results so far and exits with 130.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    p.epilog = EPILOG
    options.add_server(p)
    add = p.add_argument_group("api").add_argument
    add(
        "--api",
        choices=("auto", "sglang", "openai"),
        default="auto",
        help="SGLang's /generate or /v1/completions (%(default)s)",
    )
    add("--model", metavar="NAME", help="model to ask an OpenAI-compatible server for (its first)")
    options.add_prompts(p, "arith,code,story", 50)
    add = p.add_argument_group("what is compared beside tokens").add_argument
    add("--logprobs", type=options.whole(0), metavar="K",
        help="log-probabilities in every bit: of the tokens, of the best K, and of the prompt (native API)")  # fmt: skip
    add(
        "--record", type=Path, metavar="FILE", help="keep the first answer of each prompt, and the server's fingerprint"
    )
    add("--against", type=Path, metavar="FILE",
        help="compare with answers recorded earlier or elsewhere; leads with what differs in the fingerprints")  # fmt: skip
    add = p.add_argument_group("phases").add_argument
    add("--phases", type=options.names, default=None, metavar="NAME[,NAME]",
        help="alone, together, staggered, traffic, cached, prefix (all)")  # fmt: skip
    add("--repeats", type=options.whole(1), default=2, metavar="N", help="runs of each phase (%(default)s)")
    add("--concurrency", type=options.whole(2), default=16, metavar="N", help="requests in flight (%(default)s)")
    add(
        "--stagger",
        type=options.number(0),
        default=1.0,
        metavar="S",
        help="seconds over which arrivals are spread (%(default)g)",
    )
    add(
        "--background",
        type=options.whole(0),
        default=4,
        metavar="N",
        help="sampling requests among the traffic (%(default)s)",
    )
    add("--seed", type=int, default=0, help="orders, delays and random prompts (%(default)s)")
    add("--fail-fast", action="store_true", help="stop at the first difference")
    add(options.SAMPLED, action="store_true",
        help="seeds and mixed sampling parameters instead of temperature 0: the same seed must give the same tokens")  # fmt: skip
    add = p.add_argument_group("verdict").add_argument
    add("--expect-fail", action="store_true", help="the inverse test: an ungated server must fail")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--junit", type=Path, metavar="FILE", help="write JUnit XML for CI")


def asked(best: int | None) -> tuple[tuple[str, Any], ...]:
    """Return the fields of a request that asks for log-probabilities, the ``best`` of each position among them."""
    return () if best is None else (("return_logprob", True), ("logprob_start_len", 0), ("top_logprobs_num", best))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the check, print the verdict, return the exit status."""
    from sglang_margingate.bench.check import recorded
    from sglang_margingate.bench.check.identity import Runs
    from sglang_margingate.bench.check.phases import PHASES, Plan, run_check
    from sglang_margingate.bench.check.verdict import judge, render, to_dict, to_junit
    from sglang_margingate.bench.console import bar, make_console
    from sglang_margingate.bench.prompts.chosen import drawn, prompts_of, rendered
    from sglang_margingate.bench.servers.gauges import Gauge
    from sglang_margingate.bench.servers.openai_client import served_model

    phases = tuple(args.phases or PHASES)
    unknown = [name for name in phases if name not in PHASES]
    if unknown:
        raise options.UsageError(f"--phases: {unknown[0]!r} is unknown; use {', '.join(PHASES)}")
    plan = Plan(
        phases,
        args.repeats,
        args.concurrency,
        args.max_tokens,
        args.stagger,
        args.background,
        args.seed,
        args.fail_fast,
    )
    plain = prompts_of(args)
    known = None if args.against is None else recorded.load(args.against)
    lead: list[str] = []
    runs = Runs()
    console = make_console()
    with options.server(args, console) as client:
        prompts, template = rendered(args, plain, served_model(client), client)
        prompts = drawn(args, prompts, client)
        prompts = [replace(p, asks=asked(args.logprobs)) for p in prompts]
        here = recorded.fingerprint_of(client) if args.record or known else recorded.NO_FINGERPRINT
        if known is not None:
            count = recorded.put_first(known, prompts, runs, args.max_tokens)
            lead = [
                *recorded.compare(known, here),
                f"recorded: {count:,} of these {len(prompts):,} prompts, in {known.path}",
            ]
        facts = {**options.server_facts(client), "template": f"chat template {template}"}
        gauge = Gauge(client.base_url)
        with bar(console) as progress:
            task = progress.add_task("check", total=None)
            result = run_check(
                client,
                prompts,
                plan,
                gauge,
                lambda label, total: progress.reset(task, description=label, total=total),
                lambda: progress.advance(task),
                runs,
            )
    verdict = judge(result, args.expect_fail)
    command = [
        "margingate",
        "check",
        *options.given(args, parser, ("phases", "json", "junit", "record", "port", "server_log")),
    ]
    for line in lead:
        print(line)
    if args.record:
        count = recorded.record(args.record, here, prompts, result.runs, args.max_tokens)
        console.print(f"{count:,} answers recorded in {args.record}")
    print(render(result, verdict, command, facts))
    if args.json:
        document = to_dict(result, verdict, command, facts)
        options.write(args.json, json.dumps(document, indent=2) + "\n")
    if args.junit:
        options.write(args.junit, to_junit(result, verdict, command, args.expect_fail))
    return 130 if result.error == "interrupted" else verdict.code
