"""What is known about one live request: its ledger, its clocks, and the step that is not committed yet.

The state hangs on SGLang's own ``Req`` object and dies with it, so an abort, a disconnect or a retraction can leave
nothing behind in a table of ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, overload

import msgspec
from margingate_kernels.seeded import Draw

from sglang_margingate.config import Policy
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.policy import triggers
from sglang_margingate.runtime.verifier import KvDelta
from sglang_margingate.words import Reason

ATTRIBUTE = "margingate_state"

UNLIMITED = 1 << 30
"""Tokens asked for at most, where a request set no limit."""

Top = tuple[list[int], list[float]]
"""A path's best tokens and their log-probabilities."""


@dataclass(slots=True)
class Forward:
    """What the rows of one forward share, once its tokens are chosen."""

    decode: bool
    requests: int
    """Requests in it."""
    padded: int | None = None
    """Rows the linear layers really ran with; None where nobody saw it."""
    canonical: bool = False
    """It ran inside the canonical class, or as a prefill alone on the canonical grid."""
    time: float = 0.0
    """When its tokens were chosen, in seconds since the epoch; on a GPU the device's time, not when the host looked."""
    number: int = 0
    """Its number in the run."""
    ms: float = 0.0
    """From its begin to its tokens, verifies included."""


UNVERIFIED = (Reason.NONE.value, None, None, False, False, None, None, 0)
"""The trace's columns ``reason`` to ``window_rows`` of a step without a verify."""


NO_TOP = (None, None)
"""A path's best tokens where they were not taken."""


class StepRow(msgspec.Struct, gc=False, eq=False):
    """One request's row of a forward that chooses a token.

    Opened before the token is chosen, it is the request's pending step afterwards: its token may never be shown, as
    overlap may run one step too many. Thousands are made a second, so the garbage collector does not look at them: a
    pending row must not name its request (record.py), and nothing else in it leads back to a row.
    """

    index: int
    """Row of the logits."""
    slot: Any
    """The request's row in SGLang's table of K/V slots (``req_pool_idx``)."""
    state: RequestState
    position: int
    step: int
    """Index of the output token that the row chooses."""
    observed: bool = True
    """Its margin is taken; False for sampled requests and policy off, of which only the times are kept."""
    resumed: bool = False
    threshold: float = 0.0
    structural: bool = False
    """The step and every column it read ran inside the canonical class: it needs no verify, whatever its margin."""
    scored: bool = False
    """Its request's log-probabilities were computed row by row, from logits that depend on the row alone."""
    audit: bool = False
    """Drawn for the audit, before its margin was known."""
    fast_token: int = -1
    second_token: int = -1
    margin: float = float("nan")
    reason: Reason = Reason.NONE
    verify_token: int | None = None
    verify_margin: float | None = None
    window_rows: int = 0
    delta: KvDelta | None = None
    tops: tuple[Top, Top | None] | None = None
    """Best five of the fast path and of the verify, where the step was verified and traced; of the fast path alone where it
    was not, and its request asked for its steps."""
    forward: Forward | None = None
    """None while the forward runs."""
    token: int = -1
    waited_ms: float = 0.0
    waits: bool = False
    """Its margin decides something before the next forward."""

    @property
    def flipped(self) -> bool:
        """A confirmed mismatch."""
        return self.verify_token is not None and self.verify_token != self.fast_token

    @property
    def repairs(self) -> bool:
        """Whether the verify's token and columns are put in place (an audit is for the record only)."""
        return self.reason not in (Reason.NONE, Reason.AUDIT)

    @property
    def triggered(self) -> bool:
        """Whether the margin was low. A structural step does not trigger: its shape already answers for it."""
        assert self.forward is not None
        return self.forward.decode and not self.structural and triggers(self.margin, self.threshold)

    def trace(self, text: str | None) -> tuple[Any, ...]:
        """Return the step's row of the trace, in the order of ``STEP_COLUMNS``; ``text`` is the token's."""
        forward, ledger = self.forward, self.state.ledger
        assert forward is not None
        params = ledger.params
        verdict = UNVERIFIED
        if self.verify_token is not None:
            verdict = (
                self.reason.value, self.verify_token, self.verify_margin, self.flipped, self.repairs,
                *(self.delta or (None, None)), self.window_rows,
            )  # fmt: skip
        return (
            ledger.number, ledger.request_id, params.dataset, self.step, self.position, forward.time, self.token,
            self.fast_token, self.second_token, self.margin, params.threshold, self.triggered, *verdict,
            forward.requests, forward.padded, forward.canonical, self.structural, not forward.decode, forward.ms,
            self.waited_ms, 0.0, text, forward.number, *self._tops(),
        )  # fmt: skip

    def _tops(self) -> tuple[Any, ...]:
        fast, verified = self.tops or (None, None)
        return (*(fast or NO_TOP), *(verified or NO_TOP))


@dataclass
class RequestState:
    """Live record of one request in the scheduler."""

    ledger: RequestLedger
    arrival: float = field(default_factory=time.time)
    hidden: bool = False
    """A health check of SGLang's: in no count and in no trace."""
    plain: bool = True
    """Its tokens are the argmax of something that we can compute: not sampled without a seed, nor behind a logit processor of its
    own."""
    draw: Draw | None = None
    """How its tokens are drawn, of a seeded request; None: the best logit is chosen."""
    most_tokens: int = UNLIMITED
    """Tokens that it asked for at most: what overlap computes beyond them is never shown."""
    pending: StepRow | None = None
    """The newest step, until it is known whether its token is shown."""
    late: int = 0
    """Steps whose numbers are still on the device."""
    temperature: float = 0.0
    penalised: bool = False
    """It asks for penalties of the tokens that it has generated."""
    resumed_at: int = 0
    """Tokens of the output when its last prefill began: 0 but after a retraction."""
    prompt_tokens: int = 0
    prefill_ms: float = 0.0
    prefill_chunks: int = 0
    floored_tokens: int = 0
    cached_tokens: int = 0
    first_token_time: float | None = None
    last_token_time: float | None = None
    """Times of the first and the newest committed token."""
    max_batch_rows: int = 0
    last_token: int = 0
    """The token that the next decode step reads: 0 before any was chosen, as SGLang's own dummy."""
    closed: bool = False
    steps: dict[str, list[Any]] | None = None
    """Per-token detail for ``margingate_return_steps``; None when not asked for."""

    observed: bool = field(init=False)
    """Whether the margins of this request's steps are taken."""

    def __post_init__(self) -> None:
        self.observed = self.plain and self.ledger.params.policy is not Policy.OFF


class StepRows(Sequence[tuple[Any, ...]]):
    """Committed steps on their way to the trace; whoever reads them makes the tuples, on a thread of its own.

    Parameters
    ----------
    steps
        Committed, so that nothing of them changes any more.
    texts
        Each token's text; None where the run records none.
    """

    def __init__(self, steps: Sequence[StepRow], texts: Sequence[str | None] | None = None) -> None:
        self._steps, self._texts = steps, texts

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, at: int) -> tuple[Any, ...]: ...
    @overload
    def __getitem__(self, at: slice) -> StepRows: ...
    def __getitem__(self, at: int | slice) -> tuple[Any, ...] | StepRows:
        texts = self._texts
        if isinstance(at, slice):
            return StepRows(self._steps[at], None if texts is None else texts[at])
        return self._steps[at].trace(None if texts is None else texts[at])

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(StepRow.trace, self._steps, self._texts or repeat(None))


def state_of(req: Any) -> RequestState | None:
    """Return the state that hangs on ``req``, if any."""
    return getattr(req, ATTRIBUTE, None)
