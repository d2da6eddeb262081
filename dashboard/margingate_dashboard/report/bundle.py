"""A folder of runs as a folder of HTML files, for a web server that serves files, or for none."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from urllib.parse import quote

import pandas as pd

from margingate_dashboard.facts import notes, runlist
from margingate_dashboard.report import parts
from margingate_dashboard.report.page import document, report_html
from sglang_margingate.trace import RunInfo, TraceError
from sglang_margingate.trace.reader import request_table


def pages(infos: Sequence[RunInfo]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each file; the index comes last, and names what could not be read."""
    rows = []
    for info in infos:
        row: dict[str, object] = {
            "run": info.name,
            "state": info.state,
            "requests": info.request_rows,
            "steps": info.step_rows,
        }
        try:
            counts = runlist.count_together({info.path: request_table(info.path, runlist.COLUMNS)})[info.path]
            text = report_html(info.path)
        except TraceError as error:
            rows.append({**row, "datasets": str(error)[:120]})
            continue
        yield f"{info.name}.html", text
        names = (
            "policies",
            "rates of",
            "datasets",
            "decode steps",
            "trigger rate",
            "flips",
            "missed (95% bound)",
            "overhead",
        )
        rows.append({**row, **{n: counts[n] for n in names}, "note": notes.read_note(info.path).text})
    yield "index.html", document("MarginGate runs", _index(pd.DataFrame(rows)))


def _index(frame: pd.DataFrame) -> list[str]:
    readable = frame["datasets"].notna() & frame.get("policies", pd.Series(index=frame.index, dtype=object)).notna()
    names = [
        f'<li><a href="{html.escape(quote(str(n)), quote=True)}.html">{html.escape(str(n))}</a></li>'
        for n in frame["run"][readable]
    ]
    return ["<h1>Runs</h1>", parts.table(frame), f"<h2>Reports</h2><ul>{''.join(names)}</ul>"]
