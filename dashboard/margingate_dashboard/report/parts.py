"""Parts of a report: tables with their units, identity, latency and thresholds."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd

from margingate_dashboard import profiles
from margingate_dashboard.facts import identity
from margingate_dashboard.facts.price import measure
from margingate_dashboard.facts.quantiles import quantile_table
from margingate_dashboard.rates import at_most, of, upper_95
from sglang_margingate.gate.calibration import CalibrationError, threshold_for, trade_off

FORMATS = {
    "trigger rate": "{:.2f}%",
    "overhead": "{:.2f}%",
    "median TTFT": "{:.1f} ms",
    "median TPOT": "{:.2f} ms",
    "flips per 1,000 steps": "{:.2f}",
    "identical, %": "{:.2f}%",
    "ms a token": "{:.2f} ms",
    "tokens/s": "{:,.0f}",
}
"""How columns of numbers are written; others to six digits."""


def _cell(value: Any, column: str) -> str:
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (int, np.integer)):
        return f'<td class="n">{value:,}</td>'
    if isinstance(value, (float, np.floating)):
        shown = FORMATS.get(column, "{:.6g}").format(value) if np.isfinite(value) else "–"
        if "at most" in column and np.isfinite(value):
            shown = at_most(value / 100)  # rounded to the nearest, a bound may be none
        return f'<td class="n">{shown}</td>'
    return f"<td>{html.escape('–' if value is None or value is pd.NA else str(value))}</td>"


def table(frame: pd.DataFrame) -> str:
    """Return a table as HTML; every text is escaped."""
    head = "".join(f"<th>{html.escape(str(c))}</th>" for c in frame.columns)
    names = list(frame.columns)
    rows = "".join(
        f"<tr>{''.join(_cell(v, str(n)) for v, n in zip(row, names))}</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def matrix_table(found: dict[tuple[str, str], dict[tuple[str, str] | None, identity.Cell]], runs: int) -> pd.DataFrame:
    """Return an identity matrix as a table of ``n / N``, with the bound of what differs."""
    columns = identity.columns(
        pd.DataFrame([c for cells in found.values() for c in cells if c], columns=["batch", "cache"])
    )
    rows = []
    for (run, policy), cells in found.items():
        row: dict[str, object] = {"run": run} if runs > 1 else {}
        row["policy"] = policy
        row["all batches"] = of(*cells[None])
        row.update({identity.title(c): of(*cells[c]) if c in cells else None for c in columns})
        row["differ at most (95%)"] = at_most(
            upper_95(cells[None].prompts - cells[None].identical, cells[None].prompts)
        )
        rows.append(row)
    return pd.DataFrame(rows)


def answers_of(requests: pd.DataFrame, steps: pd.DataFrame, run: str) -> pd.DataFrame:
    """Return a run's comparable answers; of runs before schema 2.1 from their texts and tokens."""
    if requests["prompt_digest"].notna().any():
        return identity.answers(requests, run)
    texts = requests[["request", "prompt_text"]].dropna().drop_duplicates("request", keep="last")
    if texts.empty:
        return identity.answers(requests.iloc[:0], run)
    outputs = identity.digests(steps[["request", "step", "token"]].dropna())
    return identity.answers(requests, run, texts.set_index("request")["prompt_text"], outputs)


def identity_part(requests: pd.DataFrame, steps: pd.DataFrame, run: str) -> list[str]:
    """Return how many prompts were answered the same whatever the batch; nothing where none came twice."""
    found = identity.matrix(identity.compared(answers_of(requests, steps, run)))
    if not found:
        return []
    return [
        "<h2>Identical answers, whatever the batch</h2>",
        f'<p class="mg-result">{html.escape(identity.sentence(found, [run]))}</p>',
        table(matrix_table(found, 1)),
        '<p class="note">Prompts of which every answer in that cell has the tokens and finish reason of the same policy\'s answer '
        "alone, of all prompts seen there; the bound at 95% is of prompts that differ.</p>",
    ]


def latency_part(requests: pd.DataFrame) -> list[str]:
    """Return quantiles of each latency by policy."""
    frame = quantile_table(requests)
    return ["<h2>Latency by policy</h2>", table(frame)] if len(frame) else []


def tuning_part(steps: pd.DataFrame) -> list[str]:
    """Return a threshold per dataset from fully verified requests, with its bound and price; nothing where there are none."""
    samples, taken, decode = profiles.calibration_samples(steps)
    if not samples:
        return []
    known, price = profiles.known_flips(steps), measure(steps)
    rows = []
    for name, sample in samples.items():
        try:
            found = threshold_for(*sample, tail=False)
        except CalibrationError:
            continue
        chosen = trade_off(*sample, [profiles.veto(found, known.get(name))]).iloc[0]
        row: dict[str, object] = {
            "dataset": name,
            "threshold": float(chosen["threshold"]),
            "from the sample": found.threshold,
            "steps": int(chosen["steps"]),
            "trigger rate": 100 * float(chosen["trigger_rate"]),
            "flips": int(chosen["flips"]),
            "missed at most (95%)": 100 * found.miss_upper,
        }
        if price is not None:
            predicted = price.predict(float(chosen["trigger_rate"]))
            row |= {
                "ms a token": predicted.step_ms,
                "overhead": 100 * predicted.overhead,
                "tokens/s": predicted.tokens_per_second,
            }
        rows.append(row)
    note = f'<p class="note">From {of(taken, decode)} decode steps: those of fully verified requests. No flip of the sample is missed, nor any that the gate or the audit confirmed outside it: such a flip raises the threshold.</p>'
    return ["<h2>Thresholds that this run would give</h2>", table(pd.DataFrame(rows)), note] if rows else []
