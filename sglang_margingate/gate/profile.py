"""Threshold profiles: calibrated thresholds per dataset, bound to the model and the machine they were measured on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.config import ConfigError, check_threshold

PROFILE_SCHEMA = "margingate-profile/1"


class Floor(NamedTuple):
    """The least that a sample must hold before a threshold is taken from it."""

    steps: int
    """Verified steps, where the sample has `flips`."""
    flips: int
    """Flips among them: fewer say where one flip's margin lay, not where the largest lies."""
    steps_alone: int
    """Verified steps that carry a threshold by their number, whatever flipped."""


EVIDENCE_FLOOR = Floor(steps=3_000, flips=10, steps_alone=10_000)
"""What a threshold must rest on.

The threshold of a sample is the largest margin of any flip in it, so further steps miss at most 3/N of N steps at 95% (rule of three, docstring of
:mod:`sglang_margingate.gate.calibration`), whatever flipped. 3,000 steps bound the miss rate at 0.1%, a fifth of the 0.48% of steps that flip in the
paper's example: below that the bound says little that stock decoding does not. A sample with fewer than 10 flips knows the tail of their margins by
its length alone; 10,000 steps bound the miss rate at 0.03%, at most 3 of 100 answers of 100 tokens. `margingate calibrate` takes about 12,600 a
dataset unless told otherwise.
"""


def enough_evidence(steps: int, flips: int) -> bool:
    """Return whether a sample of that many verified steps and flips may set a threshold (:data:`EVIDENCE_FLOOR`)."""
    floor = EVIDENCE_FLOOR
    return steps >= floor.steps_alone or (steps >= floor.steps and flips >= floor.flips)


def too_small(steps: int, flips: int) -> str:
    """Say what a sample below the floor has and what it needs."""
    floor = EVIDENCE_FLOOR
    return (
        f"sample too small: {steps:,} steps, {flips:,} flips; a threshold needs {floor.steps:,} steps with {floor.flips} "
        f"flips, or {floor.steps_alone:,} steps"
    )


@dataclass(frozen=True)
class DatasetThreshold:
    """The calibrated threshold of one dataset and the sample behind it."""

    threshold: float
    """Threshold (tau) in logits."""
    steps: int = 0
    """Steps in the calibration sample."""
    flips: int = 0
    """Flips among them."""
    trigger_rate: float = 0.0
    """Share of steps with margin <= threshold."""
    missed: int = 0
    """Flips above the threshold in the sample."""
    miss_upper_95: float = 1.0
    """Upper bound of the missed-flip rate at 95% (Clopper-Pearson)."""


@dataclass(frozen=True)
class Profile:
    """A threshold profile. A threshold belongs to one model, server configuration and dataset (arXiv 2605.30218)."""

    model: str
    dtype: str
    attention_backend: str
    device: str
    sglang_version: str
    torch_version: str
    created: str
    repair: str
    default_threshold: float
    datasets: dict[str, DatasetThreshold] = field(default_factory=dict)

    def threshold_for(self, dataset: str | None) -> float | None:
        """Return the dataset's threshold in logits, or None when the profile does not know the dataset."""
        entry = self.datasets.get(dataset or "")
        return None if entry is None else entry.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that :func:`parse_profile` reads back."""
        return {"schema": PROFILE_SCHEMA, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, whole or not at all."""
        target = Path(path)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        temporary.replace(target)

    def mismatches(self, **current: str) -> list[str]:
        """Name every field in which the running server differs, as ``field: profile X, server Y``."""
        return [
            f"{name}: profile {getattr(self, name)!r}, server {value!r}"
            for name, value in current.items()
            if getattr(self, name) != value
        ]


def _check_fields(data: dict[str, Any], cls: type, where: str) -> None:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def parse_profile(data: object, where: str = "profile") -> Profile:
    """Check a profile's JSON and return it.

    Raises
    ------
    ConfigError
        One line naming the field and the fix: wrong schema, unknown or missing fields, bad thresholds.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a JSON object; make one with `margingate calibrate`")
    body = dict(data)
    schema = body.pop("schema", None)
    if schema != PROFILE_SCHEMA:
        raise ConfigError(f"{where}: schema {schema!r} is not {PROFILE_SCHEMA!r}; calibrate again with this version")
    _check_fields(body, Profile, where)
    missing = sorted({f.name for f in fields(Profile)} - set(body) - {"datasets"})
    if missing:
        raise ConfigError(f"{where}: missing field(s) {', '.join(missing)}; make the file with `margingate calibrate`")
    raw = body.pop("datasets", {})
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: datasets is not an object of name: thresholds")
    datasets = {}
    for name, entry in raw.items():
        place = f"{where}: datasets.{name}"
        if not isinstance(entry, dict) or "threshold" not in entry:
            raise ConfigError(f"{place}: needs a field threshold")
        _check_fields(entry, DatasetThreshold, place)
        check_threshold(entry["threshold"], f"{place}.threshold")
        datasets[name] = DatasetThreshold(**entry)
    body["default_threshold"] = check_threshold(body["default_threshold"], f"{where}: default_threshold")
    return Profile(datasets=datasets, **body)


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile file; errors are one line and name the file."""
    target = Path(path)
    try:
        data = json.loads(target.read_text())
    except OSError as error:
        raise ConfigError(f"--margingate-profile: cannot read {target}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"--margingate-profile: {target} is not valid JSON ({error})") from None
    return parse_profile(data, f"--margingate-profile {target}")
