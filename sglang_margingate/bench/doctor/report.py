"""Doctor's report: Markdown to read and to attach to an issue, JSON for scripts, and the row of docs/works-on.md that it stands for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.doctor.findings import Conclusion, Finding, State
from sglang_margingate.bench.doctor.subject import Subject

SCHEMA = "margingate-doctor/1"


def to_dict(
    subject: Subject, findings: Sequence[Finding], end: Conclusion, titles: dict[str, str], command: str, seconds: float
) -> dict[str, Any]:
    """Return the whole report in plain types."""
    from sglang_margingate import __version__

    return {
        "schema": SCHEMA,
        "version": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "subject": {"name": subject.name, "weights_bytes": subject.weights, "random": subject.random},
        "seconds": round(seconds, 1),
        "conclusion": end.text,
        "exit_code": end.code,
        "parts": [
            {
                "part": f.part,
                "title": titles.get(f.part, ""),
                "state": f.state.value,
                "said": f.said,
                "seconds": round(f.seconds, 1),
                "tables": [
                    {"title": t.title, "head": list(t.head), "rows": [list(r) for r in t.rows]} for t in f.tables
                ],
                "details": f.details,
            }
            for f in findings
        ],
    }


def homeless(text: str) -> str:
    """Return a report without the home folder of whoever made it."""
    return text.replace(str(Path.home()), "~")


def to_markdown(document: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    subject = document["subject"]["name"]
    lines = [
        f"# margingate doctor: {subject}",
        "",
        f"**{document['conclusion']}.**",
        "",
        f"sglang-margingate {document['version']}, {document['made']}, {document['seconds']:.0f} s, "
        f"exit {document['exit_code']}: `{document['command']}`",
        "",
    ]
    rows = [[p["title"], p["state"], p["said"], f"{p['seconds']:.0f} s"] for p in document["parts"]]
    lines += [tables.markdown(["part", "state", "what was seen", "took"], rows, (0, 1, 2)), ""]
    for part in document["parts"]:
        for table in part["tables"]:
            lines += [f"## {table['title']}", "", *_shown(table), ""]
    for part in document["parts"]:
        if log := part["details"].get("log"):
            lines += [f"## The end of the log: {part['title']}", "", *(f"    {line}" for line in log), ""]
    lines += ["## For docs/works-on.md: model, precision, what was seen where", "", "    " + works_on(document), ""]
    return "\n".join(lines)


def _shown(table: dict[str, Any]) -> list[str]:
    if not table["head"]:
        return [f"    {line}".rstrip() for (line,) in table["rows"]]
    return [tables.markdown(table["head"], table["rows"], range(len(table["head"])))]


def works_on(document: dict[str, Any]) -> str:
    """Return the row that this report stands for: what was seen, where, when and by which command."""
    found = {part["part"]: part for part in document["parts"]}
    precision = _at(found, "ours", "details", "dtype") or "?"
    where = str(_at(found, "machine", "said") or "?").split(";")[0]
    if where == "no GPU":
        where = "CPU"
    identity = found.get("identity")
    holds = identity is not None and identity["state"] == State.HOLDS.value
    seen = identity["said"] if identity is not None and holds else "not shown"
    control = found.get("control")
    if control is not None and control["state"] == State.HOLDS.value:
        seen += f"; {control['said']}"
    weights = "random" if document["subject"]["random"] else "as given"
    return (
        f"| {document['subject']['name']} (weights {weights}) | {precision} | {where}: {seen}: {document['made'][:10]} "
        f"(`{document['command']}`) |"
    )


def _at(found: Any, *names: str) -> Any:
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found
