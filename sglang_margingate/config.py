"""The one configuration of a margin-gated server: typed, checked, and passed to child processes in a file."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from sglang_margingate.strict_json import JsonError, read_json

CONFIG_ENV = "MARGINGATE_CONFIG"
"""Environment variable that names the file with the configuration to SGLang's scheduler processes.

A file, because a profile of many datasets is longer than an environment variable may be.
"""

FOLDER_PREFIX = "margingate-"
"""How the name of that file's folder begins."""

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


DEFAULT_KEEP = "30d,20GB"
"""What is kept of the traces unless told otherwise."""

KEEP_OFF = "off"
"""Value of ``--margingate-trace-keep`` that deletes nothing."""

_AGES = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    """Margins are recorded; output is stock SGLang's, but that seeded requests are drawn with their seeds."""
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


class PrefillKind(str, Enum):
    """Which kernel attends in prefills on a GPU."""

    AUTO = "auto"
    """FlashAttention-3 where it was tried and holds, else ours."""
    TRITON = "triton"
    """Ours."""
    FA3 = "fa3"
    """FlashAttention-3, as SGLang's package ships it; where it cannot be used the server does not start."""


@dataclass(frozen=True)
class Keep:
    """How long and how much of finished runs is kept; None is without a limit."""

    age_seconds: int | None = None
    bytes: int | None = None

    def __str__(self) -> str:
        """Return the text that :func:`parse_keep` reads back."""
        parts = [
            next(f"{value // size}{unit}" for unit, size in reversed(units.items()) if value % size == 0)
            for value, units in ((self.age_seconds, _AGES), (self.bytes, _SIZES))
            if value is not None
        ]
        return ",".join(parts) or KEEP_OFF


