"""A comparison as a Markdown table and as JSON, with hardware and versions named."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from sglang_margingate.bench.compare import METRICS, Cell, Comparison, Workload
from sglang_margingate.gate.stats import Rate, percent

BENCH_SCHEMA = "margingate-bench/1"


def environment(device: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "device": device,
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "versions": dict(versions),
    }


def markdown(result: Comparison, workload: Workload, facts: Mapping[str, Any]) -> str:
    """Return the table with its conditions and notes."""
    sets = dict.fromkeys(p.dataset for p in workload.prompts)
    versions = ", ".join(
        f"{k} {v}" for k, v in facts["versions"].items() if k in ("sglang", "torch", "sglang-margingate")
    )
    out = [
        f"{facts.get('model', 'model')} on {facts['device']}; {versions}; {facts['date'][:10]}. "
        f"{len(workload.prompts):,} prompts ({', '.join(sets)}), at most {workload.max_tokens} tokens each, "
        f"{workload.arrivals.describe()}; median of {workload.repeats} runs (smallest to largest).",
        "",
        "| mode | deterministic | tokens/s | of stock | TTFT p50, p99 ms | TPOT p50, p99 ms | TPOT of stock | identical "
        "| triggered | flips of verified |",
        "| --- " * 10 + "|",
    ]
    out += [_row(result, c) for c in result.cells if c.repeats]
    out += [f"| {label} | not measured: {why} |" + " |" * 8 for label, why in result.failures.items()]
    out += [
        "",
        "identical: deterministic requests with the same tokens and finish reason as the same prompt alone on that",
    ]
    out += ["server, all runs. Ratios are of medians, in this session on this machine."]
    unproven = [c.mode for c in result.cells if c.proof.source and c.proof.largest < 2]
    if unproven:
        out.append(f"No batch of two or more was seen in: {', '.join(dict.fromkeys(unproven))}.")
    return "\n".join(out)


def _row(result: Comparison, cell: Cell) -> str:
    low, high = cell.spread("tokens_per_s")
    cells = [
        cell.mode,
        f"{cell.share:g}%",
        f"{cell.median('tokens_per_s'):,.0f} ({low:,.0f} to {high:,.0f})",
        _times(result.ratio(cell, "tokens_per_s")),
        f"{cell.median('ttft_p50_ms'):.0f}, {cell.median('ttft_p99_ms'):.0f}",
        f"{cell.median('tpot_p50_ms'):.1f}, {cell.median('tpot_p99_ms'):.1f}",
        _times(result.ratio(cell, "tpot_p50_ms")),
        f"{cell.identical.numerator:,}/{cell.identical.denominator:,}",
        _share(cell.triggered),
        _share(cell.flips),
    ]
    return "| " + " | ".join(cells) + " |"


def _times(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.2f}"


def _share(rate: Rate) -> str:
    return f"{rate.numerator:,}/{rate.denominator:,} ({percent(rate.value)})" if rate.denominator else "-"


def to_dict(result: Comparison, workload: Workload, facts: Mapping[str, Any], complete: bool) -> dict[str, Any]:
    """Return everything in plain types; NaN becomes null."""
    return _plain(
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
            },
            "cells": [_cell(result, c) for c in result.cells],
            "runs": result.runs,
            "failures": result.failures,
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
        "identical": asdict(cell.identical),
        "triggered": asdict(cell.triggered),
        "flips_of_verified": asdict(cell.flips),
        "batches": cell.proof.to_dict(),
        "repeats": cell.repeats,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
