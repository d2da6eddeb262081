"""Why a token flipped: the cause in a sentence, the best tokens of both paths, and who shared the forward."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from margingate_dashboard import tokens


def _number(value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return math.nan
    return found


def _true(value: Any) -> bool:
    return value is not None and not pd.isna(value) and bool(value)


def cause(step: pd.Series, request: pd.Series | None, verify_rows: int | None = None) -> str:
    """Say in one or two sentences why a step flipped, or why it was verified and did not; from what was recorded alone.

    Parameters
    ----------
    step
        The step's row, all columns.
    request
        The request's row, or None where it has none yet.
    verify_rows
        Rows of the verify's shape, of the run's self-test; None where it is not known.
    """
    reason = str(step["reason"])
    if reason in ("none", "", "nan"):
        if _true(step["structural"]):
            return "It was not verified: the step and every column that it read ran inside the probed class."
        return "It was not verified, so whether it would have flipped is not known."
    rows, margin = _number(step["batch_rows"]), _number(step["margin"])
    shape = f"the verify's own shape ({verify_rows} rows)" if verify_rows else "the verify's own shape"
    parts = []
    if not _true(step["flipped"]):
        parts.append(f"The verify chose the same token: a margin of {margin:.6g} was enough for the change of shape.")
        return " ".join(parts)
    if _true(step["structural"]):
        parts.append(
            "The step ran inside the probed class, where a flip disproves the class: responses claim nothing from then on."
        )
    elif reason == "resume":
        parts.append(
            "The request was retracted: its generated columns were prefilled again at another shape, and all were recomputed."
        )
    elif rows == 1:
        parts.append(
            f"The forward had one row alone, which is outside the class. The reference is not “alone” but {shape}: sums run in "
            f"another order there, and a margin of {margin:.6g} did not stand it."
        )
    elif math.isfinite(rows):
        padded = _number(step["padded_rows"])
        ran = f"{rows:.0f} requests shared the forward" + (
            f", its layers at up to {padded:.0f} rows" if padded > rows else ""
        )
        parts.append(
            f"{ran}; against {shape} sums run in another order, and a margin of {margin:.6g} did not stand it."
        )
    window = _number(step["window_rows"])
    if window > 1:
        change = _number(step["kv_delta_last"])
        moved = f", and moved the last layer's newest column by {change:.6g}" if change > 0 else ""
        parts.append(f"The verify recomputed {window:.0f} columns that had been written outside the class{moved}.")
    hit = _number(request["cached_tokens"]) if request is not None else math.nan
    if hit > 0:
        parts.append(f"{hit:,.0f} tokens of its prompt came from the prefix cache.")
    if request is not None and _number(request["retractions"]) > 0 and reason != "resume":
        parts.append(f"It was retracted {_number(request['retractions']):.0f} times.")
    return " ".join(parts)


def best(step: pd.Series, known: dict[int, str]) -> pd.DataFrame:
    """Return the best five tokens of both paths with probabilities; empty where they were not recorded."""
    rows: dict[int, dict[str, object]] = {}
    for path in ("fast", "verify"):
        ids, logprobs = step.get(f"{path}_top_tokens"), step.get(f"{path}_top_logprobs")
        if ids is None or logprobs is None or not hasattr(ids, "__len__"):
            continue
        for place, (token, logprob) in enumerate(zip(ids, logprobs), 1):
            row = rows.setdefault(
                int(token), {"token": tokens.plain(known.get(int(token)), int(token)), "id": int(token)}
            )
            row[f"{path} path, place" if path == "fast" else "verify, place"] = place
            row[f"{path} path, %" if path == "fast" else "verify, %"] = 100 * math.exp(float(logprob))
    columns = ["token", "id", "fast path, place", "fast path, %", "verify, place", "verify, %"]
    return pd.DataFrame(list(rows.values())).reindex(columns=columns) if rows else pd.DataFrame(columns=columns)


def companions(steps: pd.DataFrame, step: pd.Series) -> pd.DataFrame:
    """Return the rows that ran in the same forward, this step's own left out.

    Parameters
    ----------
    steps
        The run's steps with request, forward, time and whatever is to be shown.
    step
        The step's row. Before schema 2.1 forwards had no numbers: rows with the same time ran together.
    """
    number = step.get("forward")
    if number is not None and not pd.isna(number):
        together = (steps["forward"] == number).fillna(False).to_numpy(dtype=bool)
    else:
        together = (steps["time"] == step["time"]).to_numpy(dtype=bool)
    return steps[together & (steps["request"] != step["request"]).to_numpy(dtype=bool)]
