"""A comparison as Markdown tables and as JSON, with hardware and versions named."""

from __future__ import annotations

import math
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.prompts.random_ids import digest
from sglang_margingate.bench.side_by_side.compare import METRICS, MODES, Cell, Comparison, Workload
from sglang_margingate.gate.stats import Rate, percent

BENCH_SCHEMA = "margingate-bench/1"
WIDTH = 100

TABLES: Sequence[tuple[str, Mapping[str, str], int]] = (
    ("Throughput", {"tokens/s": "tokens_per_s"}, 0),
    ("Time to the first token (TTFT)", {"p50, ms": "ttft_p50_ms", "p99, ms": "ttft_p99_ms"}, 1),
    ("Time per token after the first (TPOT)", {"p50, ms": "tpot_p50_ms", "p99, ms": "tpot_p99_ms"}, 2),
)
"""Title, columns and decimals of the tables of speed."""

LEGEND = (
    "Numbers are medians of the runs; `of stock` is the median over stock's, in brackets the smallest and the largest "
    "run over it. `share`: percent of requests that keep the server's policy (the others carry margingate_policy off); "
    "identity and steps are of these requests, in all runs. A mode without a share treats all requests alike."
)


def environment(device: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "device": device,
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "versions": dict(versions),
    }


def markdown(result: Comparison, workload: Workload, facts: Mapping[str, Any]) -> str:
    """Return the tables with their conditions and notes, in at most 100 columns."""
    out = [*_conditions(result, workload, facts), ""]
    cells = [c for c in result.cells if c.repeats]
    if cells:
        out += [
            "Identity: requests with the same tokens and finish reason as their prompt alone on that server",
            "",
            tables.markdown(["mode", "share", "identical", "triggered steps", "flips of verified steps"],
                    [[*_name(c), _count(c.identical), _share(c.triggered), _share(c.flips)] for c in cells]),
            "",
        ]  # fmt: skip
        for title, metrics, digits in TABLES:
            head = [h for name in metrics for h in (name, "of stock")]
            rows = [[*_name(c), *_against_stock(result, c, list(metrics.values()), digits)] for c in cells]
            out += [title, "", tables.markdown(["mode", "share", *head], rows), ""]
    remarks = [_failure(result, label, why) for label, why in result.failures.items()] + result.notes
    unproven = [c.mode for c in result.cells if c.proof.source and c.proof.largest < 2]
    if unproven:
        remarks.append(f"No batch of two or more was seen in: {', '.join(dict.fromkeys(unproven))}.")
    if cells:
        remarks.append(LEGEND)
    return "\n".join(out) + "\n" + "\n\n".join("\n".join(wrap(r)) for r in remarks)


def _conditions(result: Comparison, workload: Workload, facts: Mapping[str, Any]) -> list[str]:
    sets = dict.fromkeys(p.dataset for p in workload.prompts)
    versions = ", ".join(
        f"{k} {v}" for k, v in facts["versions"].items() if k in ("sglang", "torch", "sglang-margingate")
    )
    own = [p.max_tokens for p in workload.prompts if p.max_tokens is not None]
    lengths = [] if len(own) == len(workload.prompts) else [f"at most {workload.max_tokens}"]
    if own:
        lengths.append(f"exactly {_range(own)}")
    out = wrap(f"{facts.get('model', 'model')} on {facts['device']}; {versions}; {facts['date'][:10]}.")
    out += wrap(
        f"{len(workload.prompts):,} prompts ({', '.join(sets)}), {' or '.join(lengths)} tokens each, "
        f"{workload.arrivals.describe()}."
    )
    if facts.get("server_flags"):
        out += wrap(f"Every server: {' '.join(facts['server_flags'])}")
    for label, flags in result.mode_flags.items():
        out += wrap(f"{label} also: {' '.join(flags)}")
    return out


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least} to {most}"


def _failure(result: Comparison, label: str, why: str) -> str:
    runs = result.repeats_of(label)
    after = f"stopped after {runs:,} run{'s' * (runs != 1)}, which are above" if runs else "not measured"
    return f"**{label}: {after}**: {why}"


def _name(cell: Cell) -> list[str]:
    # A label may say that a mode came again: stock (2).
    gated = MODES[cell.mode.partition(" (")[0]].gated
    return [cell.mode, f"{cell.share:g}%" if gated else "-"]


def _against_stock(result: Comparison, cell: Cell, metrics: Sequence[str], digits: int) -> list[str]:
    out = []
    for metric in metrics:
        value, ratio = cell.median(metric), result.ratio(cell, metric)
        low, high = result.ratio_spread(cell, metric)
        out.append("-" if math.isnan(value) else f"{value:,.{digits}f}")
        out.append("-" if math.isnan(ratio) else f"{ratio:.2f} ({low:.2f}-{high:.2f})")
    return out


def _count(rate: Rate) -> str:
    return f"{rate.numerator:,}/{rate.denominator:,}"


def _share(rate: Rate) -> str:
    return f"{_count(rate)} ({percent(rate.value)})" if rate.denominator else "-"


def wrap(text: str) -> list[str]:
    """Return the lines of a remark."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def to_dict(result: Comparison, workload: Workload, facts: Mapping[str, Any], complete: bool) -> dict[str, Any]:
    """Return everything in plain types; NaN becomes null."""
    return plain(
        {
            "schema": BENCH_SCHEMA,
            "complete": complete,
            "environment": dict(facts),
            "workload": {
                "datasets": list(dict.fromkeys(p.dataset for p in workload.prompts)),
                "prompts": len(workload.prompts),
                "max_tokens": workload.max_tokens,
                "repeats": workload.repeats,
                "shares": list(workload.shares),
                "arrivals": {**asdict(workload.arrivals), "words": workload.arrivals.describe()},
                "seed": workload.seed,
                "prompts_digest": digest(workload.prompts),
            },
            "cells": [_cell(result, c) for c in result.cells],
            "runs": result.runs,
            "failures": result.failures,
            "mode_flags": result.mode_flags,
            "notes": result.notes,
            "servers": result.servers,
        }
    )


def _cell(result: Comparison, cell: Cell) -> dict[str, Any]:
    return {
        "mode": cell.mode,
        "share": cell.share,
        "median": {m: cell.median(m) for m in METRICS},
        "spread": {m: cell.spread(m) for m in METRICS},
        "ratio_to_stock": {m: result.ratio(cell, m) for m in METRICS},
        "ratio_spread": {m: result.ratio_spread(cell, m) for m in METRICS},
        "identical": asdict(cell.identical),
        "triggered": asdict(cell.triggered),
        "flips_of_verified": asdict(cell.flips),
        "batches": cell.proof.to_dict(),
        "repeats": cell.repeats,
    }


def plain(value: Any) -> Any:
    """Return plain types for JSON; a number that is none becomes null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
