"""Which prompts were answered with the same tokens whatever the batch: within a run, and across runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from margingate_dashboard.facts.policies import NOT_OBSERVED, ranked

COLUMNS = (
    "request", "request_id", "dataset", "policy", "prompt_digest", "output_digest", "max_tokens", "finish_reason", "repeat",
    "max_batch_rows", "cached_tokens", "output_tokens", "greedy", "time", "steps", "seed", "temperature",
)  # fmt: skip
"""Request columns that :func:`answers` reads."""

BATCHES = (("alone", 1), ("2–4", 4), ("5–8", 8), ("9–16", 16), ("17–32", 32), ("33–64", 64), ("65 and more", 2**31))
OWN = "its own answer, alone where there is one"


def answers(
    requests: pd.DataFrame, run: str, prompts: pd.Series | None = None, outputs: pd.Series | None = None
) -> pd.DataFrame:
    """Return the answers of a run that can be compared: greedy or seeded, finished, and with a known prompt.

    Parameters
    ----------
    requests
        Rows with :data:`COLUMNS`; the policy as shown.
    run
        The run's name.
    prompts, outputs
        For runs before schema 2.1: by number of the request, what tells its prompt (the text), and a digest of its tokens.

    Returns
    -------
    DataFrame
        The columns, and run, prompt, answer, batch (the largest that a decode step ran in) and cache (cold or prefix hit).
    """
    rows = requests.drop_duplicates("request", keep="last").assign(run=run)
    numbers = rows["request"]
    prompt, answer = rows["prompt_digest"].astype(object), rows["output_digest"].astype(object)
    if prompts is not None:
        prompt = prompt.where(prompt.notna(), numbers.map(prompts))
    if outputs is not None:
        answer = answer.where(answer.notna(), numbers.map(outputs))
    seeded = rows["seed"].notna().to_numpy()
    # A seeded request draws the same tokens again: another seed or temperature is another prompt.
    said = [
        f" (seed {s}, temperature {t:g})" if known else ""
        for s, t, known in zip(rows["seed"], rows["temperature"].astype(float), seeded)
    ]
    prompt = prompt.where(prompt.isna(), prompt.astype(str) + pd.Series(said, index=rows.index, dtype=object))
    greedy = rows["greedy"].astype("boolean").fillna(True).to_numpy(dtype=bool) | seeded
    greedy &= ~((rows["policy"].astype(str) == NOT_OBSERVED).to_numpy() & rows["greedy"].isna().to_numpy())
    ended = ~rows["finish_reason"].astype(str).eq("abort").to_numpy()
    largest = rows["max_batch_rows"].fillna(0).to_numpy(dtype=np.int64)
    limits = np.array([limit for _, limit in BATCHES])
    names = np.array([name for name, _ in BATCHES], dtype=object)
    batch = np.where(largest > 0, names[np.minimum(np.searchsorted(limits, largest), len(names) - 1)], "one token")
    cache = np.where(rows["cached_tokens"].fillna(0).to_numpy() > 0, "prefix hit", "cold")
    rows = rows.assign(prompt=prompt, answer=answer, batch=batch, cache=cache, policy=rows["policy"].astype(str))
    keep = greedy & ended & prompt.notna().to_numpy() & answer.notna().to_numpy()
    return rows[keep].reset_index(drop=True)


def digests(steps: pd.DataFrame) -> pd.Series:
    """Return a digest of each request's tokens, from step rows with request, step and token."""
    ordered = steps.drop_duplicates(["request", "step"], keep="last").sort_values(["request", "step"], kind="stable")
    tokens, numbers = ordered["token"].to_numpy(dtype="<i4"), ordered["request"].to_numpy()
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1])) if numbers.size else np.zeros(0, int)
    parts = np.split(tokens, starts[1:]) if numbers.size else []
    found = [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in parts]
    return pd.Series(found, index=numbers[starts], dtype=object)


