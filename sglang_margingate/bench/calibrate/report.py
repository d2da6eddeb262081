"""A calibration in words and numbers: the passes, each dataset's threshold with its reason, and how they carry over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from sglang_margingate.bench import tables
from sglang_margingate.bench.calibrate.binding import Binding
from sglang_margingate.bench.calibrate.passes import Calibrator, DatasetResult
from sglang_margingate.config import DEFAULT_THRESHOLD
from sglang_margingate.gate.calibration import transfer_matrix
from sglang_margingate.gate.profile import EVIDENCE_FLOOR, DatasetThreshold, Profile, default_for, too_small
from sglang_margingate.gate.stats import percent


def largest_threshold(results: Mapping[str, DatasetResult]) -> float:
    """Return the largest calibrated threshold, :data:`DEFAULT_THRESHOLD` where there is none."""
    known = (r.threshold for r in results.values() if r.enough and not r.transferred)
    return max(known, default=DEFAULT_THRESHOLD)


def build_profile(binding: Binding, results: Mapping[str, DatasetResult]) -> Profile:
    """Return the profile, bound to the server that it was made on; datasets with too small a sample are not in it."""
    datasets = {
        name: DatasetThreshold(
            threshold=r.threshold,
            steps=r.last.flips.denominator,
            flips=r.last.flips.numerator,
            trigger_rate=r.last.triggered.value,
            missed=r.last.missed.numerator,
            miss_upper_95=r.last.missed.upper(),
        )
        for name, r in results.items()
        if r.enough
    }
    created = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Profile(
        **binding._asdict(),
        created=created,
        default_threshold=default_for([largest_threshold(results)]),
        datasets=datasets,
    )


def passes_table(results: Mapping[str, DatasetResult]) -> str:
    """Return a line per dataset and pass."""
    rows = [
        [
            name,
            f"{p.recorded_at:.5g}",
            f"{p.triggered.denominator:,}",
            f"{p.triggered.numerator:,} ({percent(p.triggered.value)})",
            f"{p.flips.numerator:,}",
            f"{p.missed.numerator:,}",
            f"{p.calibration.threshold:.4g}",
        ]
        for name, result in results.items()
        for p in result.passes
    ]
    return tables.text(["dataset", "recorded at", "steps", "triggered", "flips", "missed", "needs"], rows)


def conclusions(results: Mapping[str, DatasetResult]) -> str:
    """Return a paragraph per dataset: its threshold, what the final pass showed, and what is only approximate."""
    return "\n".join(f"{name}: {_conclusion(r)}" for name, r in results.items())


def _conclusion(result: DatasetResult) -> str:
    p = result.last
    if not result.enough:
        small = too_small(p.flips.denominator, p.flips.numerator)
        more = math.ceil(EVIDENCE_FLOOR.steps_alone / max(p.flips.denominator, 1))
        return f"{small}. Not in the profile: the default threshold stands (give {more} times the prompts, --limit, or --max-tokens)"
    if result.transferred:
        rate = p.missed.describe()
        return (
            f"carried over at {result.threshold:g}: misses {p.missed.numerator:,} of {p.flips.numerator:,} flips, "
            f"{rate} of steps"
        )
    statement = p.calibration.statement()
    if result.confirmed:
        return (
            f"threshold {result.threshold:g}, confirmed in a pass at it: triggers {p.triggered.numerator:,}/"
            f"{p.triggered.denominator:,} steps ({percent(p.triggered.value)}), misses {p.missed.numerator:,} of "
            f"{p.flips.numerator:,} flips, {p.missed.describe()} of steps. In that pass: {statement}"
        )
    if p.chosen <= p.recorded_at:
        return (
            f"threshold {p.chosen:g}, approximate: recorded at {p.recorded_at:g}, where more steps are repaired than at "
            f"{p.chosen:g}, so a few more flips may occur there (leave out --no-refine to confirm). {statement}"
        )
    return (
        f"threshold {p.chosen:g}, NOT CONFIRMED: the pass at {p.recorded_at:g} missed {p.missed.numerator:,} of "
        f"{p.flips.numerator:,} flips, and no pass was made at {p.chosen:g}. {statement}"
    )


def transfer_table(calibrator: Calibrator) -> str:
    """Return what each dataset's threshold would do to the others' steps.

    Off the diagonal this is approximate: the steps were recorded at their own dataset's threshold.
    """
    results = calibrator.results
    samples = {name: tuple(calibrator.sample(name)) for name in results}
    thresholds = {name: r.threshold for name, r in results.items() if not r.transferred}
    table = transfer_matrix(samples, thresholds)
    found: Any = table.itertuples()
    rows = [
        [
            str(row.calibrated_on),
            f"{row.threshold:.4g}",
            str(row.applied_to),
            f"{row.triggered:,} ({percent(row.trigger_rate)})",
            f"{row.missed:,}/{row.flips:,}",
            percent(row.miss_upper, up=True),
        ]
        for row in found
    ]
    head = ["threshold of", "", "applied to", "triggered", "missed flips", "at most (95%)"]
    return tables.text(head, rows, left=(0, 2))


def to_dict(calibrator: Calibrator, binding: Binding) -> dict[str, Any]:
    """Return everything for scripts, in plain types."""
    return {
        "schema": "margingate-calibration/1",
        "binding": binding._asdict(),
        "goal": asdict(calibrator.goal),
        "default_threshold": default_for([largest_threshold(calibrator.results)]),
        "flips_by_concurrency": {k: asdict(v) for k, v in calibrator.flips_by_level().items()},
        "datasets": {
            name: {
                "threshold": r.threshold,
                "confirmed": r.confirmed and r.enough,
                "sample_too_small": not r.enough,
                "transferred": r.transferred,
                "prompts": r.prompts,
                "passes": [asdict(p) for p in r.passes],
                "conclusion": _conclusion(r),
            }
            for name, r in calibrator.results.items()
        },
    }
