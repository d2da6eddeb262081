"""The gate's words for whole columns: as for one step, asked once a word."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_margingate.gate.columns import examined_rows, missed_rows
from sglang_margingate.gate.policy import NEVER_MISSED, missed
from sglang_margingate.words import Reason

STEPS = list(itertools.product(Reason, (False, True), (False, True)))


@pytest.mark.parametrize("column", [pd.Categorical, pd.Series, lambda words: np.array(words, dtype=object)])
def test_they_say_what_one_step_says(column: Any) -> None:
    reasons = column([reason.value for reason, _, _ in STEPS])
    triggered, flipped = (np.array([step[k] for step in STEPS]) for k in (1, 2))
    assert missed_rows(reasons, triggered, flipped).tolist() == [missed(*step) for step in STEPS]
    assert examined_rows(reasons, triggered).tolist() == [
        reason is not Reason.NONE and reason not in NEVER_MISSED and not low for reason, low, _ in STEPS
    ]


def test_a_null_and_a_word_of_a_later_version_count_as_none() -> None:
    reasons = pd.Series([None, "", "later", Reason.RESUME.value, Reason.AUDIT.value], dtype=object)
    no, yes = np.zeros(5, bool), np.ones(5, bool)
    assert missed_rows(reasons, no, yes).tolist() == [True, True, True, False, True]
    assert examined_rows(reasons, no).tolist() == [False, False, True, False, True]
    assert not missed_rows(reasons, yes, yes).any()
    assert not examined_rows(reasons, yes).any()
