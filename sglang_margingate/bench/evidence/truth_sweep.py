"""Does a label ever say too much? Many requests of mixed kinds at once, then each repeatable one (greedy, or with a seed) again alone.

``margingate evidence truth-sweep --mode canonical --requests 500 --json FILE``

A server is started for each part (``mixed``: a wide pool; ``pool``: one so small that requests are retracted; ``retract``:
SGLang's own test of retractions, among all kinds), or ``--base-url`` names a running one. An answer labelled structural or
verified that differs from its run alone is a lie, and ends the sweep with exit status 1; so does a summary or a trace
that does not fit what was seen. ``--knob NAME=VALUE`` breaks the server on purpose: then no label may be above `none`.
``--mode log`` is the inverse: without a gate some answers must differ, or the sweep could not have found a lie.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.evidence.truth_checks import (
    ABOVE_NONE,
    STRICT,
    Finding,
    Problems,
    check_answers,
    check_traces,
    compare,
)
from sglang_margingate.bench.evidence.truth_client import Answer, SweepError, asker, run_alone, run_chains
from sglang_margingate.bench.evidence.truth_plan import Chain, EmbeddedWords, Planner

MODES: dict[str, tuple[str, ...]] = {
    "gate": ("--margingate-policy", "gate", "--margingate-fast-path", "stock"),
    "canonical": ("--margingate-policy", "gate", "--margingate-fast-path", "canonical"),
    "always": ("--margingate-policy", "always", "--margingate-fast-path", "stock"),
    "log": ("--margingate-policy", "log"),
}


class Part(NamedTuple):
    """One server of the sweep, and what is asked of it."""

    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}  # noqa: RUF012 (read only)
    without: tuple[str, ...] = ()
    share: float = 1.0
    """Of the requests asked for."""
    retracts: bool = False
    shared: tuple[int, ...] = (0, 3, 6)
    """Numbers of examples before prompts."""


PARTS: dict[str, Part] = {
    "mixed": Part(),
    "pool": Part(  # sessions and long prompts would not fit
        ("--max-total-tokens", "900", "--schedule-conservativeness", "0.01"),
        without=("scoring", "session", "client-key", "prefill-only"),
        share=0.2,
        retracts=True,
        shared=(0,),
    ),
    "retract": Part(env={"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"}, share=0.3, retracts=True),
}

SHOWN = 12
"""Differences that are printed; all of them are in the JSON file."""


@dataclass
class Result:
    """What one part found."""

    part: str
    policy: str
    answers: list[Answer] = field(repr=False)
    findings: list[Finding]
    problems: Problems
    largest: int
    """Most rows of a decode step while the requests ran together: the server's count."""
    largest_alone: int
    retracted: int
    cached: int
    """Answers that used columns of the prefix cache."""
    seconds: float
    traced: int = 0

    @property
    def lies(self) -> list[Finding]:
        """Differences under a label that allows none, the smallest first."""
        return self.differing(STRICT)

    def differing(self, labels: Sequence[str]) -> list[Finding]:
        """Return the differences under these labels, the smallest first."""
        return sorted((f for f in self.findings if f.label in labels and f.same is False), key=lambda f: f.size)

    def above_none(self) -> Counter[str]:
        """Return how many answers have a label better than none."""
        return Counter(f.label for f in self.findings if f.label in ABOVE_NONE)

    def table(self) -> list[str]:
        """Return identical answers of all compared ones, by kind and label."""
        labels = sorted({f.label for f in self.findings})
        kinds = sorted({f.kind for f in self.findings})
        lines = ["| kind | " + " | ".join(labels) + " |", "| --- " * (len(labels) + 1) + "|"]
        for kind in [*kinds, "all"]:
            cells = [_share([f for f in self.findings if f.label == x and kind in (f.kind, "all")]) for x in labels]
            lines.append(f"| {kind} | " + " | ".join(cells) + " |")
        return lines

    def verdict(self, broken: bool = False) -> list[str]:
        """Return why the part failed; nothing where it passed.

        ``broken`` servers, and those of a policy without a gate, may label nothing above none.
        """
        out = (
            [f"{len(self.lies)} answers labelled {' or '.join(STRICT)} differ from their runs alone"]
            if self.lies
            else []
        )
        if (broken or self.policy in ("off", "log")) and (above := self.above_none()):
            said = ", ".join(f"{n} {label}" for label, n in above.items())
            out.append(f"a server that is broken on purpose or has no gate labels answers above none: {said}")
        if self.policy == "log" and not self.differing(("none",)):
            out.append("without a gate nothing differs: this sweep could not find a lie")
        if len(self.problems):
            out.append(f"{len(self.problems)} times a summary or trace does not fit what was seen")
        if self.largest < 2:
            out.append("no batch formed")
        if self.largest_alone > 1:
            out.append(f"the runs alone were not alone: {self.largest_alone} rows")
        if PARTS[self.part].retracts and not self.retracted:
            out.append("no request was retracted")
        return out

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        compared = [f for f in self.findings if f.same is not None]
        by_label = {x: _share([f for f in compared if f.label == x]) for x in sorted({f.label for f in compared})}
        return {
            "part": self.part, "policy": self.policy, "identical": by_label, "table": self.table(),
            "differences": [asdict(f) for f in self.findings if f.same is False], "problems": self.problems.lines(),
            "statuses": dict(Counter(str(a.status) for a in self.answers)), "largest_batch": self.largest,
            "largest_batch_alone": self.largest_alone, "retracted": self.retracted, "cached": self.cached,
            "traced": self.traced, "seconds": round(self.seconds, 1),
        }  # fmt: skip


