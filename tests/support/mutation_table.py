"""Say what a mutation run (`make mutants`) killed, file by file, and show what survived.

::

    python tests/support/mutation_table.py                 the table; exit status 1 where less than 85% of a room were killed
    python tests/support/mutation_table.py gate/audit      and each survivor of these files as a diff
"""

from __future__ import annotations

import ast
import difflib
import json
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

FOLDER = Path("mutants/sglang_margingate")
GOAL = 0.85
KILLED, SURVIVED, NO_TEST, TIMEOUT = "killed", "survived", "no test", "time"
VERDICTS = {0: SURVIVED, 5: NO_TEST, 33: NO_TEST, 24: TIMEOUT, -24: TIMEOUT, 36: TIMEOUT, 152: TIMEOUT, 255: TIMEOUT}
"""mutmut's exit status of a mutant's tests; any other is a kill: a mutant that ends its process is found as well."""

UNTRIED = (None, 2, -9)
"""Not reached; interrupted; the machine ran out of memory."""


def verdicts(file: Path) -> dict[str, str]:
    """Return the verdict on each mutant of a file that was tried."""
    found = json.loads(file.read_text())["exit_code_by_key"]
    return {name: VERDICTS.get(code, KILLED) for name, code in found.items() if code not in UNTRIED}


def functions(file: Path) -> dict[str, str]:
    """Return the text of all functions of a mutated file: the original of each, and its mutants."""
    text = file.read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = text.splitlines()
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


def show(file: Path) -> None:
    """Print each survivor of a file: its lines, and what became of them."""
    texts = functions(file.with_suffix(""))
    for name, verdict in verdicts(file).items():
        if verdict not in (SURVIVED, NO_TEST):
            continue
        mutant = name.rpartition(".")[2]
        original = texts.get(mutant.rpartition("__mutmut_")[0] + "__mutmut_orig", "")
        changed = difflib.unified_diff(
            original.splitlines()[1:], texts.get(mutant, "").splitlines()[1:], lineterm="", n=0
        )
        print(f"\n{file.parent.name}/{file.name.removesuffix('.py.meta')} {mutant} ({verdict})")
        print("\n".join(f"    {line}" for line in changed if line[:1] in "+-" and line[:3] not in ("+++", "---")))


def main(wanted: list[str]) -> int:
    """Print the table, and the survivors of the files that are asked for; return the exit status."""
    rooms: dict[str, Counter[str]] = {}
    print(f"{'file':24}{'mutants':>9}{'killed':>9}{'share':>8}")
    for file in sorted(FOLDER.glob("*/*.py.meta")):
        count = Counter(verdicts(file).values())
        if count:
            line(f"{file.parent.name}/{file.name.removesuffix('.py.meta')}", count)
            rooms.setdefault(file.parent.name, Counter()).update(count)
    for room, count in rooms.items():
        line(room, count)
    for file in sorted(FOLDER.glob("*/*.py.meta")):
        if any(fnmatch(f"{file.parent.name}/{file.name.removesuffix('.py.meta')}", pattern) for pattern in wanted):
            show(file)
    return int(not rooms or any(share(count) < GOAL for count in rooms.values()))


def share(count: Counter[str]) -> float:
    """Return the share of mutants that some test notices."""
    return (count[KILLED] + count[TIMEOUT]) / count.total()


def line(name: str, count: Counter[str]) -> None:
    """Print one line of the table."""
    print(f"{name:24}{count.total():9,}{count[KILLED] + count[TIMEOUT]:9,}{share(count):8.1%}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
