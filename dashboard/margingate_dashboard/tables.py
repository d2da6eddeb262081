"""Tables that more than one place shows."""

from __future__ import annotations

import numpy as np
import pandas as pd

from margingate_dashboard import tokens
from margingate_dashboard.facts.policies import may_verify, present, ranked
from margingate_dashboard.rates import of
from margingate_dashboard.states import CODE
from margingate_dashboard.summary import has_tag, headline, overhead, tags
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, STATES

FLIP_CODES = [CODE[s.name] for s in (FLIPPED, REPAIRED, MISSED)]
MOST_FLIPS = 2000
"""Flips in a list at most."""

FLIP_COLUMNS = (
    "request",
    "request_id",
    "dataset",
    "step",
    "position",
    "token",
    "fast_token",
    "verify_token",
    "margin",
    "threshold",
    "batch_rows",
    "state",
    "token_text",
    "policy",
    "above",
)
"""Step columns that :func:`flip_list` reads."""


def flip_list(steps: pd.DataFrame, known: dict[int, str] | None = None) -> pd.DataFrame:
    """Return one row per flip, highest margin first: the surprising ones come first.

    Parameters
    ----------
    steps
        Step rows with :data:`FLIP_COLUMNS`.
    known
        Text by token id; by default what ``steps`` show.
    """
    known = tokens.vocabulary(steps["token"], steps["token_text"]) if known is None else known
    found = steps[np.isin(steps["state"].to_numpy(), FLIP_CODES)]
    found = found.sort_values("margin", ascending=False, kind="stable").head(MOST_FLIPS)
    return pd.DataFrame(
        {
            "number": found["request"].to_numpy(),
            "request": found["request_id"].astype(str).to_numpy(),
            "dataset": found["dataset"].astype(str).to_numpy(),
            "policy": found["policy"].astype(str).to_numpy(),
            "step": found["step"].to_numpy(),
            "state": [STATES[s].name for s in found["state"]],
            "committed": [tokens.plain(t, i) for t, i in zip(found["token_text"], found["token"])],
            "fast token": [tokens.plain(known.get(int(i)), i) for i in found["fast_token"]],
            "verify token": [tokens.plain(known.get(int(i)), i) if pd.notna(i) else "–" for i in found["verify_token"]],
            "margin": found["margin"].to_numpy(),
            "threshold": found["threshold"].to_numpy(),
            "above tau": np.where(found["above"].to_numpy(dtype=bool), "yes", "no"),
            "batch rows": found["batch_rows"].to_numpy(),
            "position": found["position"].to_numpy(),
        }
    )


def _counts(steps: pd.DataFrame, requests: pd.DataFrame, policy: str) -> dict[str, object]:
    """Return the counts of some steps and requests of one policy, each rate with the counts that it is of."""
    total = headline(steps)
    added, whole = overhead(requests)
    verifies = may_verify(policy)
    audited = policy == "gate" and total.examined
    # What a reader looks for first stands first: a screen holds some twelve columns.
    return {
        "requests": len(requests),
        "decode steps": total.steps,
        "trigger rate": 100 * total.low / total.steps if total.steps else None,
        "flips": total.flips if verifies else None,
        "missed": total.missed if verifies else None,
        "missed at most (95%)": 100 * total.miss_upper if audited else None,
        "overhead": 100 * added / whole if whole else None,
        "median TTFT": requests["ttft_ms"].median(),
        "median TPOT": requests["tpot_ms"].median(),
        "flips per 1,000 steps": 1000 * total.flips / total.steps if total.steps and verifies else None,
        "low margins": total.low,
        "verified": total.verified,
        "repaired": total.repaired if verifies else None,
        "above tau": total.above if verifies else None,
        "audited": of(total.examined, total.untriggered) if policy == "gate" else None,
        "output tokens": int(requests["output_tokens"].fillna(0).sum()),
    }


def by_policy(steps: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row of counts per policy; a bound of gate traffic is made of its own audited steps, of nothing else."""
    rows = []
    for policy in ranked([*present(steps["policy"]), *present(requests["policy"])]):
        mine = requests[requests["policy"].astype(str) == policy]
        rows.append({"policy": policy, **_counts(steps[(steps["policy"] == policy).to_numpy()], mine, policy)})
    return pd.DataFrame(rows)


def by_dataset(steps: pd.DataFrame, requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row of counts per dataset tag and policy."""
    rows = []
    names = tags(pd.Series([*steps["dataset"].unique(), *requests["dataset"].unique()], dtype=object))
    for name in names:
        inside, asked = steps[has_tag(steps["dataset"], {name})], requests[has_tag(requests["dataset"], {name})]
        table = by_policy(inside, asked)
        table.insert(0, "dataset", name)
        rows.append(table)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def map_table(found: object) -> pd.DataFrame:
    """Return an invariance map as a table: per kind of layer the ranges of rows M that share a class.

    What is damaged or from another schema is left out rather than raised: a manifest is a file.
    """
    rows = []
    layers = found.get("layers") if isinstance(found, dict) else None
    for layer in layers if isinstance(layers, list) else []:
        try:
            runs = [(int(first), int(last), label) for first, last, label in layer["classes"]]
            shape = [int(n) for n in layer["shape"]]
            rows.append(
                {
                    "layer": str(layer["name"]),
                    "inputs": shape[1],
                    "outputs": shape[0],
                    "layers like it": int(layer["count"]),
                    "classes": len({label for *_, label in runs}),
                    "rows of each class": ", ".join(_span(*run) for run in runs[:12])
                    + (" …" if len(runs) > 12 else ""),
                }
            )
        except (KeyError, TypeError, ValueError, IndexError):
            continue
    return pd.DataFrame(rows)


def _span(first: int, last: int, label: object) -> str:
    rows = str(first) if first == last else f"{first}–{last}"
    return f"{rows}: {'place matters' if label is None else label}"
