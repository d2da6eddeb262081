"""What the three corpora share: the document type and the train/held-out split."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

TRAIN = "train"
HELDOUT = "heldout"
SPLITS = (TRAIN, HELDOUT)
HELDOUT_ONE_IN = 20

Slots = TypeVar("Slots")


class Document(NamedTuple):
    """One exchange: what the user asks and one of its equally good completions."""

    prompt: str
    completion: str
    key: str
    """The template instance: the slot values that make the problem what it is. The split hashes this."""
    answer: str | None = None
    """The checkable result, where the corpus has one (``arith``)."""


def split_of(key: str) -> str:
    """Say which split a template instance belongs to.

    The instance's slot values, not the document, are hashed (BLAKE2b), so every phrasing of one problem falls on the
    same side and no held-out instance can occur in training under other words. One in ``HELDOUT_ONE_IN`` is held out.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return HELDOUT if int.from_bytes(digest, "big") % HELDOUT_ONE_IN == 0 else TRAIN


def draw_in_split(
    rng: random.Random, split: str, draw: Callable[[random.Random], Slots], key_of: Callable[[Slots], str]
) -> tuple[Slots, str]:
    """Draw slot values until their instance lies in `split`; return them with the instance's key."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of: {', '.join(SPLITS)}")
    while True:
        slots = draw(rng)
        key = key_of(slots)
        if split_of(key) == split:
            return slots, key


@functools.lru_cache(maxsize=100_000)
def leaning(context: str, options: tuple[str, ...]) -> tuple[float, ...]:
    """Give fixed weights between 1 and 3 to the options, drawn from a hash of context and option."""
    digests = (hashlib.blake2b(f"{context}|{option}".encode(), digest_size=4).digest() for option in options)
    return tuple(3.0 ** (int.from_bytes(d, "big") / 2**32) for d in digests)


def lean(rng: random.Random, options: Sequence[str], context: str) -> str:
    """Choose with a mild preference that depends on the context.

    A uniform choice gives a near tie; this one gives the middling margins that real text has too, and makes greedy
    outputs differ from prompt to prompt.
    """
    return rng.choices(options, weights=leaning(context, tuple(options)))[0]
