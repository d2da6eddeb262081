"""What the hooks know about one live request: its ledger, its clocks, and the step that is not committed yet.

The state hangs on SGLang's own ``Req`` object and dies with it, so an abort, a disconnect or a retraction can leave
nothing behind in a table of ours.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.words import Reason

ATTRIBUTE = "margingate_state"


class StepRecord(NamedTuple):
    """One step before it is known whether its token is committed (overlap may run one step too many)."""

    step: int
    row: tuple[Any, ...]
    """The step's trace row, in the order of ``STEP_COLUMNS``."""
    reason: Reason
    triggered: bool
    flipped: bool
    margin: float
    verify_ms: float


@dataclass
class RequestState:
    """Live record of one request in the scheduler."""

    ledger: RequestLedger
    arrival: float = field(default_factory=time.time)
    pending: StepRecord | None = None
    next_step: int = 0
    prompt_tokens: int = 0
    prefill_ms: float = 0.0
    prefill_chunks: int = 0
    floored_tokens: int = 0
    cached_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None
    max_batch_rows: int = 0
    last_token: int = -1
    closed: bool = False
    steps: dict[str, list[Any]] | None = None
    """Per-token detail for ``margingate_return_steps``; None when not asked for."""


def state_of(req: Any) -> RequestState | None:
    """Return the state that hangs on ``req``, if any."""
    return getattr(req, ATTRIBUTE, None)
