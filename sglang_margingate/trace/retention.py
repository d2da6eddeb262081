"""The traces folder within its limits: old runs go, the oldest first.

Only a folder whose manifest says that it is this very run, and that the run has ended, is ever removed, and only if it
holds nothing but a run's files. So a run that was renamed by hand, or has somebody's notes in it, stays for good. No
symbolic link is followed: files are removed by name within the opened folder.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sglang_margingate.trace.errors import TraceError
from sglang_margingate.trace.files import PART, parts
from sglang_margingate.trace.manifest import is_live, parse_time, read_manifest
from sglang_margingate.trace.schema import MANIFEST_NAME

log = logging.getLogger(__name__)

DEAD_SECONDS = 3600.0
"""A run that was not closed counts as ended once its writer has been silent for that long."""

_OURS = re.compile(r"manifest\.json|\.manifest\.json\.tmp|\.?(steps|requests)-[0-9-]+\.parquet(\.tmp)?", re.ASCII)


class Keep(Protocol):
    """How long and how much is kept, as :class:`sglang_margingate.config.Keep` says it; its text is what was asked for."""

    @property
    def age_seconds(self) -> float | None:
        """Age of a run since its end; None is no limit."""

    @property
    def bytes(self) -> float | None:
        """Size of all runs; None is no limit."""


@dataclass(frozen=True)
class OldRun:
    """A run that has ended, as far as removing it goes."""

    path: Path
    ended: float
    size: int
    files: tuple[tuple[Path, tuple[str, ...]], ...]
    """The folders of its writers, the run's own last, with their files."""


def limit_folder(folder: Path, keep: Keep, own: Path | None = None, now: float | None = None) -> list[OldRun]:
    """Remove the runs that are too old or too much, and return them; the run at `own` stays.

    Never raises for what lies there; each removal is a line of the log.
    """
    age, most = keep.age_seconds, keep.bytes
    if age is None and most is None:
        return []
    now = time.time() if now is None else now
    total = 0
    ended: list[OldRun] = []
    for path in _folders(folder):
        contents = [(part, *_content(part)) for part in parts(path)]
        size = sum(each for _, _, each in contents)
        total += size
        if path == own or not all(_ours(names, part == path) for part, names, _ in contents):
            continue
        ends = [_ended(part, now) for part, _, _ in contents]
        if all(end is not None for end in ends):
            files = tuple(
                (part, tuple(n for n in names if not PART.fullmatch(n))) for part, names, _ in reversed(contents)
            )
            ended.append(OldRun(path, max(end for end in ends if end is not None), size, files))
    removed = []
    for run in sorted(ended, key=lambda r: (r.ended, r.path.name)):
        too_old = age is not None and now - run.ended > age
        too_much = most is not None and total > most
        if not (too_old or too_much) or not _remove(run):
            continue
        total -= run.size
        removed.append(run)
        why = "older than" if too_old else "beyond the size of"
        log.info(
            "margingate trace: removed run %s (%.1f MB): %s --margingate-trace-keep %s",
            run.path.name, run.size / 1e6, why, keep,
        )  # fmt: skip
    if most is not None and total > most:
        log.warning(
            "margingate trace: %s holds %.1f MB, above --margingate-trace-keep %s; what is left is live or not a run "
            "of ours",
            folder, total / 1e6, keep,
        )  # fmt: skip
    return removed


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the folders that hold a manifest, themselves no links."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                try:
                    if entry.is_dir(follow_symlinks=False) and stat.S_ISREG(os.lstat(path / MANIFEST_NAME).st_mode):
                        yield path
                except OSError:
                    continue
    except OSError:
        return


def _ours(names: list[str], run: bool) -> bool:
    """Return whether a folder holds nothing but what a writer puts there; a run's own may hold those of further writers."""
    return all(_OURS.fullmatch(name) or (run and PART.fullmatch(name)) for name in names)


def _content(path: Path) -> tuple[list[str], int]:
    """Return the names in a folder, and the bytes of its plain files."""
    names, size = [], 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                names.append(entry.name)
                found = entry.stat(follow_symlinks=False)
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    except OSError:
        pass  # it changes while we look: a live run, or one that another server removes
    return names, size


def _ended(path: Path, now: float) -> float | None:
    """Return when the run ended; None where it has not, or where the manifest is not this run's own."""
    try:
        manifest = read_manifest(path)
    except TraceError:
        return None
    if manifest.get("run") != path.name or not manifest.get("schema_version") or is_live(manifest):
        return None
    closed, beat = parse_time(manifest.get("closed_at")), parse_time(manifest.get("heartbeat"))
    if closed is not None:
        return closed.timestamp()
    if beat is None or now - beat.timestamp() < DEAD_SECONDS:
        return None
    return beat.timestamp()


def _remove(run: OldRun) -> bool:
    """Remove a run, its manifest last: cut short, it is removed the next time."""
    return all(_remove_folder(run, path, names) for path, names in run.files)


def _remove_folder(run: OldRun, path: Path, names: tuple[str, ...]) -> bool:
    try:
        where = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        for name in sorted(names, key=lambda n: n == MANIFEST_NAME):
            try:
                os.unlink(name, dir_fd=where)
            except FileNotFoundError:
                continue
        os.rmdir(path)
    except OSError as e:
        log.warning("margingate trace: cannot remove run %s: %s", run.path, e.strerror or e)
        return False
    finally:
        os.close(where)
    return True
