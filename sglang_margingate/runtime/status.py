"""What ``GET /margingate/status`` shows of one scheduler process, in plain types."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from sglang_margingate.canonical.classes import FastPath
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.runtime.clock import HostTime
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Requests
from sglang_margingate.runtime.step import Step


@dataclass
class BatchSizes:
    """Sizes of decode batches: the gauge that proves that batches formed."""

    now: int = 0
    steps: Counter[int] = field(default_factory=Counter)

    def note(self, requests: int) -> None:
        """Note one decode forward."""
        self.now = requests
        self.steps[requests] += 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        by_rows = {str(k): v for k, v in sorted(self.steps.items())}
        return {"now": self.now, "max": max(self.steps, default=0), "steps_by_rows": by_rows}


class Fingerprinted(Protocol):
    """What ``system_fingerprint`` is (:class:`~sglang_margingate.settings.fingerprint.Fingerprint`)."""

    value: str

    def changed(self, why: str, readable: bool = True) -> None:
        """Read the weights again."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        ...


@dataclass(frozen=True)
class Runtime:
    """The parts of one scheduler process, put together by serving/setup.py; each does its own work."""

    config: MarginGateConfig
    recorder: Recorder
    labels: Labels
    requests: Requests
    step: Step
    batches: BatchSizes
    metrics: Metrics
    fast: FastPath | None = None
    """The canonical fast path, where it is used."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What start-up found: model, dtype, attention back end, device, self-test, invariance."""
    writer: Any = None
    """The trace's writer, or None."""
    fingerprint: Fingerprinted | None = None
    """The digest of all that the answers stand on; None where nobody made one."""
    started: float = field(default_factory=time.time)
    host: HostTime = field(default_factory=HostTime)
    """What our hooks take of the scheduler's thread."""

    def lower(self, reason: str) -> None:
        """From now on no response of this server claims anything; ``reason`` says why."""
        self.labels.lower(reason)
        if self.writer is not None:
            self.writer.update_manifest(notes=list(self.labels.notes))

    def weights_changed(self, reason: str, readable: bool = True) -> None:
        """The weights are not those that were probed: claim nothing, and share no column with what came before.

        ``readable``: False once their memory was given back.
        """
        self.labels.weight_changes += 1
        self.lower(reason)
        if self.fingerprint is not None:
            self.fingerprint.changed(reason, readable)
            self.labels.fingerprint = self.fingerprint.value
            if self.writer is not None:
                self.writer.update_manifest(fingerprint=self.fingerprint.to_dict())

    def status(self) -> dict[str, Any]:
        """Return the status page of this process."""
        recorder, config = self.recorder, self.config
        recorder.settle()
        rate, rules = recorder.audit.rate, self.step.rules
        changes = self.labels.weight_changes
        out: dict[str, Any] = {
            **self.facts,
            "weight_changes": changes,
            "policy": config.policy.value,
            "repair": config.repair.value,
            "threshold": self.requests.rules.threshold_for(""),
            "thresholds": self.requests.rules.thresholds(),
            "verify_rows": config.verify_rows,
            "window": self.step.window,
            "radix": config.radix.value,
            "chunk": config.chunk if rules.isolated else 1,
            "fast_path": config.fast_path.value,
            "audit_rate": config.audit_rate,
            "notes": list(self.labels.notes),
            "test_knobs": TestKnobs().active,
            "totals": {**asdict(recorder.totals), "untriggered_checked": recorder.audit.audited},
            "missed": {
                "missed": rate.numerator,
                "checked": rate.denominator,
                "upper_95": rate.upper() if rate.denominator else None,
            },
            "batch_rows": self.batches.to_dict(),
            "host": self.host.to_dict(),
            "uptime_seconds": time.time() - self.started,
        }
        if self.fingerprint is not None:
            out["fingerprint"] = self.fingerprint.to_dict()
        if changes:
            out["model"] = f"{out.get('model')} (weights changed since the start)"
        if self.step.verifier is not None:
            out["verifier"] = asdict(self.step.verifier.counters)
        if self.writer is not None:
            dropped, errors = self.writer.dropped_rows, self.writer.write_errors
            out["trace"] = {"path": str(self.writer.path), "dropped_rows": dropped, "write_errors": errors}
            self.metrics.trace(dropped, errors)
        return out
