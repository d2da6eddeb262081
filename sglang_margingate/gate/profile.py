"""Threshold profiles: calibrated thresholds per dataset, bound to the model and the machine they were measured on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sglang_margingate.config import ConfigError, check_threshold

PROFILE_SCHEMA = "margingate-profile/1"


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
