"""A flip as plain text for an issue: everything a reader needs to judge it, and what the trace does not hold."""

from __future__ import annotations

from typing import Any

import pandas as pd

from margingate_dashboard.tokens import plain, vocabulary
from sglang_margingate import __version__

BEFORE = 24
"""Tokens shown before the flip."""


def _token(value: Any, known: dict[int, str]) -> str:
    if value is None or pd.isna(value):
        return "none"
    return f"{int(value)} {known[int(value)]!r}" if int(value) in known else str(int(value))


def _number(value: Any) -> str:
    return "none" if value is None or pd.isna(value) else f"{float(value):.6g}"


def _rows(value: Any) -> str:
    return "an unknown number" if value is None or pd.isna(value) else str(int(value))


def flip_text(
    run: str,
    manifest: dict[str, Any],
    request_id: str,
    steps: pd.DataFrame,
    step: int,
    known: dict[int, str] | None = None,
) -> str:
    """Return the context of one step as text.

    Parameters
    ----------
    run, manifest
        Name and manifest of the run.
    request_id
        The request.
    steps
        All recorded columns of the request's steps, in order.
    step
        The step to describe.
    known
        Text by token id; by default what the request's own steps show.
    """
    known = vocabulary(steps["token"], steps["token_text"]) if known is None else known
    found = steps[steps["step"] == step]
    if found.empty:
        return f"Step {step} of request {request_id} is not recorded in run {run}."
    row = found.iloc[0]
    where = int(found.index[0])
    before = steps.iloc[max(0, where - BEFORE) : where]
    tokens = " ".join(str(int(t)) for t in before["token"])
    versions = manifest.get("versions")
    versions = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "not recorded"
    outcome = (
        ("repaired" if row["repaired"] is True or row["repaired"] == 1 else "not put in place (shadow verify)")
        if row["flipped"] is True or row["flipped"] == 1
        else "no flip"
    )
    lines = [
        f"MarginGate {__version__}: step {step} of request {request_id}, run {run}",
        f"model         {manifest.get('model', 'not recorded')}",
        f"device        {manifest.get('device', 'not recorded')}",
        f"versions      {versions}",
        f"dataset       {row['dataset'] or '(untagged)'}",
        f"position      {int(row['position'])} (prompt and generated tokens before it)",
        f"fast path     {_token(row['fast_token'], known)}   margin {_number(row['margin'])}",
        f"second token  {_token(row['second_token'], known)}",
        f"verify        {_token(row['verify_token'], known)}   margin {_number(row['verify_margin'])}   "
        f"reason {row['reason']}",
        f"committed     {_token(row['token'], known)}   {outcome}",
        f"threshold     {_number(row['threshold'])}",
        f"batch         {row['batch_rows']} rows, layers at up to {_rows(row['padded_rows'])}",
        f"K/V change    first layer {_number(row['kv_delta_first'])}, last layer {_number(row['kv_delta_last'])}, "
        f"window {row['window_rows']} rows",
        f"tokens before {tokens or '(none: chosen by the prefill)'}",
    ]
    if before["token_text"].notna().any():
        lines.append("text before   " + "".join(plain(t, i) for t, i in zip(before["token_text"], before["token"])))
    return "\n".join(lines)
