"""The kernels of the model's shape: against their references, and repeated under load; in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from sglang_margingate.bench.doctor.findings import Finding, State, Table, not_checked
from sglang_margingate.bench.doctor.visit import Visit

SHARE = 0.08
"""Part of the budget that repeating takes."""
NEEDS = "torch"

Rows = list[dict[str, Any]]


def compare(visit: Visit) -> Finding:
    """Run each kernel once and put it beside its reference."""
    if missing := _missing():
        return missing
    rows, error = _run(visit, 0)
    return compared(rows, error)


def repeat(visit: Visit) -> Finding:
    """Repeat each kernel alone and under load."""
    if missing := _missing():
        return missing
    rows, error = _run(visit, max(2.0, SHARE * visit.budget.seconds), ("repeat",))
    return repeated(rows, error)


def _missing() -> Finding | None:
    absent = [name for name in (NEEDS, "margingate_kernels") if find_spec(name) is None]
    return not_checked(f"{' and '.join(absent)} not installed") if absent else None


def _run(visit: Visit, seconds: float, wanted: Sequence[str] = ("compare", "left out")) -> tuple[Rows, str]:
    """Return the rows of the process, and its last words where it did not end well; Ctrl-C keeps the rows."""
    device = "cpu" if visit.cpu else "cuda"
    command = [sys.executable, "-m", "sglang_margingate.bench.kernels.run", "--device", device]
    command += ["--seconds", str(seconds), *(["--shape", shape] if (shape := visit.subject.kernels()) else [])]
    if seconds:
        command.append("--no-compare")
    rows: Rows = []
    visit.tell("kernels", None)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                row = json.loads(line)
                if row["what"] in wanted:
                    rows.append(row)
                visit.done()
            if process.wait():
                errors.seek(0)
                lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
                return rows, (lines or [f"exit {process.returncode}"])[-1][:300]
            return rows, ""
        except KeyboardInterrupt:
            return rows, "interrupted"
        finally:
            process.kill()
            process.wait()


def compared(rows: Rows, error: str) -> Finding:
    """Return what the comparisons say."""
    made = [r for r in rows if r["what"] == "compare"]
    wrong = [r["kernel"] for r in made if not r["holds"]]
    said = f"{len(made) - len(wrong)} of {len(made)} kernels give what their references give"
    if wrong:
        said += f"; not {', '.join(wrong)}"
    table = [(r["kernel"], _apart(r), "yes" if r["holds"] else "NO") for r in made]
    tables = [Table("Kernels against their references", ("kernel", "largest difference", "within its bound"), table)]
    left = [(r["kernel"], r["why"]) for r in rows if r["what"] == "left out"]
    if left:
        tables.append(Table("Kernels left out", ("kernel", "why"), [*left]))
    return _finding(made, bool(wrong), said, tables, rows, error)


def _apart(row: dict[str, Any]) -> str:
    """Say how far a kernel is from its reference."""
    if "error" in row:
        return str(row["error"])
    return "the same bits" if row["exact"] and row["holds"] else f"{row['largest_difference']:.2g}"


def repeated(rows: Rows, error: str) -> Finding:
    """Return what the repetitions say."""
    calls, differed = sum(r["calls"] for r in rows), sum(r["differed"] for r in rows)
    names, ways = list(dict.fromkeys(r["kernel"] for r in rows)), list(dict.fromkeys(r["how"] for r in rows))
    said = f"{differed} of {calls:,} results of {len(names)} kernels had other bits than the first ({', '.join(ways)})"
    counts = {(r["kernel"], r["how"]): f"{r['differed']} of {r['calls']:,}" for r in rows}
    table = [(name, *(counts.get((name, how), "-") for how in ways)) for name in names]
    tables = [Table("Results that differed from the first", ("kernel", *ways), table)]
    return _finding(rows, differed > 0, said, tables, rows, error)


def _finding(made: Rows, wrong: bool, said: str, tables: list[Table], rows: Rows, error: str) -> Finding:
    if not made:
        return not_checked(f"the kernels' process ended first: {error or 'it said nothing'}")
    state = State.FAILS if wrong else State.CUT if error == "interrupted" else State.FAILS if error else State.HOLDS
    if error and error != "interrupted":
        said += f"; then their process died: {error}"
    return Finding(state, said, tables, {"rows": rows, "error": error})
