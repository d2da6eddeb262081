"""What this server may claim at this moment: the start-up trial, and whatever has been seen since."""

from __future__ import annotations

import logging
from typing import Literal

from sglang_margingate.canonical.score_probe import NO_SCORES, ScoreTrial
from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.claims import Asked, Claims, label, logprobs
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.state import RequestState
from sglang_margingate.words import Guarantee

log = logging.getLogger(__name__)


class Labels:
    """Labels the responses of one scheduler process.

    Parameters
    ----------
    config
        The server's configuration, with what its start-up noted.
    recorder
        Counts what was seen.
    metrics
        Prometheus counters of answers, and gauges of the audit's bound and of a server that claims nothing.
    prefill, decode, scores
        What the trials at start-up showed (:class:`~sglang_margingate.gate.claims.Claims`).
    """

    def __init__(
        self, config: MarginGateConfig, recorder: Recorder, metrics: Metrics,
        prefill: Literal["batched", "grid"] | None = None, decode: bool = False,
        scores: ScoreTrial = NO_SCORES,
    ) -> None:  # fmt: skip
        self._config, self._recorder, self._metrics = config, recorder, metrics
        self._prefill, self._decode, self._scores = prefill, decode, scores
        self.weight_changes = 0
        """How often the weights were changed since the start; names the columns that gated requests may share."""
        self.fingerprint: str | None = None
        """``system_fingerprint`` of the answers that end now."""
        self._lowered: list[str] = []
        self._over_limit = False
        metrics.lowered(bool(config.notes))

    def lower(self, reason: str) -> None:
        """From now on no response of this server claims anything, those in flight included; ``reason`` says why."""
        if reason not in self._lowered:
            self._lowered.append(reason)
            self._metrics.lowered(True)
            log.warning("margingate: %s; responses claim nothing from now on", reason)

    @property
    def notes(self) -> tuple[str, ...]:
        """Why this server claims nothing; empty while it may."""
        flips = self._recorder.structural_flips
        if flips:
            # A flip where the shape was to answer for the bits: whatever was probed does not hold.
            self.lower(f"the audit found {flips} flipped step(s) inside the probed class: the class does not hold")
        return (*self._config.notes, *self._lowered)

    def claims(self) -> Claims:
        """Return what can be claimed now."""
        scores = self._scores
        return Claims(self.notes, self._prefill, self._decode, self._gated_note(), scores.output, scores.prompt)

    def label(self, state: RequestState, shown: int, aborted: bool) -> tuple[Guarantee, str]:
        """Return a finished request's guarantee and why, and count it."""
        found = label(state.ledger, self.claims(), shown, aborted, state.most_tokens == 0)
        self._metrics.answer(found[0].value)
        return found

    def logprobs(
        self, state: RequestState, guarantee: Guarantee, shown: int, asked: Asked | None
    ) -> Literal["exact", "batch"] | None:
        """Return what a finished request's log-probabilities are."""
        scoring = state.most_tokens == 0
        return None if asked is None else logprobs(state.ledger, self.claims(), guarantee, shown, asked, scoring)

    def _gated_note(self) -> str | None:
        """Show the audit's bound, say when it crosses the limit, and return what it costs unverified steps.

        Until the audit has shown a share as small as ``--margingate-max-miss``, nothing says that it is.
        """
        audit, limit = self._recorder.audit, self._config.max_miss
        self._metrics.missed_bound(audit.bound())
        if limit is None or self._config.policy is not Policy.GATE:
            return None
        over = audit.verdict(limit) != "within"
        if over is not self._over_limit:
            self._over_limit = over
            say = log.warning if over else log.info
            claim = "claim no guarantee" if over else "claim their guarantee again"
            say("margingate: %s; responses with unverified steps %s", audit.describe(limit), claim)
        return f"--margingate-max-miss: {audit.describe(limit)}" if over else None
