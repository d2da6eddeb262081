"""What readers wrote of a run, of its requests and of their steps: one small JSON file beside the run's own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTES_NAME = "notes.json"
"""The file's name. A run that has one is never removed by ``--margingate-trace-keep``."""
MOST_NOTE, MOST_TAGS, MOST_MARKS = 2000, 20, 500
MOST_BYTES = 2_000_000


@dataclass(frozen=True)
class Mark:
    """An annotation: words about one request, or about one of its steps."""

    request: int
    """Number of the request."""
    step: int | None
    """None: of the request as a whole."""
    text: str


@dataclass(frozen=True)
class Note:
    """What readers wrote of a run."""

    text: str = ""
    tags: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()

    def at(self, request: int, step: int | None) -> str:
        """Return what stands at a request, or at one of its steps; empty where nothing does."""
        return next((m.text for m in self.marks if (m.request, m.step) == (request, step)), "")

    def of(self, request: int) -> list[Mark]:
        """Return all marks of a request, that of the whole first, then by step."""
        return sorted((m for m in self.marks if m.request == request), key=lambda m: -1 if m.step is None else m.step)

    def marked(self, request: int, step: int | None, text: str) -> Note:
        """Return the note with these words there, in place of those that stood there; without them where they are empty."""
        others = tuple(m for m in self.marks if (m.request, m.step) != (request, step))
        kept = (*others, Mark(request, step, text[:MOST_NOTE])) if text else others
        return Note(
            self.text, self.tags, tuple(sorted(kept, key=lambda m: (m.request, -1 if m.step is None else m.step)))
        )


def _mark(found: Any) -> Mark | None:
    request, step = found["request"], found.get("step")
    if type(request) is not int or not (step is None or type(step) is int):
        return None
    return Mark(request, step, str(found["text"])[:MOST_NOTE])


def read_note(run: Path) -> Note:
    """Return a run's note; an unreadable one is empty."""
    try:
        with open(os.open(run / NOTES_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
            found: Any = json.loads(file.read(MOST_BYTES))
        words = tuple(str(t)[:40] for t in found["tags"] if isinstance(t, str))
        marks = [_mark(m) for m in found.get("marks", [])[:MOST_MARKS]]
        return Note(str(found["note"])[:MOST_NOTE], words[:MOST_TAGS], tuple(m for m in marks if m is not None))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Note()


def write_note(run: Path, note: Note) -> None:
    """Put a note beside a run, whole or not at all; an empty one removes it.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    target = run / NOTES_NAME
    if note == Note():
        target.unlink(missing_ok=True)
        return
    marks = [{"request": m.request, "step": m.step, "text": m.text} for m in note.marks[:MOST_MARKS]]
    temporary = run / f".{NOTES_NAME}.tmp"
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"note": note.text[:MOST_NOTE], "tags": list(note.tags[:MOST_TAGS]), "marks": marks}, file, indent=1)
    os.replace(temporary, target)
