"""Loads on several servers as one table and as JSON, with what the numbers depend on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.prompts.random_ids import digest
from sglang_margingate.bench.side_by_side.report import plain, wrap
from sglang_margingate.bench.workload.loads import Load
from sglang_margingate.bench.workload.rounds import Cell, Results, Work
from sglang_margingate.gate.stats import Rate

WORKLOAD_SCHEMA = "margingate-workload/1"

CLIENT_BUSY = 0.7
"""One thread at a time runs in the client: near 1 it holds servers up."""

SPEED: Mapping[str, tuple[str, int]] = {
    "tokens/s": ("tokens_per_s", 0),
    "TTFT p50": ("ttft_p50_ms", 1),
    "TTFT p99": ("ttft_p99_ms", 1),
    "TPOT p50": ("tpot_p50_ms", 2),
    "TPOT p99": ("tpot_p99_ms", 2),
}
"""Columns that stand beside their ratio: metric and decimals."""

FURTHER: Mapping[str, tuple[str, int]] = {
    "cached": ("cached_share", 2),
    "in limits": ("goodput", 3),
    "GPU busy": ("gpu_busy", 2),
    "host ms": ("host_ms_per_step", 2),
    "step ms": ("decode_step_ms", 2),
    "rows": ("decode_rows", 1),
}
"""Columns that are there where a server shows them."""

LEGEND = {
    "TTFT p50": "TTFT, TPOT: ms to the first token, and ms per token after it",
    "cached": "cached: share of prompt tokens that came from the prefix cache",
    "in limits": "in limits: share of requests within the TTFT and TPOT given in --goodput",
    "GPU busy": "GPU busy: share of the time in which the GPU ran anything",
    "host ms": "host ms: for each decode step, time in which it ran nothing",
    "step ms": "step ms: time for each decode step, prefills between them included",
    "rows": "rows: requests in a decode step, mean",
    "identical": "identical: sequences with the same tokens and finish reason as alone on that server, all rounds",
    "promised": "promised: the same, of the sequences whose answers claim it",
}


def markdown(results: Results, work: Work, facts: Mapping[str, Any]) -> str:
    """Return conditions, the table, and remarks."""
    out = [*_conditions(results, work, facts), ""]
    cells = [c for c in results.cells if c.rounds]
    remarks = []
    if cells:
        head, rows = _table(results, work, cells)
        out += [tables.markdown(head, rows, left=(0, 1)), ""]
        base = results.labels[0]
        remarks.append(
            f"Numbers are medians of {_rounds(cells, work.rounds)}; `of {base}` is the median of the "
            "ratios round by round, in brackets the smallest and the largest. "
            + "; ".join(text for column, text in LEGEND.items() if column in head)
            + "."
        )
    remarks += [
        f"**{c.label}, {c.load.name}: broken promise**: {c.identity.broken} of {c.identity.promised.denominator} sequences "
        f"claimed to be identical and are not; first {c.identity.first}"
        for c in results.broken()
        if c.identity is not None
    ]
    remarks += [f"**{label}: {_stopped(results, label)}**: {why}" for label, why in results.failures.items()]
    busy = max((r.get("client_cpu_share", 0.0) for c in cells for r in c.rounds), default=0.0)
    if busy > CLIENT_BUSY:
        remarks.append(f"This client was on a CPU for up to {busy:.0%} of the time: it may be what was measured.")
    remarks += results.notes
    return "\n".join(out) + "\n" + "\n\n".join("\n".join(wrap(r)) for r in remarks)


def _rounds(cells: list[Cell], wanted: int) -> str:
    """Return how many rounds were run, which a budget or a failure may have made fewer than asked for."""
    seen = sorted({len(c.rounds) for c in cells})
    ran = f"{seen[0]}" if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"
    short = f" ({wanted} were asked for)" if seen != [wanted] else ""
    return f"{ran} round{'s' * (seen != [1])}{short}"


def _stopped(results: Results, label: str) -> str:
    return "not to the end" if any(c.rounds for c in results.cells if c.label == label) else "not measured"


def _conditions(results: Results, work: Work, facts: Mapping[str, Any]) -> list[str]:
    named = ("sglang", "torch", "sglang-margingate")
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if k in named)
    out = wrap(f"{facts.get('model', 'model')} on {facts['device']}; {versions}; {facts['date'][:10]}.")
    for load, chains in work.loads.items():
        turns = [t for c in chains for t in c.turns]
        ids, new = [len(t.ids) for t in turns if t.ids], [t.max_tokens or work.max_tokens for t in turns]
        sent = f"{_range(ids)} prompt tokens" if len(ids) == len(turns) else "text"
        talks = f" in {len(chains)} conversations" if load.kind == "sessions" else ""
        sets = ", ".join(dict.fromkeys(t.dataset for t in turns))
        out += wrap(f"{load.name}: {len(turns)} requests{talks} ({sets}): {sent}, {_range(new)} new.")
    if facts.get("server_flags"):
        out += wrap(f"Every server: {' '.join(facts['server_flags'])}")
    for label, flags in results.mode_flags.items():
        out += wrap(f"{label} also: {' '.join(flags)}")
    for label, found in results.servers.items():
        pool = f"{found['pool_tokens']:,} tokens" if found["pool_tokens"] else "a pool of unknown size"
        out += wrap(f"{label}: attention {_attention(found)}, {pool}.")
    return out


def _attention(server: Mapping[str, Any]) -> str:
    """Return a server's attention back end, and what attends in its place where the server says so."""
    path = (server.get("status") or {}).get("invariance") or {}
    parts = {"prefills": path.get("prefill_attention"), "decode graphs": path.get("decode_attention")}
    said = [f"{what}: {who}" for what, who in parts.items() if who and who != "sglang"]
    return (server["attention_backend"] or "unknown") + (f" ({', '.join(said)})" if said else "")