def _share(findings: Sequence[Finding]) -> str:
    compared = [f for f in findings if f.same is not None]
    rest = len(findings) - len(compared)
    shown = f"{sum(bool(f.same) for f in compared)}/{len(compared)}" if compared else ""
    return " ".join(filter(None, (shown, f"({rest} not compared)" if rest else ""))) or "-"


async def sweep(
    base_url: str, part: str, chains: Sequence[Chain], concurrency: int, say: Callable[[str], None] = print
) -> Result:
    """Ask everything at once, then alone, and compare.

    Parameters
    ----------
    base_url
        A running server of ours.
    part
        Its name in :data:`PARTS`.
    chains
        The plan.
    concurrency
        Chains in flight.
    say
        Gets a line now and then.
    """
    began = time.monotonic()
    async with asker(base_url) as to:
        await to.flush()
        policy, before = (await to.status())["policy"], await to.steps_by_rows()
        answers = await run_chains(to, chains, concurrency)
        await to.flush()
        middle = await to.steps_by_rows()
        say(f"{part}: {len(answers)} requests answered after {time.monotonic() - began:.0f} s; now each alone")
        references = await run_alone(to, answers)
        after = await to.steps_by_rows()
    problems = Problems()
    check_answers(answers, problems)
    summaries = [r.summary for a in answers for r in a.replies if r.summary]
    return Result(
        part, policy, answers, compare(answers, references), problems, max(middle - before, default=0),
        max(after - middle, default=0), sum(bool(s.get("retractions")) for s in summaries),
        sum(bool(s.get("cached_tokens")) for s in summaries), time.monotonic() - began,
    )  # fmt: skip


def plan_for(part: str, mode: str, requests: int, seed: int, without: Sequence[str] = ()) -> list[Chain]:
    """Return the embedded model's plan for one part."""
    p = PARTS[part]
    planner = Planner(EmbeddedWords(p.shared), seed, gates=mode != "log", without=(*without, *p.without))
    return planner.plan(max(1, round(requests * p.share)))


def read_trace(result: Result, folder: Path) -> None:
    """Check the rows of the run that a stopped server left in ``folder``."""
    from sglang_margingate.trace import list_runs, read_run

    runs = list_runs(folder)
    if len(runs) != 1:
        result.problems.add(str(folder), f"{len(runs)} runs in the trace folder of one server")
        return
    run = read_run(runs[0].path)
    result.traced = check_traces(result.answers, run.steps, run.requests, result.problems)


