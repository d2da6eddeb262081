"""The gate's words for whole columns of a trace: the same definitions as for one step, asked once a word."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_margingate.gate.policy import OUTCOMES, missed
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


def outcome_rows(reason: Any, triggered: np.ndarray, flipped: np.ndarray, repaired: np.ndarray) -> np.ndarray:
    """Return what became of each step, as an index into :data:`~sglang_margingate.gate.policy.OUTCOMES`.

    :func:`sglang_margingate.gate.policy.outcome` for columns.
    """
    index = {name: code for code, name in enumerate(OUTCOMES)}
    code = np.where(triggered, index["triggered"], index["stable"]).astype(np.int8)
    code[triggered & ~verified_rows(reason)] = index["would trigger"]
    code[flipped] = index["flipped"]
    code[missed_rows(reason, triggered, flipped)] = index["missed"]
    code[flipped & repaired] = index["repaired"]
    return code


def verified_rows(reason: Any) -> np.ndarray:
    """Return which steps were verified, for any reason; a null counts as ``none``."""
    import pandas as pd

    words = pd.Categorical(reason)
    # The last entry is for nulls, whose code is -1.
    named = [str(word) not in ("none", "") for word in words.categories] + [False]
    found: np.ndarray = np.array(named)[words.codes]
    return found


def examined_rows(reason: Any, triggered: np.ndarray) -> np.ndarray:
    """Return which steps could show a missed flip: not triggered, and verified by the audit or the policy ``always``.

    Steps that are verified whatever their margin (``resume``, ``limit``) are no sample of those that are not.
    """
    return verified_rows(reason) & ~triggered & _missable(reason)


def _missable(reason: Any) -> np.ndarray:
    """Return for each step whether a flip of it, above the threshold, counts as missed."""
    import pandas as pd

    words = pd.Categorical(reason)
    known = {word.value: word for word in Reason}
    # The last entry is for nulls, whose code is -1.
    counts = [missed(known.get(str(word), Reason.NONE), False, True) for word in words.categories] + [True]
    found: np.ndarray = np.array(counts)[words.codes]
    return found
