"""What doctor found: a finding for each part, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple


class State(str, Enum):
    """How a part came out."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NOTED = "noted"
    """Something to know, neither right nor wrong."""
    CUT = "cut short"
    """Begun, and ended before it was through: what it says is what was seen until then."""
    NOT_CHECKED = "not checked"


class Table(NamedTuple):
    """Rows to show below the parts."""

    title: str
    head: tuple[str, ...]
    """Names of the columns; empty: the rows are lines of plain text."""
    rows: Sequence[tuple[object, ...]]


@dataclass
class Finding:
    """What one part found."""

    state: State
    said: str
    """One line."""
    tables: list[Table] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Everything, in plain types, for the JSON file."""
    part: str = ""
    seconds: float = 0.0


def not_checked(why: str) -> Finding:
    """Return the finding of a part that was not run."""
    return Finding(State.NOT_CHECKED, why)


class Part(NamedTuple):
    """One part of the examination."""

    name: str
    title: str
    """What it looks at, for the progress bar and the report."""
    call: Callable[[Any], Finding]
    seconds: float = 1.0
    """With less than this left of the budget it is not begun."""


PASS, FAIL, INVALID, INTERRUPTED = 0, 1, 2, 130


class Conclusion(NamedTuple):
    """What the findings say together, and the exit status."""

    code: int
    text: str


def conclude(findings: list[Finding], ended: str = "") -> Conclusion:
    """Return what the findings say together.

    Parameters
    ----------
    ended
        Why the examination ended before it was through; empty where it did not.
    """
    found = {finding.part: finding for finding in findings}
    broken = [finding for finding in findings if finding.state is State.FAILS]
    if broken:
        return Conclusion(FAIL, "Does not hold here: " + "; ".join(f"{f.part}: {f.said}" for f in broken))
    if ended:
        done = sum(f.state not in (State.NOT_CHECKED, State.CUT) for f in findings)
        return Conclusion(
            INTERRUPTED if ended == "interrupted" else INVALID,
            f"Not through ({ended}): {done} of {len(findings)} parts were; nothing that was seen is wrong",
        )
    identity, control = found.get("identity"), found.get("control")
    if identity is None:
        return Conclusion(PASS, "Nothing that was checked is wrong; identity was left out")
    if identity.state is not State.HOLDS:
        return Conclusion(INVALID, f"Nothing that was checked is wrong, but identity was not shown: {identity.said}")
    if control is None or control.state is not State.HOLDS:
        why = "it was left out" if control is None else control.said
        return Conclusion(INVALID, f"Identical, but the negative control did not show that it could fail: {why}")
    return Conclusion(PASS, f"Holds here: {identity.said}; {control.said}")
