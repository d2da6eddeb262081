"""``manifest.json``: what a run was, and whether its writer is still alive.

The manifest is replaced whole (temporary file, then ``os.replace``), so a reader never sees half of it.
"""

from __future__ import annotations

import json
import math
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

from sglang_margingate.trace.errors import SchemaVersionError, TraceError
from sglang_margingate.trace.schema import MANIFEST_NAME, SCHEMA_VERSION
from sglang_margingate.trace.tables import create_private

HEARTBEAT_SECONDS = 5.0
"""The writer rewrites the manifest at least this often while it lives, rows or no rows."""

LIVE_SECONDS = 20.0
"""A run without ``closed_at`` whose heartbeat is younger than this counts as live (three beats may be lost)."""


class Manifest(TypedDict, total=False):
    """The fields that this project writes; others are kept as they are."""

    schema_version: str
    """``major.minor`` of :data:`~sglang_margingate.trace.schema.SCHEMA_VERSION`; set by the writer."""
    run: str
    """The folder's name; set by the writer."""
    pid: int
    """Process that wrote the run; set by the writer."""
    created: str
    """ISO 8601, UTC; set by the writer."""
    heartbeat: str
    """ISO 8601, UTC: the writer was alive then; renewed every 5 s."""
    closed_at: str
    """ISO 8601, UTC: the writer closed the run; absent while it lives and after a crash."""
    totals: dict[str, int]
    """step_rows, request_rows, dropped_rows, dropped_requests, write_errors and files, renewed with the heartbeat."""
    model: str
    """Model path or name."""
    policy: str
    """off, log, gate or always."""
    device: str
    """Device and its name."""
    versions: dict[str, str]
    """Versions of SGLang, torch and this package."""
    flags: dict[str, Any]
    """Every flag of the server, ours and SGLang's."""
    profile: dict[str, Any] | None
    """The threshold profile in force."""
    self_test: dict[str, Any]
    """Result of the start-up invariance self-test."""


def utc_now() -> str:
    """Return the time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_time(text: object) -> datetime | None:
    """Return a manifest time as an aware datetime, or None where it is absent or unreadable."""
    if not isinstance(text, str):
        return None
    try:
        parsed = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)


def is_live(manifest: dict[str, Any]) -> bool:
    """Tell whether the run's writer was alive within the last :data:`LIVE_SECONDS`."""
    beat = parse_time(manifest.get("heartbeat"))
    if beat is None or manifest.get("closed_at"):
        return False
    return (datetime.now(timezone.utc) - beat).total_seconds() < LIVE_SECONDS


def write_manifest(run_dir: Path, manifest: dict[str, Any]) -> None:
    """Replace the run's manifest in one step.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    tmp = run_dir / f".{MANIFEST_NAME}.tmp"
    # `default=str`: a flag of a foreign type (a Path, an enum) must not cost the run its manifest.
    text = json.dumps(_finite(manifest), indent=2, default=str, allow_nan=False) + "\n"
    create_private(tmp)
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, run_dir / MANIFEST_NAME)


def _finite(value: Any) -> Any:
    """Return the value with null for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the manifest of the run at `path`.

    Raises
    ------
    TraceError
        There is no manifest, or it is not a JSON object.
    """
    file = Path(path) / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TraceError(f"{path}: no {MANIFEST_NAME}; give the folder of one run, traces/<run>") from None
    except OSError as e:
        raise TraceError(f"{file}: cannot be read ({e.strerror or e})") from None
    except ValueError as e:  # covers JSONDecodeError and UnicodeDecodeError
        raise TraceError(f"{file}: not valid JSON ({e}); the run's rows can still be read") from None
    if not isinstance(manifest, dict):
        raise TraceError(f"{file}: a JSON object was expected, found {type(manifest).__name__}")
    return manifest


def check_version(found: object, where: str) -> None:
    """Refuse a schema whose major number is above ours; a newer minor number is readable.

    Raises
    ------
    SchemaVersionError
        The major number is newer.
    """
    try:
        major = int(str(found).split(".")[0])
    except ValueError:
        return  # absent or garbled: the caller reads what it can and says so
    if major > int(SCHEMA_VERSION.split(".")[0]):
        raise SchemaVersionError(
            f"{where}: written with trace schema {found}, this version reads up to {SCHEMA_VERSION.split('.')[0]}.x; "
            "upgrade sglang-margingate (pip install -U sglang-margingate)"
        )
