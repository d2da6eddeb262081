"""What "the same" means, in one place: equal token ids and equal finish reasons, over all pairs of a prompt's runs; where
log-probabilities were asked for, those in every bit too.

Where a server gives no token ids, equal texts stand in for them, and :attr:`Runs.by` says so.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from sglang_margingate.bench.servers.client import Completion


class Observation(NamedTuple):
    """One output of one prompt."""

    run: str
    """Phase and repeat, as ``together #2``."""
    completion: Completion


class Difference(NamedTuple):
    """Two runs of one prompt that are not the same."""

    prompt_id: str
    first: Observation
    second: Observation
    position: int | None
    """Index of the first differing token (character, where there are no token ids); None: only finish reasons differ."""

    def describe(self) -> str:
        """Return what differs, in one line."""
        a, b = self.first.completion, self.second.completion
        if self.position is None and a.finish_reason == b.finish_reason:
            return f"log-probabilities: {_where(a.logprobs, b.logprobs)}"
        if self.position is None:
            return f"finish reason: {a.finish_reason} is not {b.finish_reason}"
        if a.tokens or b.tokens:
            left, right = (c.tokens[self.position] if self.position < len(c.tokens) else "end" for c in (a, b))
            return f"token {self.position}: {left} is not {right}"
        return f"character {self.position} of the text"


def _where(a: str, b: str) -> str:
    """Say where two texts of log-probabilities part."""
    x, y = (json.loads(text) if text else {} for text in (a, b))
    for name in dict.fromkeys([*x, *y]):
        left, right = (found.get(name) or [] for found in (x, y))
        pairs = enumerate(zip(left, right)) if isinstance(left, list) and isinstance(right, list) else ()
        at = next((i for i, (p, q) in pairs if p != q), None)
        if at is not None:
            return f"{name}[{at}]: {str(left[at])[:60]} is not {str(right[at])[:60]}"
        if left != right:
            return f"{name}: not the same entries"
    return "none in one of them"


def identity(completion: Completion) -> tuple[object, str]:
    """Return the key that two completions share exactly when they are the same."""
    return (completion.tokens or completion.text, completion.finish_reason + completion.logprobs)


def first_difference(a: Observation, b: Observation) -> Difference:
    """Return where two runs that are not the same part."""
    x, y = a.completion, b.completion
    by_tokens = bool(x.tokens or y.tokens)
    left, right = (x.tokens, y.tokens) if by_tokens else (x.text, y.text)
    at = next((i for i, (p, q) in enumerate(zip(left, right)) if p != q), None)
    if at is None and len(left) != len(right):
        at = min(len(left), len(right))
    return Difference(x.prompt_id, a, b, at)


@dataclass
class Runs:
    """All outputs of all prompts, compared as they come."""

    by_prompt: dict[str, list[Observation]] = field(default_factory=dict)

    def add(self, run: str, completion: Completion) -> bool:
        """Record one output; return whether it is the same as the prompt's first."""
        seen = self.by_prompt.setdefault(completion.prompt_id, [])
        seen.append(Observation(run, completion))
        return identity(seen[0].completion) == identity(completion)

    @property
    def by(self) -> str:
        """What was compared."""
        every = [o.completion for seen in self.by_prompt.values() for o in seen]
        scored = ", and log-probabilities in every bit" if any(c.logprobs for c in every) else ""
        some = any(c.tokens for c in every)
        return (
            "token ids and finish reasons" if some else "texts and finish reasons (the server gives no token ids)"
        ) + scored

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return sum(len(seen) for seen in self.by_prompt.values())

    def changed(self) -> list[str]:
        """Return the prompts with more than one distinct output."""
        return [p for p, seen in self.by_prompt.items() if len(self.groups(seen)) > 1]

    @staticmethod
    def groups(seen: list[Observation]) -> Counter[tuple[object, str]]:
        """Return how many runs gave each distinct output."""
        return Counter(identity(o.completion) for o in seen)

    def pairs(self) -> tuple[int, int]:
        """Return how many pairs of runs of a prompt differ, of how many."""
        different = total = 0
        for seen in self.by_prompt.values():
            n = len(seen)
            total += n * (n - 1) // 2
            same = sum(k * (k - 1) // 2 for k in self.groups(seen).values())
            different += n * (n - 1) // 2 - same
        return different, total

    def against_first(self, run: str) -> tuple[int, int]:
        """Return how many outputs of one run (or phase) differ from the prompt's first, of how many."""
        different = total = 0
        for seen in self.by_prompt.values():
            for o in seen[1:] if seen and _in(seen[0].run, run) else seen:
                if _in(o.run, run):
                    total += 1
                    different += identity(o.completion) != identity(seen[0].completion)
        return different, total

    def first(self) -> Difference | None:
        """Return the first pair that differs, in the order in which outputs came."""
        for seen in self.by_prompt.values():
            for a, b in combinations(seen, 2):
                if identity(a.completion) != identity(b.completion):
                    return first_difference(a, b)
        return None


def _in(run: str, phase: str) -> bool:
    return run == phase or run.split(" #")[0] == phase
