"""Two runs against each other: what they were started with, paired answers, and paired times with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from margingate_dashboard.rates import upper_95

LEFT_OUT = {
    "pid", "heartbeat", "closed_at", "created", "run", "totals", "self_test", "hooks", "schema_version", "synthetic", "invariance",
    "notes",
}  # fmt: skip
"""Fields of a manifest that differ between any two runs, or are shown elsewhere."""
GRAVE = ("model", "dtype", "model_path")
"""Where these differ, different answers say nothing."""
RESAMPLES = 1000


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, inner in value.items():
            if name or key not in LEFT_OUT:
                found.update(_flat(inner, f"{name}.{key}" if name else str(key)))
        return found
    return {name: "" if value is None else str(value)[:400]}


def settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.DataFrame:
    """Return the manifest fields in which two runs differ, the grave ones first."""
    left, right = _flat(a), _flat(b)
    names = [n for n in dict.fromkeys([*left, *right]) if left.get(n, "") != right.get(n, "")]
    names.sort(key=lambda n: (n not in GRAVE, not n.startswith("versions"), n))
    return pd.DataFrame(
        {"field": names, "a": [left.get(n, "–") for n in names], "b": [right.get(n, "–") for n in names]}
    )


def by_policies(table: pd.DataFrame) -> pd.DataFrame:
    """Count matched requests by the policies of both, from :func:`margingate_dashboard.align.divergences`."""
    rows = []
    for (left, right), mine in table.groupby(["policy_a", "policy_b"], sort=True, observed=True):
        apart = mine.loc[~mine["identical"], "first"]
        rows.append(
            {
                "policy a": left,
                "policy b": right,
                "matched": len(mine),
                "identical": int(mine["identical"].sum()),
                "identical, %": 100 * float(mine["identical"].mean()),
                "differ at most (95%)": 100 * upper_95(len(apart), len(mine)),
                "median first difference": float(apart.median()) if len(apart) else None,
            }
        )
    return pd.DataFrame(rows)


class Paired(NamedTuple):
    """Prompts that both runs answered more than once: of which the answers were the same within a run."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def prompts(self) -> int:
        """All of them."""
        return sum(self)

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: as many prompts on one side alone, if the runs kept answers equally well."""
        n, k = self.only_a + self.only_b, min(self.only_a, self.only_b)
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def paired(a: pd.DataFrame, b: pd.DataFrame) -> Paired:
    """Compare two runs prompt by prompt, from :func:`margingate_dashboard.facts.identity.compared` of each."""
    kept = [rows.groupby("prompt")["same"].all() if len(rows) else pd.Series(dtype=bool) for rows in (a, b)]
    x, y = kept[0].align(kept[1], join="inner")
    left, right = x.to_numpy(dtype=bool), y.to_numpy(dtype=bool)
    counts = ((left & right), (left & ~right), (~left & right), (~left & ~right))
    return Paired(*(int(c.sum()) for c in counts))


def deltas(pairs: pd.DataFrame, a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Return the median of what b takes more than a, over matched requests, with its 95% bootstrap interval.

    Parameters
    ----------
    pairs
        Columns a and b: numbers of the requests.
    a, b
        Request rows with request, ttft_ms, tpot_ms and e2e_ms.
    """
    rng = np.random.default_rng(0)
    left, right = (rows.drop_duplicates("request", keep="last").set_index("request") for rows in (a, b))
    rows = []
    for name, column in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("end to end", "e2e_ms")):
        x = pairs["a"].map(left[column]).to_numpy(dtype=float, na_value=np.nan)
        y = pairs["b"].map(right[column]).to_numpy(dtype=float, na_value=np.nan)
        known = np.isfinite(x) & np.isfinite(y)
        difference = (y - x)[known]
        if not difference.size:
            continue
        medians = np.median(difference[rng.integers(0, difference.size, (RESAMPLES, difference.size))], axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        rows.append(
            {
                "of": name,
                "pairs": difference.size,
                "median a": float(np.median(x[known])),
                "median b": float(np.median(y[known])),
                "median of b − a": float(np.median(difference)),
                "95% from": float(low),
                "to": float(high),
            }
        )
    return pd.DataFrame(rows)
