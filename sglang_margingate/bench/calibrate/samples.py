"""Calibration samples on disk: one JSON line for each prompt as it finishes, so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sglang_margingate.bench.servers.client import Completion, ServerError
from sglang_margingate.gate.stats import Array

SAMPLES_SCHEMA = "margingate-samples/1"
VERIFIED = ("margin", "audit", "always")
"""Reasons of decode steps whose flip is known; the first token comes from the canonical prefill."""

GRID = 4096.0
"""Differences of bf16 logits of usual size are multiples of 1 / GRID."""
ROUNDING = 5e-7
"""``meta_info.margingate.per_token`` may give margins rounded to six decimals."""


class SampleError(ValueError):
    """The samples on disk cannot be used; one line with the fix."""


class Sample(NamedTuple):
    """Verified decode steps, of shape (steps,)."""

    margins: Array
    flipped: Array


def exact(margins: Array) -> Array:
    """Undo the rounding of margins of bf16 logits: a threshold must not lie a rounding error below its own step."""
    snapped = np.round(margins * GRID) / GRID
    return np.where(np.abs(snapped - margins) <= 1.01 * ROUNDING, snapped, margins)


def covering(threshold: float) -> float:
    """Return a threshold that triggers at a rounded margin's exact value, too."""
    return threshold if (threshold * GRID).is_integer() else threshold + ROUNDING


def steps_of(completion: Completion) -> tuple[list[float], list[bool], int]:
    """Return margins and flips of the verified decode steps, and how many decode steps were not verified."""
    detail = completion.margingate.get("per_token")
    if not detail:
        raise ServerError(f"prompt {completion.prompt_id}: the answer has no meta_info.margingate.per_token")
    rows = [(m, f) for m, f, r in zip(detail["margin"], detail["flipped"], detail["reason"]) if r in VERIFIED]
    unverified = sum(r == "none" for r in detail["reason"][1:])
    return [m for m, _ in rows], [f for _, f in rows], unverified


def read_header(path: Path) -> dict[str, Any]:
    """Return the first line of a file of samples; empty where there is none that can be read."""
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) and header.get("schema") == SAMPLES_SCHEMA else {}


@dataclass
class SampleStore:
    """Samples by dataset and by the threshold that they were recorded at.

    Parameters
    ----------
    path
        The file; lines are appended to it as prompts finish.
    bound_to
        What the samples depend on. A file with other values is refused.
    """

    path: Path
    bound_to: dict[str, Any]
    rows: dict[tuple[str, float], dict[str, tuple[list[float], list[bool]]]] = field(default_factory=dict)
    resumed: int = 0
    """Prompts that were there already."""

    also: dict[str, Any] = field(default_factory=dict)
    """What stands in the file's first line beside that, to be read back; it is not compared."""

    def open(self, fresh: bool = False) -> None:
        """Read what is there, or begin the file.

        Raises
        ------
        SampleError
            The file is of another server or other settings, or cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not fresh:
                self._read()
            else:
                header = {"schema": SAMPLES_SCHEMA, **self.bound_to, "also": self.also}
                self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise SampleError(f"{self.path}: cannot be used ({error.strerror or error}); name another --out") from None

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        lines = whole.split("\n")
        try:
            header = json.loads(lines[0])
            rows = [json.loads(line) for line in lines[1:] if line]
        except json.JSONDecodeError as error:
            raise SampleError(f"{self.path}: damaged ({error.msg}); --fresh measures again") from None
        for name, value in {"schema": SAMPLES_SCHEMA, **self.bound_to}.items():
            if header.get(name) != value:
                raise SampleError(
                    f"{self.path}: recorded with {name} {header.get(name)!r}, this run has {value!r}; "
                    "--fresh measures again, or name another --out"
                )
        if torn:  # the last line of a run that was killed
            self.path.write_text(whole + "\n", encoding="utf-8")
        for row in rows:
            self._keep(row)
        self.resumed = len(rows)

    def _keep(self, row: dict[str, Any]) -> None:
        flips = set(row["flips"])
        flipped = [i in flips for i in range(len(row["margins"]))]
        place = self.rows.setdefault((row["dataset"], float(row["threshold"])), {})
        place[row["prompt"]] = (row["margins"], flipped)

    def add(self, dataset: str, threshold: float, completion: Completion, level: int) -> None:
        """Record one prompt's steps, met at a concurrency level, and write them down at once."""
        margins, flipped, unverified = steps_of(completion)
        if unverified:
            raise ServerError(
                f"prompt {completion.prompt_id}: {unverified} steps were not verified; "
                "calibration needs a server with --margingate-audit-rate 1.0"
            )
        row = {
            "dataset": dataset,
            "threshold": threshold,
            "prompt": completion.prompt_id,
            "concurrency": level,
            "max_batch_rows": completion.margingate.get("max_batch_rows"),
            "margins": margins,
            "flips": [i for i, f in enumerate(flipped) if f],
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._keep(row)

    def done(self, dataset: str, threshold: float) -> set[str]:
        """Return the prompts recorded at a threshold."""
        return set(self.rows.get((dataset, threshold), {}))

    def sample(self, dataset: str, threshold: float, prompt_ids: Sequence[str]) -> Sample:
        """Return the steps of the given prompts recorded at a threshold."""
        found = self.rows.get((dataset, threshold), {})
        rows = [found[p] for p in prompt_ids if p in found]
        margins = np.array([m for ms, _ in rows for m in ms], dtype=np.float64)
        flipped = np.array([f for _, fs in rows for f in fs], dtype=bool)
        return Sample(exact(margins), flipped)
