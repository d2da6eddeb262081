"""Two answers token against token, realigned where they meet again."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

MOST = 4000
"""Tokens beyond the first difference that are realigned: the search is quadratic at worst."""
SHORTEST = 3
"""Equal runs shorter than this are chance."""


class Aligned(NamedTuple):
    """What each token of both answers is: same, diverged (the first difference), only (on one side) or again (equal again)."""

    first: int | None
    """Step of the first difference; None where there is none."""
    a: list[str]
    b: list[str]

    @property
    def again(self) -> int:
        """Tokens that are equal again after the first difference."""
        return self.a.count("again")


def realign(a: Sequence[int], b: Sequence[int]) -> Aligned:
    """Compare two token sequences, of any lengths."""
    first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
    if first is None:
        if len(a) == len(b):
            return Aligned(None, ["same"] * len(a), ["same"] * len(b))
        first = min(len(a), len(b))
    marks = []
    rest_a, rest_b = list(a[first : first + MOST]), list(b[first : first + MOST])
    blocks = SequenceMatcher(None, rest_a, rest_b, autojunk=False).get_matching_blocks()
    for side, tokens in ((0, a), (1, b)):
        mark = ["same"] * first + ["only"] * (len(tokens) - first)
        for block in blocks:
            if block.size >= SHORTEST:
                at = first + block[side]
                mark[at : at + block.size] = ["again"] * block.size
        if len(tokens) > first:
            mark[first] = "diverged"
        marks.append(mark)
    return Aligned(first, marks[0], marks[1])
