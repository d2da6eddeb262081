"""The options of ``margingate bench --workload``; light to import, so that help comes at once."""

from __future__ import annotations

import argparse

from sglang_margingate.bench import options
from sglang_margingate.bench.workload.loads import FORMS, Limits


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options of workloads."""
    add = p.add_argument_group("workloads, instead of shares of deterministic traffic (--workload)").add_argument
    add("--workload", metavar="LOAD[,LOAD]", help="; ".join(FORMS.values()))
    add("--requests", type=options.whole(1), default=64, metavar="N", help="requests of each load (%(default)s)")
    add("--base-url", action="append", default=[], metavar="NAME=URL",
        help="a running server to measure instead of --modes; may be repeated")  # fmt: skip
    add(
        "--goodput",
        type=_limits,
        metavar="TTFT:TPOT",
        help="limits in ms, as 500:50: the share of requests within both",
    )
    add("--identity", choices=("all", "promised", "none"), default="all",
        help="whose sequences are compared with their runs alone: all servers', those of servers that promise it, none "
        "(%(default)s)")  # fmt: skip
    add("--servers", choices=("auto", "together", "in-turn"), default="auto",
        help="start all servers, and let each round visit all of them; or one after the other. auto: together where their "
        "memory allows it: on a CPU, or with --max-total-tokens or a small --mem-fraction-static (%(default)s)")  # fmt: skip


def _limits(text: str) -> Limits:
    parts = text.split(":")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not TTFT:TPOT in ms, as 500:50")
    return Limits(*(options.number(0.001)(part) for part in parts))
