"""Traces: the schema of a run on disk, its writer, its reader and its exports.

``read_run(path)`` gives a run's step and request rows as pandas frames. Names load on first use, so that the server,
which only writes, imports neither pandas nor the exports.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_margingate.trace.errors import SchemaVersionError, TraceError
    from sglang_margingate.trace.export import export_chrome_trace, export_csv
    from sglang_margingate.trace.manifest import Manifest, read_manifest
    from sglang_margingate.trace.reader import Run, RunFollower, RunInfo, list_runs, read_run
    from sglang_margingate.trace.schema import (
        REQUEST_COLUMNS,
        REQUEST_SCHEMA,
        SCHEMA_VERSION,
        STEP_COLUMNS,
        STEP_SCHEMA,
    )
    from sglang_margingate.trace.writer import TraceWriter
    from sglang_margingate.words import Guarantee, Reason

_HOME = {
    "SchemaVersionError": "errors",
    "TraceError": "errors",
    "export_chrome_trace": "export",
    "export_csv": "export",
    "Manifest": "manifest",
    "read_manifest": "manifest",
    "Run": "reader",
    "RunFollower": "reader",
    "RunInfo": "reader",
    "list_runs": "reader",
    "read_run": "reader",
    "REQUEST_COLUMNS": "schema",
    "REQUEST_SCHEMA": "schema",
    "SCHEMA_VERSION": "schema",
    "STEP_COLUMNS": "schema",
    "STEP_SCHEMA": "schema",
    "Guarantee": "schema",
    "Reason": "schema",
    "TraceWriter": "writer",
}

__all__ = [
    "REQUEST_COLUMNS",
    "REQUEST_SCHEMA",
    "SCHEMA_VERSION",
    "STEP_COLUMNS",
    "STEP_SCHEMA",
    "Guarantee",
    "Manifest",
    "Reason",
    "Run",
    "RunFollower",
    "RunInfo",
    "SchemaVersionError",
    "TraceError",
    "TraceWriter",
    "export_chrome_trace",
    "export_csv",
    "list_runs",
    "read_manifest",
    "read_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
