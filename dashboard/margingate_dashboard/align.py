"""Two runs side by side: which requests had the same prompt, and where their tokens part."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from margingate_dashboard.facts.policies import observed

STEP_COLUMNS = ("request", "step", "token", "margin", "batch_rows")
REQUEST_COLUMNS = (
    "request", "request_id", "dataset", "prompt_tokens", "time", "finish_reason", "policy", "prompt_digest", "e2e_ms",
    "ttft_ms", "tpot_ms", "max_batch_rows", "steps",
)  # fmt: skip


PAIR_COLUMNS = ["a", "b", "id_a", "id_b", "dataset", "policy_a", "policy_b"]


class Pairs(NamedTuple):
    """Requests of two runs that had the same prompt."""

    table: pd.DataFrame
    """Columns a and b (numbers of the requests), id_a and id_b (their ids), dataset, and the policies of both."""
    how: str
    """How they were matched, as a sentence for the reader."""
    unobserved: tuple[int, int] = (0, 0)
    """Requests of each run without a recorded step (sampled ones, for the most part), which cannot be compared."""


def pair(a: pd.DataFrame, b: pd.DataFrame) -> Pairs:
    """Match the requests of two runs, by the strongest evidence that both have.

    Request ids that occur in both, of the same prompt where that is known; else equal prompts, by digest or by text; else the n-th request of a dataset with the same number of
    prompt tokens. Repeats of an id or a prompt are matched in order of arrival.
    """
    a, unseen_a = _observed(a.drop_duplicates("request"))
    b, unseen_b = _observed(b.drop_duplicates("request"))
    found = _paired(a, b)
    return found._replace(unobserved=(unseen_a, unseen_b))


def _observed(requests: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Return the requests with recorded steps, and how many have none: their tokens are not known."""
    keep = observed(requests)
    return requests[keep], int((~keep).sum())


def _paired(a: pd.DataFrame, b: pd.DataFrame) -> Pairs:
    if a.empty or b.empty:
        return Pairs(pd.DataFrame(columns=PAIR_COLUMNS), "One of the runs has no finished request.")
    digests = all("prompt_digest" in r and bool(r["prompt_digest"].notna().all()) for r in (a, b))
    if 2 * int(a["request_id"].isin(b["request_id"]).sum()) >= min(len(a), len(b)):
        table = _by(a, b, ["request_id"])
        other = _other_prompts(table, a, b) if digests else np.zeros(len(table), dtype=bool)
        if not other.any():
            return Pairs(table, "Matched by request id.")
        if 2 * int(other.sum()) < len(table):
            left_out = f"{int(other.sum()):,} with one id and different prompts are left out."
            return Pairs(table[~other].reset_index(drop=True), f"Matched by request id; {left_out}")
    if digests:
        how = "Matched by the digest of the prompt's tokens, repeats under the same policy first, then in order of arrival."
        return Pairs(_by_policy(a, b, ["prompt_digest"]), how)
    if _has_text(a) and _has_text(b):
        how = "Matched by prompt text, repeats under the same policy first, then in order of arrival."
        return Pairs(_by_policy(a, b, ["prompt_text"]), how)
    table = _by(a, b, ["dataset", "prompt_tokens"])
    return Pairs(
        table,
        "Matched by dataset, prompt length and order of arrival, because neither request ids nor prompt texts "
        "are shared: prompts may differ.",
    )


def _other_prompts(table: pd.DataFrame, a: pd.DataFrame, b: pd.DataFrame) -> np.ndarray:
    """Tell which matched requests had different prompts: ids that a client counts up mean nothing in another run."""
    left, right = (table[side].map(r.set_index("request")["prompt_digest"]) for side, r in (("a", a), ("b", b)))
    found: np.ndarray = left.astype(str).to_numpy() != right.astype(str).to_numpy()
    return found


def _has_text(requests: pd.DataFrame) -> bool:
    return "prompt_text" in requests and bool(requests["prompt_text"].notna().all())


