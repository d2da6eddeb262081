"""The one configuration of a margin-gated server: typed, checked, and passed to child processes as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

CONFIG_ENV = "MARGINGATE_CONFIG"
"""Environment variable that carries the configuration to SGLang's scheduler processes."""

DEFAULT_THRESHOLD = 0.5
"""Threshold without a calibrated profile, in logits.

bf16 logits in [8, 16) are 0.0625 apart, and a flip needs a perturbation of at least half the margin, so 0.5 leaves
room for four units in the last place on either side: far above any flip seen on the embedded model (docs/benchmarks.md),
at the price of more triggers. Calibrate to lower it.
"""

DEFAULT_VERIFY_ROWS_CPU = 16
DEFAULT_VERIFY_ROWS_GPU = 64
DEFAULT_CHUNK_CPU = 64
DEFAULT_CHUNK_GPU = 512

CANONICAL_PREFILL_CPU = 2048
"""Tokens of the largest prefill forward under the canonical fast path on a CPU: larger ones would take long to probe."""

MAP_DIR_OFF = "off"
"""Value of ``--margingate-map-dir`` that keeps no map."""


def default_map_dir() -> str:
    """Return the folder of kept invariance maps: under the user's cache folder, or off where there is none."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # what the XDG specification says of relative ones
        base = os.path.expanduser("~/.cache")
    return str(Path(base, "margingate", "maps")) if os.path.isabs(base) else MAP_DIR_OFF


class ConfigError(ValueError):
    """A setting is wrong. The message is one line and names the field, the value and the fix."""


class Policy(str, Enum):
    """What is done with the margin of each step."""

    OFF = "off"
    """Stock SGLang; nothing is attached."""
    LOG = "log"
    """Margins are recorded; output is stock SGLang's."""
    GATE = "gate"
    """MarginGate (arXiv 2605.30218): steps with margin <= threshold are verified and repaired."""
    ALWAYS = "always"
    """Every step is verified: the baseline that the gate is measured against."""

    @property
    def verifies(self) -> bool:
        """True for the policies that change output and need canonical prefill."""
        return self in (Policy.GATE, Policy.ALWAYS)


class Repair(str, Enum):
    """Which K/V columns a verify puts in place."""

    COLUMN = "column"
    """The current column only (the paper's repair)."""
    WINDOW = "window"
    """Also every column of the request since its last verify, so that the answer depends on the tokens alone."""


class Radix(str, Enum):
    """What the prefix cache may share."""

    CANONICAL = "canonical"
    """Whatever was probed to be canonical. Today: whole prompt chunks, since no probe has put generated columns (decode
    shape) and prompt columns (prefill shape) into one class."""
    PROMPT_ONLY = "prompt-only"
    """Whole prompt chunks from canonical prefill; generated columns never."""
    STOCK = "stock"
    """SGLang's own radix cache: a prefix hit may change output. Guarantees are lowered to none."""
    OFF = "off"
    """No prefix is shared."""


class FastPathMode(str, Enum):
    """At which shapes ordinary forwards run."""

    STOCK = "stock"
    """SGLang's own."""
    CANONICAL = "canonical"
    """Only shapes that were probed to give a row the same bits: steps inside them need no verify."""


@dataclass(frozen=True)
class MarginGateConfig:
    """Settings of one server; every field has a flag ``--margingate-<field>`` in the front door.

    Raises
    ------
    ConfigError
        When a value is out of range; the message names the flag, the value and the fix.
    """

    policy: Policy = Policy.GATE
    repair: Repair = Repair.WINDOW
    threshold: float | None = None
    """Threshold in logits; None means the profile's, or :data:`DEFAULT_THRESHOLD`."""
    profile: dict[str, Any] | None = None
    """Content of a checked profile file (:mod:`sglang_margingate.gate.profile`)."""
    audit_rate: float = 0.0
    """Share of untriggered steps that get a shadow verify."""
    max_miss: float | None = None
    """Largest acceptable 95% upper bound of the missed-flip rate; above it the guarantee drops to none."""
    verify_rows: int = DEFAULT_VERIFY_ROWS_CPU
    """The canonical M: rows of every verify pass."""
    fast_path: FastPathMode = FastPathMode.STOCK
    map_dir: str | None = None
    """Folder that keeps invariance maps between starts; None keeps none."""
    radix: Radix = Radix.CANONICAL
    chunk: int = DEFAULT_CHUNK_CPU
    """Tokens of a canonical prefill chunk; prefix hits are floored to multiples of it."""
    trace: bool = True
    trace_dir: str = "traces"
    trace_text: bool = False
    allow_untested: bool = False
    """Serve a configuration outside what was tested, at guarantee none."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """Reasons why every guarantee of this server is lowered to none."""

    def __post_init__(self) -> None:
        kinds = (("policy", Policy), ("repair", Repair), ("radix", Radix), ("fast_path", FastPathMode))
        for name, kind in kinds:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                choices = ", ".join(m.value for m in kind)
                flag = "--margingate-" + name.replace("_", "-")
                raise ConfigError(f"{flag}: {value!r} is unknown; use one of {choices}") from None
        object.__setattr__(self, "notes", tuple(self.notes))
        if self.fast_path is FastPathMode.CANONICAL and not self.policy.verifies:
            raise ConfigError(
                f"--margingate-fast-path: canonical needs the policy gate or always, not {self.policy.value}: "
                "the gate guards the steps that leave the class"
            )
        if self.threshold is not None:
            object.__setattr__(self, "threshold", check_threshold(self.threshold, "--margingate-threshold"))
        object.__setattr__(self, "audit_rate", check_share(self.audit_rate, "--margingate-audit-rate"))
        if self.max_miss is not None:
            object.__setattr__(self, "max_miss", check_share(self.max_miss, "--margingate-max-miss"))
        for name, least in (("verify_rows", 1), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                flag = "--margingate-" + name.replace("_", "-")
                raise ConfigError(f"{flag}: {value!r} is not a whole number of at least {least}")

    def to_json(self) -> str:
        """Return the JSON that :meth:`from_json` reads back to an equal object."""
        return json.dumps(asdict(self), default=lambda o: o.value if isinstance(o, Enum) else str(o))

    @classmethod
    def from_json(cls, text: str) -> MarginGateConfig:
        """Read :meth:`to_json`'s output; unknown fields are an error."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{CONFIG_ENV}: not valid JSON ({error}); let the front door set it") from None
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"{CONFIG_ENV}: unknown field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**data)

    def to_env(self) -> None:
        """Set :data:`CONFIG_ENV` so that child processes see this configuration."""
        os.environ[CONFIG_ENV] = self.to_json()

    @classmethod
    def from_env(cls) -> MarginGateConfig | None:
        """Return the configuration of this process, or None when the plugin was not asked for."""
        text = os.environ.get(CONFIG_ENV)
        return cls.from_json(text) if text else None


def check_threshold(value: object, name: str) -> float:
    """Return a valid threshold in logits or raise :class:`ConfigError` naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(
            f"{name}: {value!r} is not a number; give a margin in logits, 0 or more (0 verifies exact ties)"
        )
    number = float(value)
    if math.isnan(number) or number < 0:
        raise ConfigError(
            f"{name}: {value!r} is not a margin; give a number in logits, 0 or more (0 verifies exact ties)"
        )
    return number


def check_share(value: object, name: str) -> float:
    """Return a valid share in [0, 1] or raise :class:`ConfigError` naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= float(value) <= 1.0:
        raise ConfigError(f"{name}: {value!r} is not a share; give a number from 0 to 1")
    return float(value)
