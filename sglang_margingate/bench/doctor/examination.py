"""The parts of an examination and their order; what was done is kept whatever ends it."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

from sglang_margingate.bench.doctor import kernels, machine, served
from sglang_margingate.bench.doctor.findings import Finding, Part, State, not_checked
from sglang_margingate.bench.doctor.visit import Visit
from sglang_margingate.bench.options import API_KEY_ENV, UsageError

PARTS = (
    Part("machine", "the machine", lambda _visit: machine.machine()),
    Part("versions", "versions and settings", lambda _visit: machine.versions()),
    Part("kernels", "kernels against their references", kernels.compare, 5),
    Part("repeat", "kernels repeated under load", kernels.repeat, 10),
    Part("ours", "our server: hooks, self-test, map", served.start_ours, 20),
    Part("identity", "identity alone against batches", served.identity, 5),
    Part("cost", "a decode step of ours", served.cost, 5),
    Part("stock", "stock SGLang", served.start_stock, 20),
    Part("control", "the negative control", served.control, 5),
    Part("against", "a decode step against stock's", served.cost, 5),
)
INTERRUPTED = "interrupted"


def model_of(args: argparse.Namespace) -> str | None:
    """Return the model that the options name: that of a running server where there is one.

    Raises
    ------
    ServerError
        One line: nothing answers there.
    """
    if not args.base_url or args.model_path or args.shape:
        return args.model_path
    from sglang_margingate.bench.servers.openai_client import connect, served_model

    return served_model(connect(args.base_url, api_key=os.environ.get(API_KEY_ENV, "")))


def chosen(names: Sequence[str]) -> list[Part]:
    """Return the parts of these names, all of them where there is none; a part brings what it stands on.

    Raises
    ------
    UsageError
        A name is unknown.
    """
    known = [part.name for part in PARTS]
    for name in names:
        if name not in known:
            raise UsageError(f"--parts: {name!r} is unknown; use {', '.join(known)}")
    wanted = {*names} or {*known}
    if wanted & {"identity", "cost", "stock", "control", "against"}:
        wanted.add("ours")
    if wanted & {"control", "against"}:
        wanted.add("stock")
    if "against" in wanted:
        wanted.add("cost")
    return [part for part in PARTS if part.name in wanted]


def examine(visit: Visit, parts: Sequence[Part], begun: Callable[[Part], None] = lambda _part: None) -> str:
    """Run the parts in their order into ``visit.findings``; return why it ended early, or an empty text.

    Ctrl-C and the end of the budget leave what was found, and say of every other part that it was not checked.
    """
    ended = ""
    try:
        for part in parts:
            if not ended and visit.budget.left < part.seconds:
                ended = _spent(visit)
            finding = not_checked(ended) if ended else _run(visit, part)
            if finding.state is State.CUT and not ended:
                ended = _spent(visit) if visit.budget.spent else INTERRUPTED
                finding.said += f" ({ended})" if ended not in finding.said else ""
            finding.part = part.name
            visit.findings.append(finding)
            begun(part)
    finally:
        visit.close()
    return ended


def _spent(visit: Visit) -> str:
    return f"the budget of {visit.budget.seconds:g} s is spent"


def _run(visit: Visit, part: Part) -> Finding:
    start = time.monotonic()
    try:
        finding = part.call(visit)
    except KeyboardInterrupt:
        finding = Finding(State.CUT, "begun, nothing was seen yet")
    except Exception as error:  # whatever a foreign machine comes up with is part of the report
        finding = not_checked(f"could not be: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finding.seconds = time.monotonic() - start
    return finding
