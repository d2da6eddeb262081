"""What can go wrong with a trace, as one-line messages that name the path, the reason and the fix."""

from __future__ import annotations

import pyarrow as pa

BAD_FILE = (OSError, pa.ArrowException, EOFError)
"""What pyarrow raises for a truncated or garbled file."""


class TraceError(Exception):
    """A trace folder cannot be written, or a path is not a readable run."""


class SchemaVersionError(TraceError):
    """The run was written by a newer, incompatible schema (its major number is above ours)."""
