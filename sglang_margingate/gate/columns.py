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
    import pandas as pd

    words = pd.Categorical(reason)
    known = {word.value: word for word in Reason}
    # The last entry is for nulls, whose code is -1.
    counts = [missed(known.get(str(word), Reason.NONE), False, True) for word in words.categories] + [True]
    return flipped & ~triggered & np.array(counts)[words.codes]
