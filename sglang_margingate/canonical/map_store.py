"""Keeps invariance maps between starts: one readable JSON file per device, kinds of layers and probed rows.

A kept map is used only where hardware, versions and settings are the ones it was read on, and only after a spot check
(a few values of M of each layer, probed anew) agrees with it. In every other case the log says why, the layers are
probed anew and the file is replaced. No failure here keeps a server from starting: without a file it just probes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_margingate.canonical.invariance import InvarianceMap, MapError, spans
from sglang_margingate.canonical.layer_probe import LayerKind, probe_layers, spot_check, wanted

log = logging.getLogger(__name__)

SCHEMA = "margingate-map/2"
"""Goes up when a field or what a probe sees changes, so that older maps are probed anew."""

FLAG = "--margingate-map-dir"
WIDTH = 120
MOST_NAMED = 8


def map_of(
    kinds: Sequence[LayerKind], rows: list[int], environment: dict[str, Any], folder: str | None, *, keep: bool = True
) -> InvarianceMap:
    """Return the map of a model's layers: the kept one where it holds, else a new one, which is kept.

    Parameters
    ----------
    kinds
        One layer of every kind in the model.
    rows
        Values of M to probe, ascending.
    environment
        What this machine's maps are bound to (:func:`~sglang_margingate.machine.kernel_environment`).
    folder
        Where maps are kept; None keeps and reads none.
    keep
        False reads a kept map but writes none: for a model that is broken on purpose.
    """
    path = None if folder is None else map_path(folder, kinds, rows, environment)
    kept = None if path is None else _kept(path, kinds, rows, environment)
    if kept is not None:
        return kept
    found = probe_layers(kinds, rows, environment)
    return replace(found, file=str(path)) if path is not None and keep and save(path, found) else found


def map_path(folder: str, kinds: Sequence[LayerKind], rows: list[int], environment: dict[str, Any]) -> Path:
    """Return the file of a map: the device's name, and a hash over kinds of layers and probed rows."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment.get("device", "unknown")).lower()).strip("-")[:80]
    # Neither names nor counts: models of the same shapes share a map.
    key: list[Any] = [[*kind.shape, kind.describe(), kind.head, spans(wanted(kind, rows))] for kind in kinds]
    if "ranks" in environment:  # shapes are a rank's: a smaller model on one GPU may have the same
        key.append(environment["ranks"])
    return Path(folder) / f"{slug}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"


def load(path: Path, kinds: Sequence[LayerKind], rows: list[int], environment: dict[str, Any]) -> InvarianceMap:
    """Read a kept map and check that it is of these layers, this machine and these versions. No spot check yet.

    Raises
    ------
    FileNotFoundError
        Nothing is kept there.
    MapError
        One line that says why the file cannot be used.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MapError(f"it cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:  # text or JSON that breaks off
        raise MapError(f"it is damaged ({error})") from None
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise MapError(f"its schema is {schema!r}, not {SCHEMA!r}")
    try:
        found = InvarianceMap.from_dict(data)
    except MapError as error:
        raise MapError(f"it is damaged ({error})") from None
    differs = differences(found.environment, environment)
    if differs:
        raise MapError(f"it was read elsewhere: {'; '.join(differs)}")
    stored = [(x.shape, x.kind, x.head, sorted(x.labels)) for x in found.layers]
    if stored != [(kind.shape, kind.describe(), kind.head, wanted(kind, rows)) for kind in kinds]:
        raise MapError("it is damaged (its layers or rows are not those its name stands for)")
    own = [replace(x, name=kind.name, count=kind.count) for x, kind in zip(found.layers, kinds)]
    return replace(found, layers=own, file=str(path))


def differences(stored: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Name every field in which this machine is not the stored one, with both values."""

    def shown(values: dict[str, Any], name: str) -> str:
        return repr(values[name]) if name in values else "not set"

    names = dict.fromkeys([*stored, *here])
    return [
        f"{name}: stored {shown(stored, name)}, here {shown(here, name)}"
        for name in names
        if shown(stored, name) != shown(here, name)
    ]


def save(path: Path, found: InvarianceMap) -> bool:
    """Write a map, whole or not at all; return whether that worked, and warn where it did not."""
    data = {"schema": SCHEMA, **found.to_dict()}
    del data["file"], data["checked_seconds"]  # they are about one start, not about the map
    # A name of its own: servers that start together, on hosts that share the folder too, must not share it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(readable(data) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "margingate: %s: the invariance map cannot be kept in %s (%s), so the next start probes again; "
            "name a folder you may write to, or off", FLAG, path.parent, error.strerror or error,
        )  # fmt: skip
        return False
    return True


def readable(value: Any, indent: str = "") -> str:
    """Return JSON for people: what fits a line stands on one."""
    flat = json.dumps(value)
    if not value or not isinstance(value, (dict, list)) or len(indent) + len(flat) <= WIDTH:
        return flat
    deeper = indent + "  "
    if isinstance(value, dict):
        # As json.dumps does it: a key that is a number becomes a text.
        keys = [name if isinstance(name, str) else json.dumps(name) for name in value]
        items = [f"{json.dumps(key)}: {readable(item, deeper)}" for key, item in zip(keys, value.values())]
    else:
        items = [readable(item, deeper) for item in value]
    body = ",\n".join(deeper + item for item in items)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{body}\n{indent}{closing}"


def _kept(path: Path, kinds: Sequence[LayerKind], rows: list[int], environment: dict[str, Any]) -> InvarianceMap | None:
    """Return the kept map where it can be used and still holds; say in the log why not."""
    try:
        found = load(path, kinds, rows, environment)
    except FileNotFoundError:
        return None
    except MapError as error:
        log.warning("margingate: the map in %s is not used, probing anew: %s", path, error)
        return None
    start = time.perf_counter()
    wrong = spot_check(kinds, found)
    if wrong:
        log.warning("margingate: the map in %s failed its spot check, probing anew: %s", path, _named(wrong))
        return None
    return replace(found, checked_seconds=time.perf_counter() - start)


def _named(wrong: dict[str, list[int]]) -> str:
    def rows(found: list[int]) -> str:
        return ", ".join(map(str, found[:MOST_NAMED])) + (", ..." if len(found) > MOST_NAMED else "")

    return "; ".join(f"{name} at M = {rows(found)}" for name, found in wrong.items())
