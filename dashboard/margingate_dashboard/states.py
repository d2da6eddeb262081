"""What became of each step: stable, triggered, flipped, repaired or missed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, STABLE, STATES, TRIGGERED
from sglang_margingate.gate.columns import examined_rows, missed_rows

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
    reason = steps["reason"]
    if isinstance(reason.dtype, pd.CategoricalDtype):
        categories = np.asarray(reason.cat.categories.astype(str))
        is_none = np.append(np.isin(categories, ("none", "")), True)  # code -1 (null) reads the last entry
        return ~is_none[reason.cat.codes.to_numpy()]
    return ~reason.fillna("none").isin(("none", "")).to_numpy()


def examined(steps: pd.DataFrame) -> np.ndarray:
    """Tell which steps a missed flip could be seen at: untriggered ones that the audit or `always` verified."""
    return examined_rows(steps["reason"], triggered(steps))


def classify(steps: pd.DataFrame) -> np.ndarray:
    """Return a state code for each step row (index in :data:`margingate_dashboard.theme.STATES`).

    ::

        missed (flipped, and only an audit or the policy `always` looked)  -> missed
        flipped and repaired                                               -> repaired
        flipped                                                            -> flipped
        triggered                                                          -> triggered
        otherwise                                                          -> stable
    """
    low = triggered(steps)
    flip = as_bool(steps["flipped"])
    code = np.where(low, CODE[TRIGGERED.name], CODE[STABLE.name]).astype(np.int8)
    code[flip] = CODE[FLIPPED.name]
    code[flip & as_bool(steps["repaired"])] = CODE[REPAIRED.name]
    # `always` repairs above the threshold too; the gate would have missed it, which is what this state says.
    code[missed_rows(steps["reason"], low, flip)] = CODE[MISSED.name]
    return code
