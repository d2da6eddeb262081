"""What ``--margingate-trace-keep`` says: how long, and how much of the traces folder, is kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

_AGES = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_SIZES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
_PART = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([a-zA-Z]+)", re.ASCII)


@dataclass(frozen=True)
class Keep:
    """Limits of a traces folder; None is no limit."""

    seconds: float | None = None
    """Age of a run, since its end."""
    size: float | None = None
    """Bytes of all runs."""
    text: str = "off"

    def __bool__(self) -> bool:
        return self.seconds is not None or self.size is not None


def parse_keep(text: str) -> Keep:
    """Parse ``30d,20GB``: an age (m, h, d, w), a size (MB, GB, TB), or both; ``off`` is no limit.

    Raises
    ------
    ValueError
        Something else is there; the message names the value and what is expected.
    """
    wanted = 'an age (m, h, d, w), a size (MB, GB, TB) or both, such as "30d,20GB", or off'
    if text.strip().lower() == "off":
        return Keep()
    found: dict[str, float] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        unit = match[2] if match else ""
        key, scale = ("seconds", _AGES.get(unit.lower())) if len(unit) == 1 else ("size", _SIZES.get(unit.upper()))
        if match is None or scale is None or float(match[1]) <= 0:
            raise ValueError(f"{text!r}: {part.strip()!r} is not understood; give {wanted}")
        if key in found:
            raise ValueError(f"{text!r} gives two limits of one kind; give {wanted}")
        found[key] = float(match[1]) * scale
    return Keep(found.get("seconds"), found.get("size"), text.strip())
