"""What is sent: requests of one turn, and conversations whose turns stand on the server's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.prompts.datasets import DatasetError, read_rows
from sglang_margingate.bench.servers.client import Completion, Prompt
from sglang_margingate.bench.workload.loads import Load

TOKEN_CHARACTERS = 4
"""Characters of a token, where lengths of text stand for lengths in tokens and nobody can count them."""

GROUP = 4
"""Conversations that share a prefix."""


@dataclass(frozen=True)
class Chain:
    """Requests that are sent one after the other, each when the one before has its answer."""

    turns: tuple[Prompt, ...]
    """The first is a whole prompt; each further one is what the user adds."""
    at: float | None = None
    """Seconds from the start at which the first is sent, where a file says so."""

    def after(self, prefixes: Sequence[Prompt], number: int) -> Chain:
        """Return the chain, the ``number``-th of its load, behind the prefix of its group."""
        shared, first = prefixes[number // GROUP], self.turns[0]
        first = replace(first, ids=shared.ids + first.ids, text=shared.text + first.text)
        return replace(self, turns=(first, *self.turns[1:]))

    def most_tokens(self) -> int:
        """Return the tokens that the last turn holds at its end; 0 for text, which only a tokenizer can count."""
        return sum(len(t.ids) + (t.max_tokens or 0) for t in self.turns) if self.turns[0].ids else 0


def follow(before: Prompt, answer: Completion, turn: Prompt, closing: str = "") -> Prompt:
    """Return the prompt of a turn: everything before, the answer as this server gave it, and what the user adds."""
    if before.ids:
        return replace(turn, ids=before.ids + answer.tokens + turn.ids)
    return replace(turn, text=before.text + answer.text + closing + turn.text)


def chains(load: Load, prompts: Sequence[Prompt], count: int, prefixes: Sequence[Prompt] = ()) -> list[Chain]:
    """Return the requests of a load, ``count`` in all, from prompts as they are sent.

    Parameters
    ----------
    prefixes
        For sessions: what the conversations of a group share, one for each group.
    """
    prompts = spread(prompts)[:count]
    if load.kind != "sessions":
        return [Chain((p,)) for p in prompts]
    out = [Chain(tuple(prompts[i : i + load.turns])) for i in range(0, len(prompts), load.turns)]
    return [c.after(prefixes, i) for i, c in enumerate(out)] if prefixes else out


def groups(load: Load, count: int) -> int:
    """Return how many groups of conversations ``count`` requests make."""
    conversations = -(-count // load.turns)
    return -(-conversations // GROUP)


def blank_prefixes(load: Load, count: int) -> list[Prompt]:
    """Return the shared prefixes of token ids, to be drawn; none for other loads."""
    if load.kind != "sessions" or not load.prefix:
        return []
    return [Prompt(f"prefix-{i:03d}", "", load.name, ids=(0,) * load.prefix) for i in range(groups(load, count))]


def text_prefixes(load: Load, count: int, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return shared prefixes of text: what a user might have said before, about ``load.prefix`` tokens of it."""
    if load.kind != "sessions" or not load.prefix:
        return []
    out = []
    for i in range(groups(load, count)):
        words, at = "", i
        while len(words) < load.prefix * TOKEN_CHARACTERS:
            words += prompts[at % len(prompts)].text + "\n"
            at += 1
        out.append(Prompt(f"prefix-{i:03d}", words[: load.prefix * TOKEN_CHARACTERS], load.name))
    return out


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with their datasets taking turns, so that a part of them holds some of each."""
    by: dict[str, list[Prompt]] = {}
    for p in prompts:
        by.setdefault(p.dataset, []).append(p)
    place = {name: i for i, name in enumerate(by)}
    ranked = [(i, place[name], p) for name, found in by.items() for i, p in enumerate(found)]
    return [p for *_, p in sorted(ranked, key=lambda r: r[:2])]


def as_ids(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return prompts of text as token ids of about their length, to be drawn: for a server without a tokenizer."""
    return [p if p.ids else replace(p, text="", ids=(0,) * tokens_of(p.text)) for p in prompts]


def tokens_of(text: str) -> int:
    """Return about how many tokens a text has."""
    return max(1, round(len(text) / TOKEN_CHARACTERS))


# ---- files --------------------------------------------------------------------------------------------------------------


def sharegpt(file: Path, limit: int, name: str = "sharegpt") -> list[Prompt]:
    """Return the user's messages of a ShareGPT file, each with the length of the reply that it got there.

    Raises
    ------
    DatasetError
        One line: the file cannot be read, or a line of it has not the form; with line and field.
    """
    if not file.is_file():
        raise DatasetError(f"dataset {name}: no file {file}")
    out: list[Prompt] = []
    for place, row in read_rows(file):
        for asked, reply in _exchanges(place, row):
            if len(out) == limit:
                return out
            out.append(Prompt(f"{name}-{len(out):04d}", asked, name, max_tokens=tokens_of(reply)))
    if not out:
        raise DatasetError(f"dataset {name}: {file} holds no message with a reply")
    return out


def _exchanges(place: str, row: Any) -> list[tuple[str, str]]:
    talk = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(talk, list):
        raise DatasetError(f"{place}: field 'conversations' is missing or no list; give a file in ShareGPT's form")
    for i, said in enumerate(talk):
        for field in ("from", "value"):
            if not isinstance(said, dict) or not isinstance(said.get(field), str):
                raise DatasetError(f"{place}: field 'conversations[{i}].{field}' is missing or no text")
    return [
        (a["value"], b["value"])
        for a, b in pairwise(talk)
        if a["from"] in ("human", "user") and b["from"] in ("gpt", "assistant") and a["value"].strip() and b["value"]
    ]


def replayed(file: Path, limit: int | None = None) -> list[Chain]:
    """Return the requests of a file of JSON lines: ``at`` (seconds), ``output``, and ``input`` (both tokens) or ``prompt``.

    Raises
    ------
    UsageError, DatasetError
        One line: no such file, or a line of it is broken; with line, field and fix.
    """
    if not file.is_file():
        raise UsageError(f"--workload replay:{file}: no such file")
    out: list[Chain] = []
    for place, row in read_rows(file):
        if len(out) == limit:
            break
        if not isinstance(row, dict):
            raise DatasetError(f"{place} is not an object with the fields at, input or prompt, output")
        at = _number(place, row, "at", 0)
        new = int(_number(place, row, "output", 1, whole=True))
        if "prompt" in row:
            if not isinstance(row["prompt"], str) or not row["prompt"].strip():
                raise DatasetError(f"{place}: field 'prompt' is {row['prompt']!r}; give text, or input in tokens")
            prompt = Prompt(f"replay-{len(out):05d}", row["prompt"], "replay", max_tokens=new)
        else:
            tokens = int(_number(place, row, "input", 1, whole=True))
            prompt = Prompt(f"replay-{len(out):05d}", "", "replay", ids=(0,) * tokens, max_tokens=new)
        out.append(Chain((prompt,), at))
    if not out:
        raise DatasetError(f"{file}: holds no request")
    return sorted(out, key=lambda c: c.at or 0.0)


def _number(place: str, row: dict[str, Any], field: str, least: int, whole: bool = False) -> float:
    value = row.get(field)
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if field not in row or value is None or not good or not least <= value < float("inf"):
        found = f"is {value!r}" if field in row else "is missing"
        raise DatasetError(
            f"{place}: field {field!r} {found}; give a {'whole ' if whole else ''}number from {least} up"
        )
    return float(value)
