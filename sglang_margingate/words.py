"""The words that code, traces and plots share; importable without pyarrow, pandas or SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class Reason(str, Enum):
    """Why a step was verified."""

    NONE = "none"
    """The step was not verified: the fast path's token stands."""
    MARGIN = "margin"
    """The margin was at or below the threshold: the step triggered."""
    AUDIT = "audit"
    """An untriggered step, verified at random to bound the missed-flip rate."""
    ALWAYS = "always"
    """The policy verifies every step."""
    RESUME = "resume"
    """First token after a retraction: generated columns were re-prefilled at another shape, so all are recomputed."""
    LIMIT = "limit"
    """The open window reached its limit (``--margingate-window``): verified, whatever its margin, to close it."""


class Guarantee(str, Enum):
    """What a finished response may claim, strongest first."""

    STRUCTURAL = "structural"
    """Every forward that it stands on ran in the canonical class."""
    VERIFIED = "verified"
    """Every step was verified, on canonical columns."""
    GATED = "gated"
    """Only low-margin steps were verified: empirical, with the audit's bound."""
    NONE = "none"
    """Nothing is claimed."""


def decode_sizes(invariance: Mapping[str, Any]) -> str:
    """Return in words which decode batches run inside their class, of a server's ``invariance`` as status and manifest have it."""
    graphs = {int(size): int(rows) for size, rows in (invariance.get("graph_rows") or {}).items()}
    if not graphs:
        return f"at {invariance.get('decode_rows', '?')} rows"
    apart = [rows for size, rows in graphs.items() if rows != size]
    return f"up to {max(graphs)} requests" + (f", single layers at up to {max(apart)} rows" if apart else "")
