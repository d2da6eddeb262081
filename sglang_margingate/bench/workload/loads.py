"""How requests arrive: the words of ``--workload`` and the seconds at which each request is sent."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.options import UsageError, names

FORMS = {
    "closed": "closed:N (N requests in flight at all times)",
    "poisson": "poisson:RATE (requests a second)",
    "burst": "burst:N:SECONDS (N at once, every so many seconds)",
    "sessions": "sessions:N:TURNS:PREFIX (N conversations in flight, sharing PREFIX tokens in groups)",
    "replay": "replay:FILE (JSON lines with at, input or prompt, output)",
}
"""Kinds of load, and how each is written."""

TURNS, PREFIX, GAP = 4, 256, 5.0


class Limits(NamedTuple):
    """What a user still takes for quick: most milliseconds to the first token, and per token after it."""

    ttft_ms: float
    tpot_ms: float


@dataclass(frozen=True)
class Load:
    """One way for the requests of a workload to arrive."""

    kind: str
    count: int = 16
    """Requests (closed), conversations (sessions) in flight; size of a burst."""
    rate: float = 0.0
    """Poisson: requests a second."""
    gap: float = GAP
    """Seconds from one burst to the next."""
    turns: int = TURNS
    prefix: int = PREFIX
    """Tokens that the conversations of a group share."""
    file: Path | None = None

    @property
    def name(self) -> str:
        """The load as the user would write it; it names rows of tables."""
        tail = {
            "closed": f":{self.count}",
            "poisson": f":{self.rate:g}",
            "burst": f":{self.count}:{self.gap:g}",
            "sessions": f":{self.count}:{self.turns}:{self.prefix}",
            "replay": f":{self.file}",
        }
        return self.kind + tail[self.kind]

    @property
    def in_flight(self) -> int | None:
        """Requests at once, where the client decides it; None where arrivals and the server's speed do."""
        return self.count if self.kind in ("closed", "sessions", "burst") else None

    @property
    def waits(self) -> bool:
        """Whether a request is sent only when another has ended."""
        return self.kind in ("closed", "sessions")

    def times(self, count: int, seed: int) -> list[float]:
        """Return the seconds from the start at which requests are sent: the same ones for every server.

        Those of a replayed file are in the file (:func:`~sglang_margingate.bench.workload.requests.replayed`).
        """
        if self.kind == "burst":
            return [i // self.count * self.gap for i in range(count)]
        if self.kind != "poisson":
            return [0.0] * count
        rng = random.Random(f"{seed}:arrivals")
        now, out = 0.0, []
        for _ in range(count):
            now += rng.expovariate(self.rate)
            out.append(now)
        return [at - out[0] for at in out]


def parse(text: str, concurrency: int = 16, rate: float | None = None) -> list[Load]:
    """Return the loads of ``--workload``.

    Parameters
    ----------
    text
        Comma-separated, each as in :data:`FORMS`; what is left out has a default.
    concurrency, rate
        ``--concurrency`` and ``--rate``, for loads that name no number.

    Raises
    ------
    UsageError
        One line that names the load, its field and the fix.
    """
    found = [_one(word, concurrency, rate) for word in names(text)]
    if not found:
        raise UsageError(f"--workload {text!r} names no load; use {', '.join(FORMS)}, as closed:48")
    if any(load in found[:i] for i, load in enumerate(found)):
        raise UsageError(f"--workload {text}: a load stands there twice; --repeats measures each several times")
    return found


def _one(word: str, concurrency: int, rate: float | None) -> Load:
    kind, _, rest = word.partition(":")
    if kind not in FORMS:
        raise UsageError(f"--workload {word}: {kind!r} is no kind of load; use {', '.join(FORMS)}")
    if kind == "replay":
        if not rest:
            raise UsageError(f"--workload {word}: FILE is missing; write {FORMS[kind]}")
        return Load(kind, file=Path(rest))
    given = rest.split(":") if rest else []
    known: dict[str, list[tuple[str, Callable[[str], float], Any]]] = {
        "closed": [("count", _whole, concurrency)],
        "poisson": [("rate", _above_0, rate)],
        "burst": [("count", _whole, concurrency), ("gap", _above_0, GAP)],
        "sessions": [("count", _whole, concurrency), ("turns", _whole, TURNS), ("prefix", _from_0, PREFIX)],
    }
    fields = known[kind]
    if len(given) > len(fields):
        raise UsageError(f"--workload {word}: too many numbers; write {FORMS[kind]}")
    values: dict[str, Any] = {}
    for i, (field, read, default) in enumerate(fields):
        try:
            values[field] = read(given[i]) if i < len(given) else default
        except ValueError as error:
            raise UsageError(
                f"--workload {word}: {_label(kind, i)} {given[i]!r} {error}; write {FORMS[kind]}"
            ) from None
        if values[field] is None:
            raise UsageError(f"--workload {word}: RATE is missing; write {FORMS[kind]}")
    return Load(kind, **values)


def _label(kind: str, at: int) -> str:
    return FORMS[kind].partition(" ")[0].split(":")[1 + at]


def _whole(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError("is not a whole number of at least 1")
    return int(text)


def _from_0(text: str) -> int:
    if not text.isdigit():
        raise ValueError("is not a whole number of at least 0")
    return int(text)


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("is not a number above 0")
    return value
