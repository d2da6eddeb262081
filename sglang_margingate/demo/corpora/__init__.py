"""Three synthetic corpora, each with its own margin character.

``arith`` has long forced stretches (digits) between a few free phrasings, ``code`` has free names and idioms that
later tokens must copy, ``story`` has a free choice every few words. Most free choices are drawn uniformly, so a
trained model gives them nearly equal logits: those are the near ties at which a batch can flip a token. Some lean on
the prompt, which gives the middling margins between a tie and a certainty.
"""

from __future__ import annotations

import random
from types import ModuleType

from sglang_margingate.demo.corpora import arith, code, story
from sglang_margingate.demo.corpora.base import HELDOUT, SPLITS, TRAIN, Document, split_of

__all__ = ["CORPORA", "HELDOUT", "SPLITS", "TRAIN", "Document", "generate", "get_corpus", "split_of"]

CORPORA: dict[str, ModuleType] = {"arith": arith, "code": code, "story": story}


def get_corpus(name: str) -> ModuleType:
    """Return a corpus module by name."""
    try:
        return CORPORA[name]
    except KeyError:
        raise ValueError(f"unknown corpus {name!r}; choose one of: {', '.join(CORPORA)}") from None


def generate(name: str, rng: random.Random, split: str = TRAIN) -> Document:
    """Draw one document of corpus `name`; the same `rng` state gives the same document."""
    document: Document = get_corpus(name).generate(rng, split)
    return document
