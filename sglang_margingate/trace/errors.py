"""What can go wrong with a trace, as one-line messages that name the path, the reason and the fix."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

BAD_FILE = (OSError, pa.ArrowException, EOFError)
"""What pyarrow raises for a truncated or garbled file."""


def brief(warning: str, run: Path) -> str:
    """Return a run's warning without the run's folder in it: whoever shows it names the run beside it."""
    folder = str(run)
    return warning.replace(f"{folder}: ", "").replace(f"{folder}/", "").replace(f"{run.parent}/", "")


class TraceError(Exception):
    """A trace folder cannot be written, or a path is not a readable run."""


class SchemaVersionError(TraceError):
    """The run was written by a newer, incompatible schema (its major number is above ours)."""
