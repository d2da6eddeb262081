"""``manifest.json``: what a run was, and whether its writer is still alive.

The manifest is replaced whole (temporary file, then ``os.replace``), so a reader never sees half of it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from sglang_margingate.trace.errors import SchemaVersionError, TraceError
from sglang_margingate.trace.schema import MANIFEST_NAME, SCHEMA_VERSION
from sglang_margingate.trace.tables import create_private

_MOST_BYTES = 16 * 1024 * 1024
_MOST_LEVELS = 64

HEARTBEAT_SECONDS = 5.0
"""The writer rewrites the manifest at least this often while it lives, rows or no rows."""

LIVE_SECONDS = 20.0
"""A run without ``closed_at`` whose heartbeat is younger than this counts as live (three beats may be lost)."""


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Manifest(TypedDict, total=False):
    """The fields that this project writes, with the types that readers insist on; others are kept as they are."""

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
    totals: dict[str, _Count]
    """step_rows, request_rows, dropped_rows, dropped_requests, write_errors and files, renewed with the heartbeat."""
    model: str
    """Model path or name."""
    dtype: str
    """Of the model's weights and activations."""
    policy: str
    """off, log, gate or always."""
    repair: str
    """column or window."""
    threshold: float | None
    """The server's default threshold (tau)."""
    device: str
    """Device and its name."""
    attention_backend: str | None
    """SGLang's attention back end."""
    versions: dict[str, str]
    """Versions of SGLang, torch and this package."""
    flags: dict[str, Any]
    """Every flag of the server, ours and SGLang's."""
    profile: Any
    """The threshold profile in force."""
    self_test: dict[str, Any] | None
    """Result of the start-up invariance self-test."""
    invariance: dict[str, Any] | None
    """What the probe of the canonical fast path found."""
    notes: list[str]
    """What lowers every guarantee of the server."""
    synthetic: bool
    """The run is made up."""


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
    return abs((datetime.now(timezone.utc) - beat).total_seconds()) < LIVE_SECONDS


def one_manifest(manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest of a run with several writers: the first one's, with what all of them wrote.

    The run lives while one writer does, and is closed when all have closed it.
    """
    head = manifests[0]
    if len(manifests) == 1:
        return head
    totals = [m["totals"] for m in manifests if isinstance(m.get("totals"), dict)]
    names = dict.fromkeys(name for each in totals for name in each)
    one = {**head, "totals": {name: sum(each.get(name, 0) for each in totals) for name in names}}
    living = [m for m in manifests if not m.get("closed_at")]
    one["heartbeat"] = max((str(m["heartbeat"]) for m in living or manifests if m.get("heartbeat")), default=None)
    one["closed_at"] = None if living else max(str(m["closed_at"]) for m in manifests)
    one["schedulers"] = [
        {k: m.get(k) for k in ("scheduler", "pid", "totals", "heartbeat", "closed_at")} for m in manifests
    ]
    return one


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
        There is no manifest, or it is not what a writer of a known schema writes.
    """
    file = Path(path) / MANIFEST_NAME
    try:
        manifest = _parse(_plain_text(file))
        if not isinstance(manifest, dict):
            raise ValueError(f"a JSON object was expected, found {type(manifest).__name__}")
        if not _is_newer(manifest.get("schema_version")):
            msgspec.convert(manifest, Manifest, strict=True)
    except FileNotFoundError:
        raise TraceError(f"{path}: no {MANIFEST_NAME}; give the folder of one run, traces/<run>") from None
    except OSError as e:
        raise TraceError(f"{file}: cannot be read ({e.strerror or e})") from None
    except RecursionError:
        raise TraceError(f"{file}: nested too deeply; the run's rows can still be read") from None
    except ValueError as e:  # covers JSON's, Unicode's and the schema library's errors
        raise TraceError(f"{file}: {_first_line(e)}; the run's rows can still be read") from None
    return manifest


def _plain_text(file: Path) -> str:
    """Return the text of a plain file of sensible size; a FIFO or a device is not opened, a link not followed."""
    found = os.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a plain file (a link, a FIFO or a device)")
    if found.st_size > _MOST_BYTES:
        raise ValueError(f"{found.st_size:,} bytes, a manifest has less than {_MOST_BYTES:,}")
    # Non-blocking: what lies there may have been replaced since it was looked at.
    with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as f:
        return f.read(_MOST_BYTES)


def _parse(text: str) -> Any:
    """Return the JSON value; numbers that no column holds, and nesting that no page could show, are errors.

    Raises
    ------
    ValueError, RecursionError
        It is not valid JSON, or such.
    """

    def number(kind: type) -> Any:
        def convert(digits: str) -> Any:
            if len(digits) > 40:
                raise ValueError(f"a number of {len(digits)} characters")
            value = kind(digits)
            if not -(2.0**64) < value < 2.0**64:
                raise ValueError(f"a number out of range ({digits})")
            return value

        return convert

    def constant(word: str) -> Any:
        raise ValueError(f"{word} is not a JSON number")

    found = json.loads(text, parse_int=number(int), parse_float=number(float), parse_constant=constant)
    level = [found]
    for _ in range(_MOST_LEVELS):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return found
    raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")


def _first_line(e: Exception) -> str:
    text = (str(e).splitlines() or [type(e).__name__])[0][:200]
    if isinstance(e, msgspec.ValidationError):
        what, _, where = text.partition(" - at ")
        return f"{where.strip('`').removeprefix('$.') or 'it'}: {what[:1].lower()}{what[1:]}"
    return f"not valid JSON ({text})" if isinstance(e, json.JSONDecodeError) else text


def _is_newer(found: object) -> bool:
    try:
        return int(str(found).split(".")[0]) > int(SCHEMA_VERSION.split(".")[0])
    except ValueError:
        return False  # absent or garbled: the caller reads what it can and says so


def check_version(found: object, where: str) -> None:
    """Refuse a schema whose major number is above ours; a newer minor number is readable.

    Raises
    ------
    SchemaVersionError
        The major number is newer.
    """
    if _is_newer(found):
        raise SchemaVersionError(
            f"{where}: written with trace schema {found}, this version reads up to {SCHEMA_VERSION.split('.')[0]}.x; "
            "upgrade sglang-margingate (pip install -U sglang-margingate)"
        )
