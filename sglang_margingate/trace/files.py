"""The files of a run: which there are, which rows each holds, and what is missing between them.

``steps-000000000-000000511.parquet`` holds the rows 0 to 511 of the run's steps. Small files are merged later
(:mod:`sglang_margingate.trace.compact`): the merged file appears whole under its own name, and only then do its parts
go. So a folder may hold rows twice for a moment, or for good after a crash; by their names it is plain which. Schema 1.x
numbered its files instead (``steps-0007.parquet``).
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from sglang_margingate.trace.schema import MANIFEST_NAME

KINDS = ("steps", "requests")

PART = re.compile(r"scheduler-[1-9]\d{0,5}", re.ASCII)
"""Folder of a further writer in a run's: one scheduler of several."""

_NAME = re.compile(r"(steps|requests)-(\d{1,18})(?:-(\d{1,18}))?\.parquet", re.ASCII)


@dataclass(frozen=True)
class RowFile:
    """One closed file of a run."""

    path: Path
    first: int | None
    """Row number of its first row among the run's rows of its kind; None in a run of schema 1.x."""
    last: int | None
    size: int
    mtime_ns: int

    @property
    def rows(self) -> int | None:
        """Rows in it, by its name; None where the name does not say."""
        return None if self.first is None or self.last is None else self.last - self.first + 1


@dataclass
class Listing:
    """A run's files of one kind in the order of their rows, each row in one file only."""

    files: list[RowFile] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """First and last number of rows that are in no file."""
    replaced: list[RowFile] = field(default_factory=list)
    """Files whose rows are all in a larger one."""
    odd: list[str] = field(default_factory=list)
    """What has a file's name and is none, one line each."""
    end: int = 0
    """Number of the next row; 0 in a run of schema 1.x."""


def own_folder(parent: Path, stem: str) -> Path:
    """Make and return a folder of this name that nobody else has."""
    for i in range(1, 1000):
        path = parent / (stem if i == 1 else f"{stem}-{i}")
        try:
            path.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
    return path


def shared_folder(run: Path, part: int) -> Path:
    """Make and return the folder of one of a run's writers; any of them may be the first."""
    run.mkdir(mode=0o700, exist_ok=True)
    if not part:
        return run
    path = run / f"scheduler-{part}"
    path.mkdir(mode=0o700)
    return path


def parts(run: Path) -> list[Path]:
    """Return the folders of a run's writers, the run's own first; no links, and none that says nothing of itself yet."""
    try:
        with os.scandir(run) as entries:
            found = [Path(e.path) for e in entries if PART.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        found = []
    found = [path for path in found if os.path.lexists(path / MANIFEST_NAME)]
    return [run, *sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))]


def name_of(kind: str, first: int, last: int) -> str:
    """Return the name of the file with these rows."""
    return f"{kind}-{first:09d}-{last:09d}.parquet"


def kind_of(entry: os.DirEntry[str]) -> str:
    """Say what a folder's entry is, if no plain file; looking at it opens nothing and follows no link."""
    mode = entry.stat(follow_symlinks=False).st_mode
    for test, word in (
        (stat.S_ISREG, ""), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    ):  # fmt: skip
        if test(mode):
            return word
    return "a device"


def list_files(path: Path, kind: str, start: int = 0) -> Listing:
    """List a run's closed files of one kind that hold rows from number `start` on.

    Never raises: a folder that is gone has no files. A merge beside the listing may hide rows from it for a moment; they
    then show as a gap, and the next listing has them.
    """
    found: list[RowFile] = []
    out = Listing()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match is None or match[1] != kind:
                    continue
                try:
                    what = kind_of(entry)
                    if what:
                        out.odd.append(f"{entry.name}: {what}, not a file; skipped")
                        continue
                    size, mtime = (s := entry.stat(follow_symlinks=False)).st_size, s.st_mtime_ns
                except OSError:
                    continue  # merged away since
                first, last = (None, None) if match[3] is None else (int(match[2]), int(match[3]))
                found.append(RowFile(path / entry.name, first, last, size, mtime))
    except OSError:
        return out
    numbered = [f for f in found if f.first is None]
    out.files = sorted(numbered, key=lambda f: (int(f.path.stem.rpartition("-")[2]), f.path.name))
    out.odd.sort()
    _cover([f for f in found if f.first is not None], start, out)
    return out


def _cover(found: list[RowFile], start: int, out: Listing) -> None:
    """Choose files that hold each row once, the largest first."""
    out.end = start
    for file in sorted(found, key=lambda f: (f.first, -(f.last or 0))):
        assert file.first is not None
        assert file.last is not None
        if file.last < out.end:
            if file.last >= start:
                out.replaced.append(file)
            continue
        if file.first > out.end:
            out.gaps.append((out.end, file.first - 1))
        out.files.append(file)
        out.end = file.last + 1
