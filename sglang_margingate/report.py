"""``python -m sglang_margingate.report RUN -o report.html``: a run as one HTML file that opens from disk."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sglang_margingate.trace import TraceError, list_runs
from sglang_margingate.trace.reader import is_run

INSTALL = "pip install 'sglang-margingate[dashboard]'"


class ReportError(Exception):
    """The report cannot be made; one line with the reason and the fix."""


def write_report(
    run: str | os.PathLike[str], out: str | os.PathLike[str], other: str | os.PathLike[str] | None = None
) -> Path:
    """Write the report of a run, or of two, or of a folder of runs; a file appears whole or not at all.

    Parameters
    ----------
    run
        The run's folder, ``traces/<run>``; or the folder of runs, of which each gets a file beside an ``index.html``.
    out
        The HTML file to write; for a folder of runs the folder.
    other
        A second run, to compare with the first.

    Returns
    -------
    Path
        The file, or the ``index.html``.

    Raises
    ------
    TraceError
        The run cannot be read.
    ReportError
        Plotly or the dashboard package is missing, or the file cannot be written.
    """
    if find_spec("plotly") is None:
        raise ReportError(f"plotly is not installed; run {INSTALL}")
    if find_spec("margingate_dashboard") is None:
        beside = Path(__file__).resolve().parents[1] / "dashboard"
        if not (beside / "margingate_dashboard").is_dir():
            raise ReportError(f"the package margingate_dashboard is not installed; run {INSTALL}")
        sys.path.append(str(beside))  # a source tree that was not installed
    from margingate_dashboard.report.bundle import pages
    from margingate_dashboard.report.page import report_html
    from margingate_dashboard.report.pair import pair_html

    if other is not None:
        return _write(Path(out), pair_html(Path(run), Path(other)))
    infos = list_runs(run) if not is_run(run) else []
    if not infos:
        return _write(Path(out), report_html(Path(run)))
    if Path(out).suffix:
        raise ReportError(f"{run} is a folder of {len(infos)} runs: name a folder with -o, not {out}")
    for name, text in pages(infos):
        target = _write(Path(out) / name, text)
    return target


def _write(target: Path, text: str) -> Path:
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise ReportError(f"cannot write {target}: {error.strerror or error}; choose another file with -o") from None
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="margingate report", description="A run as one HTML file that opens from disk."
    )
    parser.add_argument("run", type=Path, help="folder of the run, traces/<run>, or of runs")
    parser.add_argument("other", type=Path, nargs="?", help="a second run, to compare with the first")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)"
    )
    args = parser.parse_args(argv)
    try:
        target = write_report(args.run, args.out, args.other)
    except (ReportError, TraceError) as error:
        print(f"margingate report: {error}", file=sys.stderr)
        return 2
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
