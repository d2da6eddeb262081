"""Threshold profiles: calibrated thresholds per dataset, bound to the model and the machine they were measured on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from sglang_margingate.config import DEFAULT_THRESHOLD, ConfigError
from sglang_margingate.strict_json import JsonError, read_json

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


def default_for(thresholds: Iterable[float]) -> float:
    """Return the threshold for traffic of no known dataset: the largest of the known ones, and never less than the server's own default.

    A calibration says nothing of traffic that it did not see: at a threshold that fits arithmetic, stories flip unnoticed.
    """
    return max([DEFAULT_THRESHOLD, *thresholds])


Logits = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]
Text = Annotated[str, Field(strict=True, max_length=1000)]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class DatasetThreshold:
    """The calibrated threshold of one dataset and the sample behind it."""

    threshold: Logits
    """Threshold (tau) in logits."""
    steps: Count = 0
    """Verified steps in the calibration sample."""
    flips: Count = 0
    """Flips among them."""
    trigger_rate: Share = 0.0
    """Share of steps with margin <= threshold."""
    missed: Count = 0
    """Flips above the threshold in the sample."""
    miss_upper_95: Share = 1.0
    """Upper bound of the missed-flip rate at 95% (Clopper-Pearson)."""

    @model_validator(mode="after")
    def _check_counts(self) -> DatasetThreshold:
        if not self.missed <= self.flips <= self.steps:
            raise ValueError(f"{self.missed} missed of {self.flips} flips of {self.steps} steps do not add up")
        return self

    @property
    def enough(self) -> bool:
        """Whether the sample may set a threshold."""
        return enough_evidence(self.steps, self.flips)


@dataclass(frozen=True, config=_STRICT)
class Profile:
    """A threshold profile. A threshold belongs to one model, server configuration and dataset (arXiv 2605.30218)."""

    model: Text
    dtype: Text
    attention_backend: Text
    device: Text
    sglang_version: Text
    torch_version: Text
    created: Text
    repair: Text
    default_threshold: Logits
    datasets: dict[Text, DatasetThreshold] = field(default_factory=dict)
    system_fingerprint: Text = ""
    """Of the server that it was measured on; empty where that was not told. Another one is no error: thresholds are settings too."""

    def threshold_for(self, dataset: str | None) -> float | None:
        """Return the dataset's threshold in logits, or None where the profile has none that rests on enough steps.

        The entry of untagged traffic never counts: it was made of whatever carried no tag, warm-up requests included, and
        would stand for every client that names no dataset.
        """
        entry = self.datasets.get(dataset) if dataset else None
        return entry.threshold if entry is not None and entry.enough else None

    @property
    def backed_default(self) -> float | None:
        """The threshold of traffic that the profile does not know, or None where no dataset's sample is large enough."""
        known = any(self.threshold_for(name) is not None for name in self.datasets)
        return default_for([self.default_threshold]) if known else None

    def ignored(self) -> list[str]:
        """Say of each entry that sets no threshold why not."""
        return [
            f"datasets.{name or '(untagged)'} is not used: "
            + (too_small(e.steps, e.flips) if name else "untagged traffic takes the default threshold")
            for name, e in self.datasets.items()
            if self.threshold_for(name) is None
        ]

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


_READER = TypeAdapter(Profile)


def parse_profile(data: object, where: str = "profile") -> Profile:
    """Check a profile's JSON and return it.

    Raises
    ------
    ConfigError
        One line naming the field, the value and the fix: wrong schema, unknown or missing fields, wrong values.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a JSON object; make one with `margingate calibrate`")
    body = dict(data)
    schema = body.pop("schema", None)
    if schema != PROFILE_SCHEMA:
        raise ConfigError(
            f"{where}: schema {schema!r:.80} is not {PROFILE_SCHEMA!r}; calibrate again with this version"
        )
    try:
        return _READER.validate_python(body)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}; make the file with `margingate calibrate`") from None


def _first(error: ValidationError) -> str:
    """Return one line for the first thing that is wrong, and how many more there are."""
    wrong = error.errors(include_url=False)
    first = wrong[0]
    place = ".".join(str(part) for part in first["loc"] if part != "[key]") or "the profile"
    message = first["msg"].removeprefix("Value error, ")
    shown = f"{first['input']!r}" if isinstance(first["input"], (str, int, float, list, type(None))) else ""
    more = f" ({len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    value = f"{shown[:60]}: " if shown and first["type"] != "missing" else ""
    return " ".join(f"{place[:200]}: {value}{message[:1].lower()}{message[1:]}{more}".split())


def load_profile(path: str | Path) -> Profile:
    """Read and check a profile file; errors are one line and name the file."""
    target = Path(path)
    try:
        data = read_json(target.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--margingate-profile: cannot read {target}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--margingate-profile: {target} is not UTF-8 text; name a profile") from None
    except JsonError as error:
        raise ConfigError(f"--margingate-profile: {target}: {error}; make it with `margingate calibrate`") from None
    return parse_profile(data, f"--margingate-profile {target}")
