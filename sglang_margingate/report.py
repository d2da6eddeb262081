"""``python -m sglang_margingate.report RUN -o report.html``: a run as one HTML file that opens from disk."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from sglang_margingate.trace import TraceError

INSTALL = "pip install 'sglang-margingate[dashboard]'"


class ReportError(Exception):
    """The report cannot be made; one line with the reason and the fix."""


def write_report(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Write the report of a run and return its path; the file appears whole or not at all.

    Parameters
    ----------
    run
        The run's folder, ``traces/<run>``.
    out
        The HTML file to write.

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
    from margingate_dashboard.report_html import report_html

    text = report_html(Path(run))
    target = Path(out)
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
    parser.add_argument("run", type=Path, help="folder of the run, traces/<run>")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)"
    )
    args = parser.parse_args(argv)
    try:
        target = write_report(args.run, args.out)
    except (ReportError, TraceError) as error:
        print(f"margingate report: {error}", file=sys.stderr)
        return 2
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
