"""``margingate calibrate``: thresholds for a model, server and datasets, and the profile that binds them together."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_margingate.bench import options

if TYPE_CHECKING:
    from sglang_margingate.bench.calibrate.binding import Binding
    from sglang_margingate.bench.calibrate.passes import Calibrator, Goal
    from sglang_margingate.bench.servers.client import Client, Prompt

EPILOG = """\
The server verifies every step for the record (--margingate-policy gate --margingate-fast-path stock
--margingate-audit-rate 1.0; a server that is started gets these flags). The first pass runs at the server's threshold,
the next ones at the chosen threshold, so the final numbers are measured, not extrapolated. Samples are kept beside the
profile: Ctrl-C loses nothing, the same command goes on.

A dataset needs {floor.steps:,} verified steps with {floor.flips} flips, or {floor.steps_alone:,} steps: below that no
threshold is taken from it, and the default stands.

exit status: 0 every target met and confirmed; 1 not, or a sample too small; 2 wrong input or no server.
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from sglang_margingate.gate.profile import EVIDENCE_FLOOR

    p.epilog = EPILOG.format(floor=EVIDENCE_FLOOR)
    options.add_server(p)
    options.add_prompts(p, "arith,code,story", 100)
    add = p.add_argument_group("calibration").add_argument
    add(
        "--transfer",
        type=options.names,
        default=[],
        metavar="NAME[,NAME]",
        help="datasets that only try out the resulting threshold",
    )
    add(
        "--target-miss",
        type=options.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="missed flips per step to be shown at --confidence (0: none in the sample)",
    )
    add("--confidence", type=options.number(0.5, 0.9999), default=0.95, metavar="P", help="(%(default)g)")
    add("--tail", action="store_true", help="take the tail fit's threshold where it is larger")
    add(
        "--start-threshold",
        type=options.number(0),
        default=None,
        metavar="LOGITS",
        help="threshold of the first pass (the server's)",
    )
    add("--no-refine", action="store_true", help="one pass only: the result is approximate")
    add(
        "--concurrency",
        type=_levels,
        default=(1, 4, 16),
        metavar="N[,N]",
        help="levels of requests in flight; prompts are dealt over them (1,4,16)",
    )
    add(options.SAMPLED, action="store_true",
        help="ask each prompt with a seed and sampling parameters as well: the threshold covers greedy and sampled traffic")  # fmt: skip
    add("--seed", type=int, default=0, help="order of prompts, and random prompts (%(default)s)")
    add = p.add_argument_group("output").add_argument
    add(
        "-o",
        "--out",
        type=Path,
        default=Path("margingate-profile.json"),
        metavar="FILE",
        help="the profile for --margingate-profile (%(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write passes, fits and conclusions as JSON")
    add("--fresh", action="store_true", help="measure again what is already there")


def _levels(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(options.whole(1)(word) for word in options.names(text))) or (1,)