def _range(values: list[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _table(results: Results, work: Work, cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    base = results.labels[0]
    known = {name for name, (metric, _) in FURTHER.items() if any(not math.isnan(_median(c, metric)) for c in cells)}
    looked = any(c.identity is not None for c in cells)
    head = ["load", "mode"]
    for name in SPEED:
        head += [name, f"of {base}"]
    head += [name for name in FURTHER if name in known] + (["identical", "promised"] if looked else [])
    rows = []
    # By load, so that what is to be compared stands together; the servers in the order asked for.
    order = {load: i for i, load in enumerate(work.loads)}
    for c in sorted(cells, key=lambda c: (order[c.load], results.labels.index(c.label))):
        row = [c.load.name, c.label]
        for metric, digits in SPEED.values():
            value = c.median(metric)
            row += ["-" if math.isnan(value) else f"{value:,.{digits}f}", ratio(results, c, metric)]
        for name, (metric, digits) in FURTHER.items():
            if name in known:
                value = _median(c, metric)
                row.append("-" if math.isnan(value) else f"{value:.{digits}f}")
        if looked:
            row += [_count(c.identity.same), _count(c.identity.promised)] if c.identity is not None else ["-", "-"]
        rows.append(row)
    return head, rows


def _median(cell: Cell, metric: str) -> float:
    if metric != "cached_share":
        return cell.median(metric)
    shares = [r["cached_tokens"] / r["prompt_tokens"] for r in cell.rounds if r.get("prompt_tokens")]
    return statistics.median(shares) if shares else math.nan


def ratio(results: Results, cell: Cell, metric: str) -> str:
    """Return a cell's ratio to the first server as it stands in the table."""
    found = results.ratios(cell, metric)
    if not found:
        return "-"
    spread = f" ({min(found):.2f}-{max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.median(found):.3f}{spread}"


def _count(rate: Rate) -> str:
    return f"{rate.numerator:,}/{rate.denominator:,}"


def to_dict(results: Results, work: Work, facts: Mapping[str, Any], complete: bool) -> dict[str, Any]:
    """Return everything in plain types; NaN becomes null, and what was not read is not there."""
    return plain(
        {
            "schema": WORKLOAD_SCHEMA,
            "complete": complete,
            "environment": dict(facts),
            "labels": results.labels,
            "loads": {load.name: _load(load, work) for load in work.loads},
            "rounds": work.rounds,
            "limits": work.limits._asdict() if work.limits is not None else None,
            "identity": work.identity,
            "seed": work.seed,
            "cells": [_cell(results, c) for c in results.cells],
            "alone": results.alone,
            "failures": results.failures,
            "mode_flags": results.mode_flags,
            "notes": results.notes,
            "servers": results.servers,
        }
    )


def _load(load: Load, work: Work) -> dict[str, Any]:
    turns = [t for c in work.loads[load] for t in c.turns]
    found = asdict(load) | {"file": str(load.file) if load.file else None}
    return found | {"requests": len(turns), "conversations": len(work.loads[load]), "prompts_digest": digest(turns)}


def _cell(results: Results, cell: Cell) -> dict[str, Any]:
    metrics = sorted({name for r in cell.rounds for name in r})
    ratios = {m: results.ratios(cell, m) for m in metrics}
    found: dict[str, Any] = {
        "mode": cell.label,
        "load": cell.load.name,
        "median": {m: cell.median(m) for m in metrics},
        "ratio_to_first": {m: statistics.median(r) for m, r in ratios.items() if r},
        "ratio_spread": {m: [min(r), max(r)] for m, r in ratios.items() if r},
        "batches": cell.proof.to_dict(),
        "rounds": cell.rounds,
    }
    if cell.identity is not None:
        found["identical"] = asdict(cell.identity.same)
        found["promised"] = asdict(cell.identity.promised)
        found["first_difference"] = cell.identity.first
    return found
