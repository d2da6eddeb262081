"""``margingate runs``, ``report`` and ``export``: what was recorded, and recorded runs for others."""

from __future__ import annotations

import argparse
from pathlib import Path

from sglang_margingate.bench.options import UsageError


def add_runs(p: argparse.ArgumentParser) -> None:
    """Add the options of ``runs``."""
    p.add_argument("trace_dir", nargs="?", default="traces", metavar="DIR", help="folder of runs (%(default)s)")


def runs(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """List the recorded runs, newest first."""
    from sglang_margingate.trace import list_runs

    if not Path(args.trace_dir).is_dir():
        raise UsageError(f"{args.trace_dir}: no such folder; a server writes runs where --margingate-trace-dir says")
    infos = list_runs(args.trace_dir)
    if not infos:
        print(f"no runs in {args.trace_dir}")
        return 0
    head = ("run", "model", "policy", "requests", "steps", "state")
    rows = [
        (
            info.name,
            str(info.manifest.get("model", "?")),
            str(info.manifest.get("policy", "?")),
            f"{info.request_rows:,}",
            f"{info.step_rows:,}",
            "live" if info.is_live else "closed" if info.manifest.get("closed_at") else "ended without closing",
        )
        for info in infos
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [c.rjust(w) if i in (3, 4) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
    return 0


def add_report(p: argparse.ArgumentParser) -> None:
    """Add the options of ``report``."""
    p.add_argument("run", type=Path, metavar="RUN", help="folder of one run, traces/<run>")
    p.add_argument("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="(%(default)s)")


def report(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Write one run as one HTML file."""
    from sglang_margingate.report import write_report

    write_report(args.run, args.out)
    print(args.out)
    return 0


def add_export(p: argparse.ArgumentParser) -> None:
    """Add the options of ``export``."""
    p.add_argument("run", type=Path, metavar="RUN", help="folder of one run, traces/<run>")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--csv", type=Path, metavar="DIR", help="write steps.csv and requests.csv")
    way.add_argument(
        "--chrome", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing"
    )


def export(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Write one run for other tools."""
    import sys

    from sglang_margingate.trace import export_chrome_trace, export_csv, read_run

    run = read_run(args.run)
    for warning in run.warnings:
        print(f"margingate: {warning}", file=sys.stderr)
    for path in export_csv(run, args.csv) if args.csv else [export_chrome_trace(run, args.chrome)]:
        print(path)
    return 0
