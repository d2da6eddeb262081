"""The gate's words for whole columns of a trace: the same definitions as for one step, asked once a word."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_margingate.gate.policy import missed
from sglang_margingate.words import Reason


def missed_rows(reason: Any, triggered: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """Return which steps are missed flips: :func:`sglang_margingate.gate.policy.missed` for columns.

    Parameters
    ----------
    reason
        Words of :class:`~sglang_margingate.words.Reason`, as a pandas column (a categorical is fastest) or an array; a
        null and an unknown word count as ``none``.
    triggered, flipped
        Boolean arrays of the same length.
    """
    return flipped & ~triggered & _missable(reason)


def examined_rows(reason: Any, triggered: np.ndarray) -> np.ndarray:
    """Return which steps could show a missed flip: not triggered, and verified by the audit or the policy ``always``.

    Steps that are verified whatever their margin (``resume``, ``limit``) are no sample of those that are not.
    """
    import pandas as pd

    known = ~pd.Series(np.asarray(reason, dtype=object)).isin(("none", "", None)).to_numpy()
    return known & ~triggered & _missable(reason)


def _missable(reason: Any) -> np.ndarray:
    """Return for each step whether a flip of it, above the threshold, counts as missed."""
    import pandas as pd

    words = pd.Categorical(reason)
    known = {word.value: word for word in Reason}
    # The last entry is for nulls, whose code is -1.
    counts = [missed(known.get(str(word), Reason.NONE), False, True) for word in words.categories] + [True]
    found: np.ndarray = np.array(counts)[words.codes]
    return found
