"""What became of each step: stable, would trigger, triggered, flipped, repaired or missed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from margingate_dashboard.theme import STATES
from sglang_margingate.gate.columns import examined_rows, missed_rows, outcome_rows, verified_rows

CODE = {state.name: code for code, state in enumerate(STATES)}

STATE_COLUMNS = ("triggered", "reason", "flipped", "repaired")
"""Step columns that :func:`classify` reads."""


def as_bool(column: pd.Series) -> np.ndarray:
    """Return a boolean array; null counts as false (the column may be pandas' nullable type)."""
    if column.dtype == bool:
        return column.to_numpy()
    return column.astype("boolean").fillna(False).to_numpy(dtype=bool)


def triggered(steps: pd.DataFrame) -> np.ndarray:
    """Tell which steps triggered, as the server recorded it; null counts as not."""
    return as_bool(steps["triggered"])


def verified(steps: pd.DataFrame) -> np.ndarray:
    """Tell which steps were verified, for any reason."""
    return verified_rows(steps["reason"])


def examined(steps: pd.DataFrame) -> np.ndarray:
    """Tell which steps a missed flip could be seen at: untriggered ones that the audit or `always` verified."""
    return examined_rows(steps["reason"], triggered(steps))


def above(steps: pd.DataFrame) -> np.ndarray:
    """Tell which steps are flips above the threshold: an audit or the policy `always` saw them, the margin would not have."""
    return missed_rows(steps["reason"], triggered(steps), as_bool(steps["flipped"]))


def classify(steps: pd.DataFrame) -> np.ndarray:
    """Return a state code for each step row (index in :data:`margingate_dashboard.theme.STATES`).

    The definition is the server's: :func:`sglang_margingate.gate.policy.outcome`.
    """
    return outcome_rows(steps["reason"], triggered(steps), as_bool(steps["flipped"]), as_bool(steps["repaired"]))