def _by_policy(a: pd.DataFrame, b: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Match within each policy first; what has no partner there is matched across policies."""
    same = _by(a, b, [*keys, "policy"])
    rest = _by(a[~a["request"].isin(same["a"])], b[~b["request"].isin(same["b"])], keys)
    return pd.concat([same, rest], ignore_index=True)


def _by(a: pd.DataFrame, b: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    def numbered(requests: pd.DataFrame) -> pd.DataFrame:
        ordered = requests.sort_values("time", kind="stable")
        ordered = ordered.assign(**{k: ordered[k].astype("string").fillna("") for k in keys})
        return ordered.assign(repeat=ordered.groupby(keys, sort=False).cumcount())

    names = {"request": "a", "id": "id_a"}
    left = numbered(a).assign(id=a["request_id"], policy_a=a["policy"].astype(str))
    left = left[["request", "id", "policy_a", "repeat", *dict.fromkeys([*keys, "dataset"])]]
    right = numbered(b).assign(id=b["request_id"], policy_b=b["policy"].astype(str))
    right = right[["request", "id", "policy_b", "repeat", *keys]].rename(columns={"request": "b", "id": "id_b"})
    return left.rename(columns=names).merge(right, on=[*keys, "repeat"])[PAIR_COLUMNS]


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Return the first step at which two token sequences differ, or None where they are equal.

    A sequence that ends earlier differs at the step where it has no token any more.
    """
    shared = min(a.size, b.size)
    unequal = np.flatnonzero(a[:shared] != b[:shared])
    if unequal.size:
        return int(unequal[0])
    return None if a.size == b.size else shared


class _Sequences:
    """The steps of a run, by request, each a slice of flat arrays."""

    def __init__(self, steps: pd.DataFrame) -> None:
        codes, names = pd.factorize(steps["request"], use_na_sentinel=False)
        step = steps["step"].to_numpy()
        # Rows come in order of time, so within a request they come in order of step, and a stable sort by request will
        # do (on 16 bits it is a radix sort, many times faster than one by two keys).
        order = np.argsort(codes.astype(np.uint16) if len(names) < 2**16 - 1 else codes, kind="stable")
        if _disordered(codes[order], step[order]):
            order = np.lexsort((step, codes))
        codes, step = codes[order], step[order]
        # A step written twice (retraction): the later row is the one that stands.
        last = np.ones(codes.size, dtype=bool)
        last[:-1] = (codes[1:] != codes[:-1]) | (step[1:] != step[:-1])
        if not last.all():
            order, codes = order[last], codes[last]
        self.token = steps["token"].to_numpy()[order]
        self.margin = steps["margin"].to_numpy()[order]
        self.rows = steps["batch_rows"].to_numpy()[order]
        bounds = np.searchsorted(codes, np.arange(len(names) + 1))
        numbers = [None if pd.isna(n) else int(n) for n in names]
        self.span = {n: slice(start, stop) for n, (start, stop) in zip(numbers, pairwise(bounds.tolist()))}


def _disordered(codes: np.ndarray, step: np.ndarray) -> bool:
    """Tell whether a step comes after a later one of the same request."""
    return bool(((codes[1:] == codes[:-1]) & (step[1:] < step[:-1])).any())


def divergences(pairs: pd.DataFrame, steps_a: pd.DataFrame, steps_b: pd.DataFrame) -> pd.DataFrame:
    """Compare the tokens of matched requests.

    Returns
    -------
    DataFrame
        dataset, policy_a, policy_b, a, b, id_a, id_b, tokens_a, tokens_b, identical, first (step of the first difference, null where there is none),
        and the margins and batch rows of both at that step.
    """
    left, right = _Sequences(steps_a), _Sequences(steps_b)
    nothing = slice(0, 0)
    rows = []
    for a, b, id_a, id_b, dataset, policy_a, policy_b in pairs[PAIR_COLUMNS].itertuples(index=False):
        x, y = left.span.get(a, nothing), right.span.get(b, nothing)
        first = first_difference(left.token[x], right.token[y])

        def at(values: np.ndarray, span: slice, where: int | None = first) -> float:
            return float(values[span][where]) if where is not None and where < span.stop - span.start else np.nan

        rows.append(
            (dataset, policy_a, policy_b, a, b, id_a, id_b, x.stop - x.start, y.stop - y.start, first is None, first, at(left.margin, x),
             at(right.margin, y), at(left.rows, x), at(right.rows, y))
        )  # fmt: skip
    names = [
        "dataset",
        "policy_a",
        "policy_b",
        "a",
        "b",
        "id_a",
        "id_b",
        "tokens_a",
        "tokens_b",
        "identical",
        "first",
        "margin_a",
        "margin_b",
        "rows_a",
        "rows_b",
    ]
    table = pd.DataFrame(rows, columns=names)
    return table.astype({"first": "Int64", "identical": bool})