def compared(rows: pd.DataFrame, reference: tuple[str, str] | None = None) -> pd.DataFrame:
    """Compare each answer with the reference of its prompt.

    Parameters
    ----------
    rows
        From :func:`answers`, of one run or of several stacked.
    reference
        (run, policy) that the references come from; by default each run's and policy's own.

    Returns
    -------
    DataFrame
        One row per answer that is not itself the reference: its columns, ref_run, ref_request, ref_id and same. A reference
        is the prompt's answer alone, cold, and first; where none was alone, of the smallest batch.
    """
    if rows.empty:
        return rows.assign(ref_run=[], ref_request=[], ref_id=[], ref_policy=[], same=np.zeros(0, bool))
    keys = ["prompt", "max_tokens"]
    rows = rows.assign(
        max_tokens=rows["max_tokens"].astype("Int64").fillna(-1).astype(np.int64), hit=rows["cache"] != "cold"
    )
    order = rows.sort_values(["max_batch_rows", "hit", "time"], kind="stable", na_position="last")
    if reference is None:
        keys = ["run", "policy", *keys]
    else:
        order = order[(order["run"] == reference[0]) & (order["policy"] == reference[1])]
    names = {"request": "ref_request", "run": "ref_run", "request_id": "ref_id", "policy": "ref_policy", "answer": "ref_answer",
             "finish_reason": "ref_finish"}  # fmt: skip
    first = order.drop_duplicates(keys)
    first = first.assign(**{new: first[old] for old, new in names.items()})[
        list(dict.fromkeys([*keys, *names.values()]))
    ]
    found = rows.merge(first, on=keys, how="inner")
    found = found[(found["request"] != found["ref_request"]) | (found["run"] != found["ref_run"])]
    same = (found["answer"] == found["ref_answer"]) & (
        found["finish_reason"].astype(str) == found["ref_finish"].astype(str)
    )
    return found.assign(same=same.to_numpy(dtype=bool)).reset_index(drop=True)


class Cell(NamedTuple):
    """Prompts of one cell: how many, and of how many every answer was the reference's."""

    identical: int
    prompts: int


def _cell(pairs: pd.DataFrame) -> Cell:
    by_prompt = pairs.groupby(["prompt", "max_tokens"], sort=False)["same"].all()
    return Cell(int(by_prompt.sum()), len(by_prompt))


def columns(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the (batch, cache) that occur, smallest batch first."""
    order = [name for name, _ in BATCHES] + ["one token"]
    found = set(zip(pairs["batch"], pairs["cache"]))
    return sorted(found, key=lambda c: (order.index(c[0]), c[1]))


def matrix(pairs: pd.DataFrame) -> dict[tuple[str, str], dict[tuple[str, str] | None, Cell]]:
    """Count by (run, policy) and (batch, cache); the key None is of all answers of a prompt."""
    found: dict[tuple[str, str], dict[tuple[str, str] | None, Cell]] = {}
    if pairs.empty:
        return found
    groups = {key: rows for key, rows in pairs.groupby(["run", "policy"], sort=False)}
    for run in dict.fromkeys(run for run, _ in groups):
        for policy in ranked(p for r, p in groups if r == run):
            mine = groups[(run, policy)]
            cells: dict[tuple[str, str] | None, Cell] = {None: _cell(mine)}
            for column in columns(mine):
                inside = (mine["batch"] == column[0]) & (mine["cache"] == column[1])
                cells[column] = _cell(mine[inside])
            found[(run, policy)] = cells
    return found


def title(column: tuple[str, str]) -> str:
    """Return a (batch, cache) as a table's head."""
    batch, cache = column
    words = batch if batch in ("alone", "one token") else f"batch {batch}"
    return words if cache == "cold" else f"{words}, {cache}"


def sentence(found: dict[tuple[str, str], dict[tuple[str, str] | None, Cell]], runs: Sequence[str]) -> str:
    """Return the result in one line: ``gate 24 / 24 · log 12 / 24``."""
    parts = []
    for (run, policy), cells in found.items():
        name = policy if len(runs) < 2 else f"{policy} ({run})"
        parts.append(f"{name} {cells[None].identical:,} / {cells[None].prompts:,}")
    return " · ".join(parts)
