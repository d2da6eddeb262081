"""``margingate evidence NAME``: the scripts behind the numbers in the documentation."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

SCRIPTS = {
    "alone-vs-batch": "are sequences the same alone and in a batch? policies, repairs, thresholds",
    "decode-cost": "what does a decode step cost, by batch size and policy? (a running server)",
    "log-probabilities": "are log-probabilities the same bits alone and in a batch? greedy and scored requests",
    "host-time": "what do our hooks take of the scheduler's thread? a decode step and a prefill, without a server",
    "overhead": "what does observing or gating cost? paired rounds on one server",
    "prefix": "does a prefix hit change the output, and what is left of the hit rate?",
    "record-sample": "record the small run that the dashboard's tests and the README show",
    "schedulers": "is the answer the same whichever scheduler or server gives it? --dp-size 2, SGLang's router",
    "seeded": "is seeded sampling the same alone and in a batch? mixed parameters, cold and warm",
    "soak": "does a gated server leak K/V slots? many mixed requests, a third hung up on",
    "truth-sweep": "does a label ever say too much? requests of mixed kinds, then each alone",
}

PLACES = {"seeded": "answers.seeded"}
"""Scripts that do not lie beside this file."""


def listing() -> str:
    """Return the scripts, a line each."""
    wide = max(map(len, SCRIPTS))
    lines = [f"  {name:<{wide}}  {what}" for name, what in SCRIPTS.items()]
    return "\n".join(["usage: margingate evidence NAME [options]; NAME --help tells its options", "", *lines])


def main(argv: Sequence[str]) -> int:
    """Run one script; without a name list them all."""
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help"):
        print(listing())
        return 0
    if name not in SCRIPTS:
        print(f"margingate evidence: error: {name!r} is unknown; use {', '.join(SCRIPTS)}", file=sys.stderr)
        return 2
    place = PLACES.get(name, name.replace("-", "_"))
    module = import_module(f"sglang_margingate.bench.evidence.{place}")
    return int(module.main(list(argv[1:])))
