"""JSON from files that people and other programs write: what Python's reader lets through is refused in one line."""

from __future__ import annotations

import json
from typing import Any

LONGEST_NUMBER = 40
"""Digits of the longest number that is read: more than any setting or count has."""


class JsonError(ValueError):
    """A text is not JSON that this project reads; one line, without the name of its source."""


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises
    ------
    JsonError
        Not JSON, nested too deeply, with NaN or Infinity, with a number of absurd length, or with a key given twice.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_short_int, parse_float=_finite
        )
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise JsonError(f"the key {twice[:40]!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise JsonError(f"{name} is not a number in JSON")


def _short_int(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise JsonError(f"a number of {len(digits)} digits ({digits[:8]}...)")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise JsonError(f"a number too large to be one ({digits[:20]})")
    return value