def run(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Calibrate, print the evidence, write the profile; return the exit status."""
    from sglang_margingate.bench.calibrate.binding import read_binding
    from sglang_margingate.bench.calibrate.passes import SERVER_FLAGS, Goal, NeedsServer, check_server
    from sglang_margingate.bench.console import make_console
    from sglang_margingate.bench.prompts.chosen import prompts_of
    from sglang_margingate.bench.servers.client import Client, ServerError

    both = sorted(set(args.dataset) & set(args.transfer))
    if both:
        raise options.UsageError(f"--transfer: {both[0]} is in --dataset too; a dataset cannot test its own threshold")
    goal = Goal(
        args.target_miss,
        args.confidence,
        args.tail,
        not args.no_refine,
        args.max_tokens,
        args.concurrency,
        args.seed,
    )
    calibrated = list(args.dataset)
    args.dataset = [*calibrated, *args.transfer]
    plain = prompts_of(args)
    calibrated += [d for d in dict.fromkeys(p.dataset for p in plain) if d not in args.dataset]
    console = make_console()
    complete = offline(args, plain, goal)
    if complete is not None:
        with suppress(NeedsServer):
            calibrator, binding, start = complete
            _passes(args, calibrator, console, calibrated, start)
            console.print(f"everything is in {calibrator.store.path}; no server was started (--fresh measures again)")
            return _finish(args, calibrator, binding)
    with options.server(args, console, [*SERVER_FLAGS]) as client:
        if not isinstance(client, Client):
            raise ServerError(f"{client.base_url} is no margingate server; calibration needs one")
        status = check_server(client)
        binding = read_binding(client, status)
        fingerprint = str((status.get("fingerprint") or {}).get("system_fingerprint") or "")
        calibrator, store = _prepare(args, client, plain, goal, binding, status)
        start = _start(args, float(status["threshold"]))
        if store.resumed:
            console.print(f"going on with {store.resumed:,} prompts from {store.path} (--fresh measures again)")
        try:
            _passes(args, calibrator, console, calibrated, start)
        except (KeyboardInterrupt, ServerError):
            kept = sum(len(rows) for rows in store.rows.values())
            console.print(f"kept {kept:,} measured prompts in {store.path}; the same command goes on from there")
            raise
    return _finish(args, calibrator, binding, fingerprint)


def _start(args: argparse.Namespace, threshold: float) -> float:
    return threshold if args.start_threshold is None else args.start_threshold


def _samples(args: argparse.Namespace) -> Path:
    return args.out.with_name(args.out.name + ".samples.jsonl")


def _prepare(
    args: argparse.Namespace, client: Client, plain: list[Prompt], goal: Goal, binding: Binding, status: dict[str, Any]
) -> tuple[Calibrator, Any]:
    from sglang_margingate.bench.calibrate.passes import Calibrator
    from sglang_margingate.bench.calibrate.samples import SampleStore
    from sglang_margingate.bench.prompts.chosen import rendered
    from sglang_margingate.bench.prompts.random_ids import digest
    from sglang_margingate.bench.servers.openai_client import served_model

    prompts, template = rendered(args, plain, served_model(client), client)
    prompts += also_drawn(args, prompts)
    bound = {
        **binding._asdict(),
        "verify_rows": status.get("verify_rows"),
        "chunk": status.get("chunk"),
        "template": template,
        "max_tokens": goal.max_tokens,
        "concurrency": list(goal.levels),
        "sampled": args.sampled,
        # The same names with another seed or vocabulary are other prompts.
        "random_ids": digest(prompts) if any(p.ids for p in prompts) else None,
    }
    also = {"command": offline_key(args, plain), "threshold": status["threshold"]}
    store = SampleStore(_samples(args), bound, also=also)
    store.open(args.fresh)
    return Calibrator(client, prompts, goal, store), store


def also_drawn(args: argparse.Namespace, prompts: list[Prompt]) -> list[Prompt]:
    """Return the same prompts with seeds, under names of their own, where ``--sampled`` asks for them."""
    from sglang_margingate.bench.prompts.chosen import drawn

    if not args.sampled:
        return []
    return [replace(p, id=f"{p.id}+seed") for p in drawn(args, prompts)]


def offline_key(args: argparse.Namespace, plain: list[Prompt]) -> dict[str, Any]:
    """Return what a started server and its prompts depend on: equal keys, equal samples.

    A model or a machine that changed under the same flags is not seen; ``--fresh`` measures again.
    """
    from sglang_margingate.bench.prompts.random_ids import digest
    from sglang_margingate.machine import versions

    return {
        "flags": list(args.server_flags),
        "versions": versions(),
        "prompts": digest(sorted(plain, key=lambda p: (p.dataset, p.id))),
        "template": [args.no_template, args.tokenizer, args.vocab, args.seed],
        "sampled": args.sampled,
    }


def offline(args: argparse.Namespace, plain: list[Prompt], goal: Goal) -> tuple[Calibrator, Binding, float] | None:
    """Return a calibrator that has every sample on disk, as far as the file's first line tells; else None."""
    from sglang_margingate.bench.calibrate.binding import Binding
    from sglang_margingate.bench.calibrate.passes import Calibrator, NoServer
    from sglang_margingate.bench.calibrate.samples import SampleStore, read_header

    if args.base_url or args.fresh:
        return None
    header = read_header(_samples(args))
    also = header.pop("also", None) or {}
    here = {"max_tokens": goal.max_tokens, "concurrency": list(goal.levels)}
    if also.get("command") != offline_key(args, plain) or any(header.get(k) != v for k, v in here.items()):
        return None
    header.pop("schema")
    store = SampleStore(_samples(args), header, also=also)
    store.open()
    binding = Binding(*(header[name] for name in Binding._fields))
    prompts = [*plain, *also_drawn(args, plain)]
    return Calibrator(NoServer(), prompts, goal, store), binding, _start(args, float(also["threshold"]))


def _passes(
    args: argparse.Namespace, calibrator: Calibrator, console: Any, calibrated: list[str], start: float
) -> None:
    from sglang_margingate.bench.calibrate.report import largest_threshold
    from sglang_margingate.bench.console import bar

    with bar(console) as progress:
        task = progress.add_task("calibrate", total=None)
        calibrator.tell = lambda label, total: progress.reset(task, description=label, total=total)
        calibrator.done = lambda: progress.advance(task)
        calibrator.run(calibrated, start)
        if args.transfer:
            calibrator.carry(args.transfer, largest_threshold(calibrator.results))


def _finish(args: argparse.Namespace, calibrator: Calibrator, binding: Binding, fingerprint: str = "") -> int:
    from sglang_margingate.bench.calibrate import report

    results = calibrator.results
    print(f"{binding.model}, {binding.dtype}, {binding.attention_backend}, {binding.device}, repair {binding.repair}, ")
    print(f"SGLang {binding.sglang_version}, torch {binding.torch_version}; margins and thresholds in logits\n")
    print(report.passes_table(results))
    levels = (
        f"{level}: {rate.numerator:,}/{rate.denominator:,}" for level, rate in calibrator.flips_by_level().items()
    )
    print(f"flips of steps in the last passes, by requests in flight: {', '.join(levels)}")
    print(f"\n{report.conclusions(results)}\n")
    if len(results) > 1:
        print(f"{report.transfer_table(calibrator)}\n")
        print("(rows of another dataset are approximate: its steps were recorded at its own threshold)")
    profile = replace(report.build_profile(binding, results), system_fingerprint=fingerprint)
    options.write(args.out, json.dumps(profile.to_dict(), indent=2) + "\n")
    if args.json:
        options.write(args.json, json.dumps(report.to_dict(calibrator, binding), indent=2, default=str) + "\n")
    print(
        f"default threshold {profile.default_threshold:g}, of traffic that names none of these datasets\n"
        + (
            f"profile: {args.out}; to use it: margingate serve --margingate-profile {args.out}"
            if profile.backed_default is not None
            else f"profile: {args.out}, which changes nothing: no sample was large enough"
        )
    )
    own = [r for r in results.values() if not r.transferred]
    good = all(r.enough and r.last.calibration.met and (r.confirmed or args.no_refine) for r in own)
    return 0 if good else 1
