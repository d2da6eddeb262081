"""Which configuration a bank of fused experts runs with at each number of rows: a table that no companion can change.

SGLang picks the nearest of some tuned configurations by the number of rows. A table here is the same at every start, and
what it does to a row's bits is probed (:mod:`.probe`): where two configurations give the same, so does the map.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_margingate.canonical.map_store import differences, readable

log = logging.getLogger(__name__)

SCHEMA = "margingate-experts/1"

Config = Mapping[str, int]

FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
"""What a configuration says; SGLang may leave the last two to Triton."""


def short(config: Config) -> str:
    """Return a configuration in a few characters."""
    return "/".join(str(value) for value in config.values())


class TableError(ValueError):
    """A kept table cannot be used; one line that says why."""


@dataclass(frozen=True)
class BankShape:
    """What configurations are chosen for.

    Parameters
    ----------
    experts, inner, hidden, top_k
        Experts of a bank, their intermediate and hidden size, and how many of them a row goes to.
    dtype
        Of the weights.
    """

    experts: int
    inner: int
    hidden: int
    top_k: int
    dtype: str = "bfloat16"

    def describe(self) -> str:
        """Return the shape in words."""
        return f"{self.top_k} of {self.experts} experts of {self.hidden} x {self.inner}, {self.dtype}"


@dataclass(frozen=True)
class ExpertTable:
    """A bank's configurations.

    Parameters
    ----------
    steps
        (most rows, configuration), by rows; the last one serves all larger numbers as well.
    source
        Where it comes from, in words.
    """

    steps: tuple[tuple[int, Config], ...]
    source: str = ""

    def __post_init__(self) -> None:
        rows = [most for most, _ in self.steps]
        if not rows or rows != sorted(set(rows)) or rows[0] < 1:
            raise TableError("its numbers of rows do not rise from 1")
        for most, config in self.steps:
            wrong = [name for name, value in config.items() if name not in FIELDS or not _whole(value)]
            missing = [name for name in FIELDS[:4] if name not in config]
            if wrong or missing:
                raise TableError(
                    f"its configuration for up to {most} rows has a wrong or missing {(wrong + missing)[0]}"
                )

    def at(self, rows: int) -> Config:
        """Return the configuration for a number of rows."""
        return next((config for most, config in self.steps if rows <= most), self.steps[-1][1])

    def describe(self) -> str:
        """Return what it does, without where it comes from; part of a kept map's key."""
        shown = [f"{'/'.join(str(v) for v in config.values())} to {most}" for most, config in self.steps[:-1]]
        return ", ".join([*shown, "/".join(str(v) for v in self.steps[-1][1].values())])

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return {"source": self.source, "steps": [[most, dict(config)] for most, config in self.steps]}

    @classmethod
    def from_dict(cls, data: Any) -> ExpertTable:
        """Read what :meth:`to_dict` returned; anything else raises :class:`TableError`."""
        try:
            steps = tuple((most, dict(config)) for most, config in data["steps"])
            return cls(steps, str(data["source"]))
        except TableError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise TableError(f"a field is missing or wrong ({error})") from None


def table_of(choose: Callable[[int], Config], rows: Sequence[int], source: str) -> ExpertTable:
    """Return a table that does what somebody's choice does.

    Parameters
    ----------
    choose
        Configuration by number of rows.
    rows
        Numbers of rows to ask for, ascending; those between one and the next are served as the next.
    source
        Whose choice it is, in words.
    """
    steps: list[tuple[int, Config]] = []
    for m in rows:
        config = {name: value for name, value in choose(m).items() if name in FIELDS}
        if steps and steps[-1][1] == config:
            steps.pop()
        steps.append((m, config))
    return ExpertTable(tuple(steps), source)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def table_path(folder: str, shape: BankShape, environment: Mapping[str, Any]) -> Path:
    """Return the file of a tuned table: the device's name and the shape, so that people find it."""
    words = f"{environment.get('device', 'unknown')} experts {shape.experts} {shape.top_k} {shape.hidden} {shape.inner} {shape.dtype}"
    return Path(folder) / f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}.json"


def save_table(path: Path, shape: BankShape, table: ExpertTable, environment: Mapping[str, Any], **facts: Any) -> None:
    """Write a tuned table, whole or not at all, with what it was tuned on and what was measured."""
    data = {"schema": SCHEMA, "shape": vars(shape), "environment": environment, **table.to_dict(), **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(readable(data) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def kept_table(folder: str | None, shape: BankShape, environment: Mapping[str, Any]) -> ExpertTable | None:
    """Return the table that was tuned for this shape on this machine; None where there is none, or none that can be used.

    Why one cannot be used is said in the log: the server then keeps to SGLang's own choice, which costs time at most.
    """
    if folder is None:
        return None
    path = table_path(folder, shape, environment)
    try:
        return _read(path, shape, environment)
    except FileNotFoundError:
        return None
    except TableError as error:
        log.warning("margingate: the table of experts in %s is not used, SGLang's own choice is: %s", path, error)
        return None


def _read(path: Path, shape: BankShape, environment: Mapping[str, Any]) -> ExpertTable:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TableError(f"it cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is damaged ({error})") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise TableError(f"its schema is not {SCHEMA!r}")
    if data.get("shape") != vars(shape):
        raise TableError("its shape is not the one its name stands for")
    elsewhere = differences(data.get("environment") or {}, dict(environment))
    if elsewhere:
        raise TableError(f"it was tuned elsewhere: {'; '.join(elsewhere)}")
    return replace(ExpertTable.from_dict(data), source=f"{data['source']}, kept in {path}")
