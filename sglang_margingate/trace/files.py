"""The files of a run: which there are, and in which order their rows were written."""

from __future__ import annotations

from pathlib import Path


def run_files(path: Path, glob: str) -> list[Path]:
    """Return a run's closed files of one kind, in the order written (by number: there may be more than 9,999)."""

    def number(file: Path) -> tuple[int, str]:
        tail = file.stem.rpartition("-")[2]
        return (int(tail) if tail.isdecimal() else -1, file.name)

    return sorted(path.glob(glob), key=number)
