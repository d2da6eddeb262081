"""``margingate runs``, ``report`` and ``export``: what was recorded, and recorded runs for others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_margingate.bench.options import UsageError

if TYPE_CHECKING:
    from sglang_margingate.trace import RunInfo


def add_runs(p: argparse.ArgumentParser) -> None:
    """Add the options of ``runs``."""
    p.add_argument(
        "words",
        nargs="*",
        metavar="[compact | import FILE] [DIR]",
        help="folder of runs to list (traces); `compact` first merges the small files of runs that nobody writes any more; "
        "`import FILE` makes a run of another engine's answers, one JSON object a line (docs/guide.md)",
    )
    p.add_argument("--compact", action="store_true", help="as the word compact")
    p.add_argument("--model", help="with import: the model's name, where the file does not say")


def runs(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """List the recorded runs, newest first, and what is wrong with any of them."""
    from sglang_margingate.bench import tables
    from sglang_margingate.trace import list_runs
    from sglang_margingate.trace.errors import brief

    words = list(args.words)
    action = words.pop(0) if words and words[0] in ("compact", "import") and not Path(words[0]).is_dir() else ""
    file = words.pop(0) if action == "import" and words else None
    if action == "import" and file is None:
        raise UsageError("runs import: name the file of answers, one JSON object a line")
    if len(words) > 1:
        raise UsageError(f"runs: {words[1]!r} is one word too many; give one folder of runs")
    args.trace_dir, args.compact = (words[0] if words else "traces"), args.compact or action == "compact"
    if file is not None:
        from sglang_margingate.bench.foreign import import_run

        path, count = import_run(Path(file), Path(args.trace_dir), args.model)
        print(f"{path}: {count:,} requests")
        return 0
    if not Path(args.trace_dir).is_dir():
        raise UsageError(f"{args.trace_dir}: no such folder; a server writes runs where --margingate-trace-dir says")
    infos = list_runs(args.trace_dir)
    if args.compact:
        for info in infos:
            _compact(info)
        infos = list_runs(args.trace_dir)
    if not infos:
        print(f"no runs in {args.trace_dir}")
        return 0
    head = ("run", "model", "policy", "requests", "steps", "state")
    rows = [
        (
            _shown(info.name),
            _shown(info.manifest.get("model", "?")),
            _shown(info.manifest.get("policy", "?")),
            f"{info.request_rows:,}",
            f"{info.step_rows:,}",
            info.state,
        )
        for info in infos
    ]
    print(tables.text(head, rows, left=(0, 1, 2, 5)))
    for info in infos:
        for warning in info.warnings:
            print(f"margingate: {_shown(info.name)}: {_shown(brief(warning, info.path))}", file=sys.stderr)
    return 0


def _compact(info: RunInfo) -> None:
    """Merge a run's small files and say so; a run that cannot be merged is named and left as it is."""
    from sglang_margingate.trace import TraceError
    from sglang_margingate.trace.compact import compact

    if info.is_live or info.broken:
        return
    try:
        before, after = compact(info.path)
    except TraceError as error:
        print(f"margingate: {_shown(error)}", file=sys.stderr)
        return
    if after < before:
        print(f"{_shown(info.name)}: {before:,} files merged into {after:,}")


def _shown(text: object) -> str:
    """Return a text from a file or a folder's name as one line that no terminal obeys."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def add_report(p: argparse.ArgumentParser) -> None:
    """Add the options of ``report``."""
    p.add_argument("run", type=Path, metavar="RUN", help="folder of one run, traces/<run>; or of runs, with -o FOLDER")
    p.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="a second run, to compare with the first")
    p.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")


def report(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Write one run, or two compared, as one HTML file; or a folder of runs as a folder of them."""
    from sglang_margingate.report import write_report

    print(write_report(args.run, args.out, args.other))
    return 0


def add_export(p: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    p.add_argument("run", type=Path, metavar="RUN", help="folder of one run, traces/<run>")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--csv", type=Path, metavar="DIR", help="write steps.csv and requests.csv")
    way.add_argument(
        "--chrome", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )
    way.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="PATH",
        help="as --chrome where it ends in .json, else as --csv; the option that report has",
    )


def export(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Write one run for other tools."""
    from sglang_margingate.trace import export_chrome_trace, export_csv, read_run
    from sglang_margingate.trace.errors import brief

    if args.out is not None:
        way = "chrome" if args.out.suffix == ".json" else "csv"
        if way == "csv" and (args.out.suffix or args.out.is_file()):
            raise UsageError(f"-o {args.out}: name a folder for CSV, or a file that ends in .json for a Chrome trace")
        setattr(args, way, args.out)
    run = read_run(args.run)
    for warning in run.warnings:
        print(f"margingate: {args.run}: {_shown(brief(warning, args.run))}", file=sys.stderr)
    for path in export_csv(run, args.csv) if args.csv else [export_chrome_trace(run, args.chrome)]:
        print(path)
    return 0
