"""Quantiles of latencies, by policy."""

from __future__ import annotations

import numpy as np
import pandas as pd

from margingate_dashboard.facts.policies import present

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
MEASURES = (
    ("TTFT, ms", "ttft_ms", 1.0),
    ("TPOT, ms", "tpot_ms", 1.0),
    ("end to end, ms", "e2e_ms", 1.0),
    ("overhead, ms", "overhead_ms", 1.0),
    ("overhead, %", "overhead_share", 100.0),
)


def quantile_table(requests: pd.DataFrame) -> pd.DataFrame:
    """Return quantiles of each latency by policy, with how many requests they are of."""
    rows = []
    for what, column, scale in MEASURES:
        for policy in present(requests["policy"]):
            values = (
                requests.loc[(requests["policy"] == policy).to_numpy(), column].dropna().to_numpy(dtype=float) * scale
            )
            found = {name: float(np.quantile(values, q)) if values.size else None for name, q in QUANTILES.items()}
            rows.append({"of": what, "policy": policy, "requests": values.size, **found})
    return pd.DataFrame(rows, columns=["of", "policy", "requests", *QUANTILES])
