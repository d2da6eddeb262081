"""Policy as a dimension: which policy a request ran under, and in which order policies are shown."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

NOT_OBSERVED = "not observed"
"""A request whose policy looks at steps, and of which none was looked at: it was sampled, for the most part."""
RUNNING = "running"
"""A request without a row: its policy is written when it ends."""
ORDER = ("gate", "always", "log", "off", NOT_OBSERVED, RUNNING)
VERIFYING = ("gate", "always")
"""Policies under which a flip can be seen."""


def may_verify(policy: str) -> bool:
    """Tell whether flips can be seen under a policy; under one that is not known yet they may be."""
    return policy not in ("log", "off", NOT_OBSERVED)


COLUMNS = ("policy", "steps", "max_batch_rows")
"""Request columns that :func:`shown_policy` reads."""


def observed(requests: pd.DataFrame) -> np.ndarray:
    """Tell which requests have steps in the trace.

    A row names how many since schema 2.1. Before, a request without any had a largest batch of 0.
    """
    steps = requests["steps"].to_numpy(dtype=np.float64, na_value=np.nan)
    rows = requests["max_batch_rows"].to_numpy(dtype=np.float64, na_value=1.0)
    found: np.ndarray = np.where(np.isnan(steps), rows > 0, steps > 0)
    return found


def shown_policy(requests: pd.DataFrame) -> pd.Categorical:
    """Return each request's policy as every page shows it."""
    named = requests["policy"].astype(object).to_numpy(dtype=object, na_value="unknown").astype(str).astype(object)
    unseen = ~observed(requests) & np.isin(named, ("gate", "always", "log"))
    return pd.Categorical(np.where(unseen, NOT_OBSERVED, named))


def with_policy(requests: pd.DataFrame) -> pd.DataFrame:
    """Return request rows with their policies as shown."""
    return requests.assign(policy=shown_policy(requests))


def of_request(numbers: pd.Series, requests: pd.DataFrame, name: str) -> pd.Categorical:
    """Return for each step, by the number of its request, what that request's row says; one without a row is said to run."""
    known = dict(zip(requests["request"].tolist(), requests[name].astype(str).tolist()))
    codes, found = pd.factorize(numbers, use_na_sentinel=False)
    by_request = pd.Categorical([known.get(n, RUNNING) if pd.notna(n) else "unknown" for n in found])
    return pd.Categorical.from_codes(by_request.codes[codes], by_request.categories)


def ranked(names: Iterable[str]) -> list[str]:
    """Return policies in the order in which they are shown, each once."""
    return sorted(set(names), key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))


def present(column: pd.Series) -> list[str]:
    """Return the policies that occur in a column, in the order in which they are shown."""
    return ranked(str(v) for v in column.dropna().unique())


def leading(column: pd.Series) -> str:
    """Return the policy that headlines are of: the first in order that the run has."""
    return next(iter(present(column)), "unknown")
