"""``margingate doctor``: examine this machine with a model, and write one report to attach to an issue."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from sglang_margingate.bench import options

EPILOG = """\
Parts: machine, versions, kernels against their references, kernels repeated under load, our server (hooks, self-test, map),
identity alone against batches, the cost of a step, and stock SGLang as negative control and as what the cost is of. Without a
GPU, SGLang or PyTorch it says what it could check and what not; a flag after -- goes to both servers.
exit status: 0 all that was checked holds, and the control failed as it must; 1 something does not hold; 2 identity was not
shown; 130 interrupted by Ctrl-C. The report is written in every case.
"""
CPU_TOKENS, GPU_TOKENS = 64, 96


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    p.epilog = EPILOG
    add = p.add_argument_group("what is examined (without either the embedded model)").add_argument
    add("--model-path", metavar="PATH", help="a model folder or hub id")
    add("--shape", metavar="NAME", help="a named shape with random weights: "
        "llama-3.2-1b, deepseek-r1-distill-qwen-7b, llama-3.1-8b, qwen3-8b, qwen2.5-14b")  # fmt: skip
    add("--vocab", type=options.whole(2), metavar="N", help="token ids to draw prompts from (the model's config.json)")
    add(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="where a shape's weights are written for the time being (a temporary folder)",
    )
    add = p.add_argument_group("running servers, instead of starting them").add_argument
    add("--base-url", metavar="URL", help=f"a running server of ours; its API key comes from {options.API_KEY_ENV}")
    add("--control-url", metavar="URL", help="a running server of the same model that gates nothing")
    add = p.add_argument_group("how much").add_argument
    add(
        "--budget",
        type=options.number(5),
        default=600.0,
        metavar="S",
        help="seconds that it takes at most (%(default)g)",
    )
    add("--prompts", type=options.whole(3), default=24, metavar="N", help="prompts of the identity check (%(default)s)")
    add("--concurrency", type=options.whole(2), default=16, metavar="N", help="requests in flight (%(default)s)")
    add("--max-tokens", type=options.whole(1), default=96, metavar="N", help="tokens of each answer (%(default)s)")
    add("--parts", type=options.names, default=[], metavar="NAME[,NAME]", help="these parts only (all)")
    add = p.add_argument_group("output").add_argument
    add("-o", "--out", type=Path, default=Path("margingate-doctor.md"), metavar="FILE",
        help="the report, with the same in JSON beside it (%(default)s)")  # fmt: skip


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Examine, write the report, print its conclusion; return the exit status."""
    from sglang_margingate.bench.console import bar, make_console
    from sglang_margingate.bench.doctor import examination, report
    from sglang_margingate.bench.doctor.budget import Budget
    from sglang_margingate.bench.doctor.findings import conclude
    from sglang_margingate.bench.doctor.machine import gpus, uses_gpu
    from sglang_margingate.bench.doctor.subject import subject_of
    from sglang_margingate.bench.doctor.visit import Visit

    parts = examination.chosen(args.parts)
    if args.control_url and not args.base_url:
        raise options.UsageError(f"--control-url {args.control_url}: name the gated server, too, with --base-url")
    subject = subject_of(examination.model_of(args), args.shape)
    options.write(args.out, "")  # a folder that cannot be written to is found out before ten minutes have passed
    started = time.monotonic()
    with bar(make_console()) as progress, Budget(args.budget) as budget:
        whole = progress.add_task("doctor", total=len(parts))
        now = progress.add_task("", total=None)
        visit = Visit(args, subject, budget, gpus(), uses_gpu())

        def tell(what: str, total: float | None) -> None:
            progress.reset(now, description=what)
            next(task for task in progress.tasks if task.id == now).total = total

        visit.tell = tell
        visit.done = lambda: progress.advance(now)
        ended = examination.examine(visit, parts, lambda _part: progress.advance(whole))
    end = conclude(visit.findings, ended)
    words = " ".join(["margingate doctor", *options.given(args, parser, ("out",))])
    titles = {part.name: part.title for part in parts}
    document = report.to_dict(visit.subject, visit.findings, end, titles, words, time.monotonic() - started)
    options.write(args.out, report.homeless(report.to_markdown(document)))
    options.write(args.out.with_suffix(".json"), report.homeless(json.dumps(document, indent=1, default=str)) + "\n")
    for finding in visit.findings:
        print(f"{finding.state.value:15} {finding.part}: {finding.said}")
    print(f"\n{end.text}.\n{args.out} and {args.out.with_suffix('.json')}: attach both to an issue")
    return end.code