def report(result: Result, say: Callable[[str], None] = print) -> None:
    """Print one part."""
    say(f"\n## {result.part}, policy {result.policy}: {len(result.answers)} requests in {result.seconds:.0f} s")
    say(
        f"largest batch {result.largest}, alone {result.largest_alone}; {result.retracted} answers retracted, "
        f"{result.cached} used the prefix cache; {result.traced} checked against the trace"
    )
    for line in result.table():
        say(line)
    for title, labels in (("labelled above none", ABOVE_NONE), ("labelled none (nothing claimed)", ("none",))):
        found = result.differing(labels)
        if found:
            say(f"{len(found)} answers {title} differ; the smallest:")
        for finding in found[: SHOWN if labels is ABOVE_NONE else 2]:
            say(f"  {finding.describe()}")
    for line in result.problems.lines()[:SHOWN]:
        say(f"does not fit, {line}")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = p.add_argument
    add(
        "--base-url",
        metavar="URL",
        help="a running server of the embedded model (without it one is started for each part)",
    )
    add("--mode", choices=MODES, default="gate", help="of started servers (%(default)s)")
    add("--parts", default="mixed,pool,retract", help=f"of {', '.join(PARTS)} (%(default)s); with --base-url one name")
    add("--requests", type=int, default=500, metavar="N", help="of the part mixed; others ask a share (%(default)s)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests in flight (%(default)s)")
    add("--seed", type=int, default=0, help="of the plan (%(default)s)")
    add("--without", action="append", default=[], metavar="KIND", help="leave out a kind of request; may be repeated")
    add("--knob", action="append", default=[], metavar="NAME=VALUE", help="a fault of started servers; may be repeated")
    add("--trace-dir", type=Path, metavar="DIR", help="keep the traces of started servers (a temporary folder)")
    add("--json", type=Path, metavar="FILE", help="everything that was found")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the sweep; 0 where no label lied."""
    parts = [name.strip() for name in args.parts.split(",") if name.strip()]
    if unknown := [p for p in parts if p not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is unknown; use {', '.join(PARTS)}")
    if bad := [k for k in args.knob if "=" not in k]:
        parser.error(f"--knob: {bad[0]!r} is not NAME=VALUE")
    if args.base_url and (args.knob or args.server_flags or len(parts) > 1):
        parser.error(
            "--base-url names a running server: --knob and flags after -- are of started ones, and --parts is one name"
        )
    results, failed = [], []
    for part in parts:
        found = _running(args, part) if args.base_url else _started(args, part)
        if found is None:
            print(f"{part}: the broken server refused to start")
            continue
        report(found)
        results.append(found)
        failed += [f"{part}: {why}" for why in found.verdict(broken=bool(args.knob))]
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        document = {"command": sys.argv[1:], "failed": failed, "parts": [r.to_dict() for r in results]}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join([f"FAILED: {why}" for why in failed] or ["no label said too much"]))
    return 1 if failed else 0


def _running(args: argparse.Namespace, part: str) -> Result:
    chains = plan_for(part, args.mode, args.requests, args.seed, args.without)
    return asyncio.run(sweep(args.base_url, part, chains, args.concurrency))


def _started(args: argparse.Namespace, part: str) -> Result | None:
    """Start the part's server, sweep it, stop it and read its trace; None where a broken one refuses to start."""
    knobs = dict(knob.split("=", 1) for knob in args.knob)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="margingate-truth-")))
        if args.trace_dir is not None:
            folder = args.trace_dir / part
            folder.mkdir(parents=True, exist_ok=True)
        return sweep_started(folder, part, args.mode, args.requests, args.seed, args.concurrency, knobs,
                             args.server_flags, args.without)  # fmt: skip


def sweep_started(
    folder: Path,
    part: str,
    mode: str,
    requests: int,
    seed: int = 0,
    concurrency: int = 16,
    knobs: dict[str, str] | None = None,
    flags: Sequence[str] = (),
    without: Sequence[str] = (),
) -> Result | None:
    """Sweep a server of its own, with log and traces in ``folder``; None where a broken one refuses to start."""
    from sglang_margingate.bench.servers.client import ServerError
    from sglang_margingate.bench.servers.process import serve

    every = [*MODES[mode], *PARTS[part].flags, "--margingate-trace-dir", str(folder / "traces"), *flags]
    env = {**PARTS[part].env, **(knobs or {})}
    context = serve(every, log=folder / "server.log", env=env)
    try:
        server = context.__enter__()
    except ServerError:
        if knobs:
            return None
        raise
    with ExitStack() as stack:
        stack.push(context.__exit__)
        result = asyncio.run(sweep(server.base_url, part, plan_for(part, mode, requests, seed, without), concurrency))
    read_trace(result, folder / "traces")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run as a module: ``python -m``."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="margingate evidence truth-sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(words[:cut])
    args.server_flags = words[cut + 1 :]
    try:
        return run(args, parser)
    except SweepError as error:
        print(f"truth sweep: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
