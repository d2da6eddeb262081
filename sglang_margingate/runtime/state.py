"""What is known about one live request: its ledger, its clocks, and the step that is not committed yet.

The state hangs on SGLang's own ``Req`` object and dies with it, so an abort, a disconnect or a retraction can leave
nothing behind in a table of ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec
from margingate_kernels.seeded import Draw

from sglang_margingate.columns import LateColumns, Shared
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


@dataclass(slots=True, eq=False)
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

    def verdict(self) -> tuple[Any, ...]:
        """Return what the trace says of the step's verify, in the order of its columns."""
        if self.verify_token is None:
            return tuple(_VERDICT.values())
        return (
            self.reason.value, self.verify_token, self.verify_margin, self.flipped, self.repairs,
            *(self.delta or (None, None)), self.window_rows,
        )  # fmt: skip


@dataclass(eq=False)
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


_OWN = attrgetter(
    "step", "position", "token", "fast_token", "second_token", "margin", "structural", "waited_ms", "forward", "state",
    "verify_token", "tops",
)  # fmt: skip
"""What is read of every row: what it has of its own, whom it shares the rest with, and whether it was verified or has best tokens."""

_VERDICT = {
    "reason": Reason.NONE.value, "verify_token": None, "verify_margin": None, "flipped": False, "repaired": False,
    "kv_delta_first": None, "kv_delta_last": None, "window_rows": 0,
}  # fmt: skip
"""The columns of a verify, as they are of a step without one."""


class StepRows(LateColumns):
    """Committed steps on their way to the trace; whoever asks for their columns makes them, on a thread of its own.

    A row of a trace has 34 values, but its forward and its request have most of them, and few rows are verified. So columns
    are made of what rows share: that takes half of the interpreter's time that 34 values a row take, and
    meanwhile no step is launched.

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

    def __getitem__(self, at: slice) -> StepRows:
        return StepRows(self._steps[at], None if self._texts is None else self._texts[at])

    @classmethod
    def joined(cls, parts: Sequence[StepRows]) -> StepRows:
        """Return the rows of all parts; either each has texts or none has."""
        texts = [part._texts for part in parts if part._texts is not None]
        return cls([row for part in parts for row in part._steps], [text for part in texts for text in part] or None)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the columns of ``STEP_COLUMNS`` by name, of Python numbers; a column in which all is null is left out."""
        if not self._steps:
            return {}
        step, position, token, fast, second, margin, structural, waited, forward, state, verified, tops = zip(
            *map(_OWN, self._steps)
        )
        by_forward, by_request = Shared.of(forward), Shared.of(state)
        forwards: Sequence[Forward] = by_forward.values
        ledgers: list[RequestLedger] = [each.ledger for each in by_request.values]
        rows, inside = len(step), all(structural)
        columns: dict[str, Sequence[Any]] = {
            "request": by_request.with_values(each.number for each in ledgers),
            "request_id": by_request.with_values(each.request_id for each in ledgers),
            "dataset": by_request.with_values(each.params.dataset for each in ledgers),
            "step": step, "position": position,
            "time": by_forward.with_values(each.time for each in forwards),
            "token": token, "fast_token": fast, "second_token": second, "margin": margin,
            "threshold": by_request.with_values(each.params.threshold for each in ledgers),
            "triggered": Shared.all(False, rows) if inside else [row.triggered for row in self._steps],
            **self._verdicts(verified), **_best(tops),
            "batch_rows": by_forward.with_values(each.requests for each in forwards),
            "padded_rows": by_forward.with_values(each.padded for each in forwards),
            "canonical": by_forward.with_values(each.canonical for each in forwards),
            "structural": Shared.all(True, rows) if inside else structural,
            "prefill": by_forward.with_values(not each.decode for each in forwards),
            "step_ms": by_forward.with_values(each.ms for each in forwards),
            "verify_ms": waited if any(waited) else Shared.all(0.0, rows),
            "hold_ms": Shared.all(0.0, rows),
            "forward": by_forward.with_values(each.number for each in forwards),
        }  # fmt: skip
        return columns if self._texts is None else {**columns, "token_text": self._texts}

    def _verdicts(self, verified: Sequence[int | None]) -> dict[str, Sequence[Any]]:
        rows = len(verified)
        if verified.count(None) < rows:
            return dict(zip(_VERDICT, zip(*(row.verdict() for row in self._steps))))
        return {name: Shared.all(value, rows) for name, value in _VERDICT.items() if value is not None}


def _best(tops: Sequence[tuple[Top, Top | None] | None]) -> dict[str, Sequence[Any]]:
    """Return the columns of both paths' best tokens."""
    if tops.count(None) == len(tops):
        return {}
    nothing = (None, None)
    fast, verified = zip(*(each or nothing for each in tops))
    columns: dict[str, Sequence[Any]] = {}
    for path, best in (("fast", fast), ("verify", verified)):
        columns[f"{path}_top_tokens"], columns[f"{path}_top_logprobs"] = zip(*(each or nothing for each in best))
    return columns


def state_of(req: Any) -> RequestState | None:
    """Return the state that hangs on ``req``, if any."""
    return getattr(req, ATTRIBUTE, None)