def parse_keep(text: str) -> Keep:
    """Read an age, a size, both with a comma between, or ``off``.

    Raises
    ------
    ConfigError
        Anything else, a limit given twice, or a limit of nothing.
    """
    fix = f"give an age (h, d, w), a size (MB, GB, TB) or both, such as {DEFAULT_KEEP}, or {KEEP_OFF}"
    if text.strip().lower() == KEEP_OFF:
        return Keep()
    limits: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*([A-Za-z]{1,2})\s*", part)
        number, unit = (int(match[1]), match[2]) if match else (0, "")
        kind, size = (
            ("age_seconds", _AGES[unit.lower()]) if unit.lower() in _AGES else ("bytes", _SIZES.get(unit.upper(), 0))
        )
        if not number or not size or kind in limits:
            raise ConfigError(f"--margingate-trace-keep: {text!r:.80} is not what to keep of the traces; {fix}")
        limits[kind] = number * size
    return Keep(**limits)


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
    window: int | None = None
    """Most columns of a request that may stand open before a verify is forced; None: as many as a pass has rows."""
    fast_path: FastPathMode = FastPathMode.STOCK
    prefill_graphs: bool = True
    """Replay prefills of the canonical fast path from CUDA graphs, where there is a GPU."""
    prefill_attention: PrefillKind = PrefillKind.AUTO
    """What attends in prefills, where there is a GPU."""
    map_dir: str | None = None
    """Folder that keeps invariance maps between starts; None keeps none."""
    radix: Radix = Radix.CANONICAL
    chunk: int = DEFAULT_CHUNK_CPU
    """Tokens of a canonical prefill chunk; prefix hits are floored to multiples of it."""
    trace: bool = True
    trace_dir: str = "traces"
    trace_text: bool = False
    trace_keep: Keep = field(default_factory=lambda: parse_keep(DEFAULT_KEEP))
    """What is kept of finished runs; older and surplus ones are deleted."""
    allow_untested: bool = False
    """Serve a configuration outside what was tested, at guarantee none."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """Reasons why every guarantee of this server is lowered to none."""

    def __post_init__(self) -> None:
        kinds = (("policy", Policy), ("repair", Repair), ("radix", Radix), ("fast_path", FastPathMode),
                 ("prefill_attention", PrefillKind))  # fmt: skip
        for name, kind in kinds:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, kind(value))
            except ValueError:
                choices = ", ".join(m.value for m in kind)
                flag = "--margingate-" + name.replace("_", "-")
                raise ConfigError(f"{flag}: {value!r} is unknown; use one of {choices}") from None
        self._check_plain()
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
            self._check_max_miss()
        for name in ("verify_rows", "chunk", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                flag = "--margingate-" + name.replace("_", "-")
                raise ConfigError(f"{flag}: {value!r} is not a whole number of at least 1")

    def _check_plain(self) -> None:
        """Check the types of what has no rules of its own, and read what came as text."""
        if isinstance(self.trace_keep, str):
            object.__setattr__(self, "trace_keep", parse_keep(self.trace_keep))
        kinds: tuple[tuple[str, Any, str], ...] = (
            ("trace", bool, "true or false"), ("trace_text", bool, "true or false"), ("allow_untested", bool, "true or false"),
            ("prefill_graphs", bool, "true or false"),
            ("trace_dir", str, "the name of a folder"), ("map_dir", (str, type(None)), "the name of a folder"),
            ("profile", (dict, type(None)), "the content of a profile"), ("notes", (list, tuple), "a list of notes"),
            ("trace_keep", Keep, f"what to keep, such as {DEFAULT_KEEP}"),
        )  # fmt: skip
        for name, kind, what in kinds:
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"--margingate-{name.replace('_', '-')}: {getattr(self, name)!r:.80} is not {what}")
        object.__setattr__(self, "notes", tuple(str(note) for note in self.notes))

    def _check_max_miss(self) -> None:
        """Refuse a limit that nothing would ever be measured against."""
        if self.policy is not Policy.GATE:
            raise ConfigError(
                f"--margingate-max-miss: {self.max_miss!r} has no use under the policy {self.policy.value}: only gate leaves "
                "steps unverified; leave it out or add --margingate-policy gate"
            )
        if not self.audit_rate:
            raise ConfigError(
                f"--margingate-max-miss: {self.max_miss!r} needs audited steps to be compared with; add "
                "--margingate-audit-rate, such as 0.01"
            )

    def to_json(self) -> str:
        """Return the JSON that :meth:`from_json` reads back to an equal object."""
        data = {**asdict(self), "trace_keep": str(self.trace_keep)}
        return json.dumps(data, default=lambda o: o.value if isinstance(o, Enum) else str(o))

    @classmethod
    def from_json(cls, text: str) -> MarginGateConfig:
        """Read :meth:`to_json`'s output; unknown fields are an error."""
        try:
            data = read_json(text)
        except JsonError as error:
            raise ConfigError(f"{CONFIG_ENV}: {error}; let the front door write it") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{CONFIG_ENV}: not a JSON object; let the front door write it")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"{CONFIG_ENV}: unknown field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**data)

    @contextmanager
    def handed_over(self) -> Iterator[Path]:
        """Show this configuration to child processes, in a file that only this user can read, for the time of a ``with``."""
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # mode 0700
        path = folder / "config.json"
        before = os.environ.get(CONFIG_ENV)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.write(self.to_json())
            os.environ[CONFIG_ENV] = str(path)
            yield path
        finally:
            if before is None:
                os.environ.pop(CONFIG_ENV, None)
            else:
                os.environ[CONFIG_ENV] = before
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def from_env(cls) -> MarginGateConfig | None:
        """Return the configuration of this process, or None when the plugin was not asked for."""
        path = os.environ.get(CONFIG_ENV)
        if not path:
            return None
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"{CONFIG_ENV}: cannot read {path!r:.200} ({reason}); start with the front door"
            ) from None
        return cls.from_json(text)


def forget_handed_over() -> None:
    """Remove what :meth:`MarginGateConfig.handed_over` of this process wrote, before a signal that no ``with`` outlives."""
    path = os.environ.get(CONFIG_ENV)
    if path and Path(path).parent.name.startswith(FOLDER_PREFIX):
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def check_threshold(value: object, name: str) -> float:
    """Return a valid threshold in logits or raise :class:`ConfigError` naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(
            f"{name}: {value!r} is not a number; give a margin in logits, 0 or more (0 verifies exact ties)"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ConfigError(
            f"{name}: {value!r:.40} is not a margin; give a finite number in logits, 0 or more (0 verifies exact ties)"
        )
    return number


def check_share(value: object, name: str) -> float:
    """Return a valid share in [0, 1] or raise :class:`ConfigError` naming ``name``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value!r:.40} is not a share; give a number from 0 to 1")
    return float(value)
