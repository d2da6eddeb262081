"""Prompt sets by name: the embedded ones, random token ids, the usual benchmarks from a file or the hub, any JSONL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.prompts import random_ids
from sglang_margingate.bench.servers.client import Prompt

EMBEDDED = ("arith", "code", "story")


class DatasetError(ValueError):
    """A dataset cannot be used; one line with the place and the fix."""


class Source(NamedTuple):
    """Where a known dataset's user text lies."""

    field: str
    """Field of the user text in a row."""
    hub: str
    """Repository on the Hugging Face hub."""
    config: str | None
    split: str
    data_files: str | None = None
    text: Callable[[Any], str] = str
    """Turns the field's content into the user text."""


def _first_human_turn(conversations: Any) -> str:
    for turn in conversations:
        if turn.get("from") in ("human", "user"):
            return str(turn["value"])
    return ""


KNOWN: Mapping[str, Source] = {
    "gsm8k": Source("question", "openai/gsm8k", "main", "test"),
    "math500": Source("problem", "HuggingFaceH4/MATH-500", None, "test"),
    "humaneval": Source("prompt", "openai/openai_humaneval", None, "test"),
    "sharegpt": Source(
        "conversations",
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        None,
        "train",
        "ShareGPT_V3_unfiltered_cleaned_split.json",
        _first_human_turn,
    ),
}
ANY = Source("prompt", "", None, "")
"""Any file with a ``prompt`` field."""


def load(
    names: Sequence[str],
    data: Sequence[str] = (),
    limit: int | None = None,
    only: Sequence[str] = (),
    seed: int = 0,
    field: str | None = None,
) -> list[Prompt]:
    """Return the prompts of the named datasets as plain user text, in a fixed order.

    Prompts of ``random:INPUT:OUTPUT`` have their lengths; :func:`random_ids.draw` gives them their ids.

    Parameters
    ----------
    names
        Names of embedded or known datasets, or of ``data`` entries.
    data
        ``NAME=FILE`` entries, or one ``FILE`` for the only name that is not embedded; .jsonl, .json (a list), .gz.
    limit
        Prompts of each dataset; all by default.
    only
        Ids to keep; all by default.
    seed
        Of the lengths of random prompts.
    field
        Field of the user text in the rows of ``data``; by default the known dataset's, or ``prompt``.

    Raises
    ------
    DatasetError, RandomError
        One line: unknown name, unreadable file, missing field in line N, empty dataset.
    """
    files = files_of(names, data)
    if field is not None and not files:
        raise DatasetError(f"--field {field} names a field of a file; give the file with --data [NAME=]FILE")
    wanted = list(dict.fromkeys([*names, *files]))
    if not wanted:
        raise DatasetError(f"no dataset named; use --dataset with {', '.join(EMBEDDED)} or --data FILE")
    out: list[Prompt] = []
    for name in wanted:
        prompts = _one(name, files.get(name), limit, seed, field)
        if not prompts:
            raise DatasetError(f"dataset {name}: no prompts in it")
        taken = {p.id for p in out}
        out += [replace(p, id=f"{name}:{p.id}") if p.id in taken else p for p in prompts]
    if only:
        missing = sorted(set(only) - {p.id for p in out})
        if missing:
            raise DatasetError(f"no prompt named {missing[0]!r}; ids look like {out[0].id!r}")
        out = [p for p in out if p.id in only]
    return out


def files_of(names: Sequence[str], data: Sequence[str]) -> dict[str, Path]:
    """Return the file of each dataset that has one, from ``NAME=FILE`` entries."""
    files: dict[str, Path] = {}
    for entry in data:
        name, equals, path = entry.partition("=")
        if equals and "/" not in name:
            files[name] = Path(path)
            continue
        open_names = [n for n in names if n not in EMBEDDED and n not in files and not random_ids.is_random(n)]
        file = Path(entry)
        files[open_names[0] if open_names else file.name.split(".")[0]] = file
    for name, file in files.items():
        if not file.is_file():
            raise DatasetError(f"dataset {name}: no file {file}")
    return files


def _one(name: str, file: Path | None, limit: int | None, seed: int, field: str | None) -> list[Prompt]:
    if file is not None:
        source = KNOWN.get(name, ANY) if field is None else Source(field, "", None, "", text=_plain)
        return _from_rows(name, source, read_rows(file), limit, strict=field is not None)
    if random_ids.is_random(name):
        return random_ids.parse(name).prompts(limit, seed)
    if name in EMBEDDED:
        from sglang_margingate.demo.prompts import load_prompts

        return [Prompt(p.id, p.prompt, name) for p in load_prompts(name, limit)]
    if name in KNOWN:
        return _from_rows(name, KNOWN[name], _hub_rows(name, KNOWN[name]), limit)
    known = ", ".join([*EMBEDDED, *KNOWN, "random:INPUT:OUTPUT"])
    raise DatasetError(f"unknown dataset {name!r}; known are {known}, or name a file with --data {name}=FILE")


def read_rows(file: Path) -> Iterable[tuple[str, Any]]:
    """Yield (place, row) of a .jsonl, .json or .gz file; the place names file and line for messages."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error})") from None
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{file}: not valid JSON ({error})") from None
        yield from ((f"{file}: item {i}", row) for i, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{file}: line {number} is not valid JSON ({error.msg})") from None
        yield f"{file}: line {number}", row


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _from_rows(
    name: str, source: Source, rows: Iterable[tuple[str, Any]], limit: int | None, strict: bool = False
) -> list[Prompt]:
    prompts: list[Prompt] = []
    ids: set[str] = set()
    for place, row in rows:
        if limit is not None and len(prompts) >= limit:
            break
        # A known dataset's file may have been converted to the plain `prompt` form.
        field = source.field if strict or (isinstance(row, dict) and source.field in row) else ANY.field
        if not isinstance(row, dict):
            raise DatasetError(f"{place} is not an object with a field {source.field!r}")
        if field not in row:
            found = ", ".join(map(str, row)) or "none at all"
            raise DatasetError(
                f"{place} has no field {source.field!r}, but {found}; name the user text's with --field NAME"
            )
        try:
            text = source.text(row[field]) if field == source.field else str(row[field])
        except (TypeError, KeyError, AttributeError):
            raise DatasetError(f"{place}: field {field!r} has an unknown form, not the user's text") from None
        if not text.strip():
            if field == source.field and source.text is _first_human_turn:
                continue  # a conversation that the assistant opened
            raise DatasetError(f"{place}: field {field!r} is empty")
        given = str(row.get("id") or row.get("task_id") or "")
        ident = given if given and given not in ids else f"{name}-{len(prompts):04d}"
        ids.add(ident)
        prompts.append(Prompt(ident, text, name))
    return prompts


def _hub_rows(name: str, source: Source) -> Iterable[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DatasetError(
            f"dataset {name}: give its file with --data {name}=FILE, or pip install datasets to fetch {source.hub}"
        ) from None
    try:
        rows = datasets.load_dataset(source.hub, source.config, split=source.split, data_files=source.data_files)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise DatasetError(
            f"dataset {name}: {source.hub} cannot be fetched ({reason}); use --data {name}=FILE"
        ) from None
    return ((f"{name}: row {i}", row) for i, row in enumerate(rows, 1))
