"""Prompts of random token ids, for models without a tokenizer or without trained weights: ``random:INPUT:OUTPUT``.

Lengths are known at once; the ids are drawn when the vocabulary is (:func:`draw`). An id beyond the vocabulary ends
SGLang's server, so a vocabulary is never guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.servers.client import Prompt

NAME = "random"
DEFAULT = "random:512:128"
"""What the bare name stands for."""

DEFAULT_COUNT = 32
_LENGTHS = re.compile(r"(\d+)(?:-(\d+))?")


class RandomError(ValueError):
    """Random prompts cannot be made; one line that names the field and the fix."""


class Lengths(NamedTuple):
    """Tokens of a prompt, or to generate: a range, both ends included."""

    least: int
    most: int


class Spec(NamedTuple):
    """A dataset of random token ids."""

    name: str
    input: Lengths
    output: Lengths

    def prompts(self, count: int | None, seed: int) -> list[Prompt]:
        """Return the prompts with their lengths; every id is 0 until :func:`draw`."""
        rng = random.Random(f"{seed}:{self.name}")
        out = []
        for i in range(DEFAULT_COUNT if count is None else count):
            tokens, new = rng.randint(*self.input), rng.randint(*self.output)
            out.append(Prompt(f"{NAME}-{i:04d}", "", self.name, ids=(0,) * tokens, max_tokens=new))
        return out


def is_random(name: str) -> bool:
    """Return whether a dataset's name asks for random token ids."""
    return name == NAME or name.startswith(NAME + ":")


def parse(name: str) -> Spec:
    """Return the dataset that a name stands for.

    Parameters
    ----------
    name
        ``random`` or ``random:INPUT:OUTPUT``; each a number of tokens or a range, as ``100-900``.

    Raises
    ------
    RandomError
        One line that names the field, its value and the fix.
    """
    fields = (DEFAULT if name == NAME else name).split(":")[1:]
    if len(fields) != 2:
        raise RandomError(f"dataset {name}: give the lengths of input and output, as {DEFAULT} or random:100-900:64")
    return Spec(name, _lengths(name, "INPUT", fields[0]), _lengths(name, "OUTPUT", fields[1]))


def _lengths(name: str, field: str, text: str) -> Lengths:
    found = _LENGTHS.fullmatch(text)
    fix = "give a whole number of at least 1, or a range as 100-900"
    if found is None:
        raise RandomError(f"dataset {name}: {field} {text!r} is not a number of tokens; {fix}")
    least = int(found[1])
    most = int(found[2] or least)
    if least < 1:
        raise RandomError(f"dataset {name}: {field} {text!r} begins below 1; {fix}")
    if most < least:
        raise RandomError(f"dataset {name}: {field} {text!r} ends below its beginning; turn it round: {most}-{least}")
    return Lengths(least, most)


def draw(prompts: Sequence[Prompt], vocabulary: int, seed: int) -> list[Prompt]:
    """Return the prompts with ids drawn evenly below ``vocabulary``; prompts of text stay as they are.

    A prompt's ids depend on the seed, its dataset, its name and the vocabulary only: not on how many others there are.
    """
    out = []
    for p in prompts:
        if p.ids:
            rng = random.Random(f"{seed}:{p.dataset}:{p.id}")
            p = replace(p, ids=tuple(rng.randrange(vocabulary) for _ in p.ids))
        out.append(p)
    return out


def digest(prompts: Sequence[Prompt]) -> str:
    """Return a fingerprint of what is sent: equal exactly when two runs had the same prompts."""
    found = hashlib.sha256()
    for p in prompts:
        found.update(json.dumps([p.id, p.dataset, p.text, p.ids, p.max_tokens]).encode())
    return found.hexdigest()[:16]


class ModelFacts(NamedTuple):
    """What a model's ``config.json`` says; None where it cannot be read or does not say."""

    vocabulary: int | None
    context: int | None


def model_facts(model: str, overrides: str | None = None) -> ModelFacts:
    """Read a model's vocabulary and context; SGLang's HTTP API gives neither.

    Parameters
    ----------
    model
        Folder, or hub id of a model that was downloaded here.
    overrides
        The server's ``--json-model-override-args``.
    """
    config = {**read_config(model), **_object(overrides or "{}")}
    # A multimodal model keeps its language model's numbers in a part of their own.
    inner = config.get("text_config")
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    return ModelFacts(_whole(config.get("vocab_size")), _whole(config.get("max_position_embeddings")))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def read_config(model: str) -> dict[str, Any]:
    """Return a model's ``config.json``; empty where it cannot be read on this machine."""
    file = Path(model) / "config.json"
    if not file.is_file():
        file = _in_hub_cache(model)
    try:
        return _object(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _in_hub_cache(model: str) -> Path:
    """Return where a hub model's config lies on this machine; never asks the network."""
    if os.path.isabs(model) or model.count("/") != 1:
        return Path(os.devnull)
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return Path(os.devnull)
    found = try_to_load_from_cache(model, "config.json")
    return Path(found) if isinstance(found, str) else Path(os.devnull)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def vocabulary_of(model: str, facts: ModelFacts, given: int | None) -> int:
    """Return the number of ids to draw from: ``--vocab``, checked against the model where that is known.

    Raises
    ------
    RandomError
        Neither is known, or ``--vocab`` is larger than the model's.
    """
    known = facts.vocabulary
    if given is None and known is None:
        raise RandomError(
            f"--vocab: the vocabulary of {model} is not known here (no config.json with vocab_size); "
            "give its size with --vocab N"
        )
    if given is not None and known is not None and given > known:
        raise RandomError(
            f"--vocab {given}: the model has {known} ids, and one beyond them would end the server; "
            "give less or leave it out"
        )
    return int(given if given is not None else known or 0)


def check_context(prompts: Sequence[Prompt], context: int | None) -> None:
    """Refuse prompts that cannot fit: the server would say so only when it has started.

    Raises
    ------
    RandomError
        A prompt and its output are longer than ``context`` tokens.
    """
    for p in prompts:
        if context is not None and p.ids and len(p.ids) + (p.max_tokens or 0) > context:
            raise RandomError(
                f"dataset {p.dataset}: {len(p.ids)} + {p.max_tokens} tokens do not fit the model's context of "
                f"{context}; ask for shorter ones"
            )
