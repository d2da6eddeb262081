"""The ledger: per request, which K/V columns are still batch-shaped and what the next verify must recompute.

Position t's column is *open* when the fast path wrote it after the last verify. Index ranges of one request::

    [0, prompt)            columns of the prompt: canonical, from canonical prefill
    [prompt, window_start) generated columns, written inside the canonical class or recomputed by a verify: canonical
    [window_start, now]    open: tokens in `window`, `window[i]` is the token read at position window_start + i
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.policy import missed
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.words import Reason


class LedgerError(RuntimeError):
    """The ledger's picture of a request and the server's differ; verifying on would corrupt K/V."""


@dataclass
class Counters:
    """What happened to committed steps, of one request or of a server."""

    steps: int = 0
    triggers: int = 0
    structural: int = 0
    verified: int = 0
    repaired: int = 0
    """Steps whose verify was put in place: all verified ones but the audited."""
    audited: int = 0
    flips: int = 0
    missed: int = 0
    verify_ms: float = 0.0
    scored: int = 0
    """Steps whose log-probabilities were computed row by row (runtime/logprobs.py)."""

    def add(
        self, reason: Reason, triggered: bool, flipped: bool, verify_ms: float = 0.0, structural: bool = False,
        scored: bool = False,
    ) -> None:  # fmt: skip
        """Count one step."""
        self.scored += scored
        self.steps += 1
        self.triggers += triggered
        self.verify_ms += verify_ms
        self.structural += structural
        self.verified += reason is not Reason.NONE
        self.repaired += reason not in (Reason.NONE, Reason.AUDIT)
        self.audited += reason is Reason.AUDIT
        self.flips += flipped
        self.missed += missed(reason, triggered, flipped)

    def decisions(self) -> dict[str, int]:
        """Return the counts without the times: what every rank of a server must have counted alike."""
        return {name: value for name, value in asdict(self).items() if name != "verify_ms"}


@dataclass
class RequestLedger:
    """The open columns and the record of one request.

    Parameters
    ----------
    request_id
        SGLang's request id.
    params
        The request's resolved parameters.
    repair
        Which columns a verify puts in place.
    ungated
        Why the request's steps are not verified although its policy would, in words: sampled, given up. None: they are.
    number
        Number of the request, unique in its run (an id may be used twice).
    """

    request_id: str
    params: RequestParams
    repair: Repair
    ungated: str | None = None
    number: int = 0
    window_start: int = 0
    window: list[int] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    notes: list[str] = field(default_factory=list)
    """Why this request claims nothing."""
    prefills: int = 0
    """Prefill forwards of this request that were seen to end, canonical or not."""
    outside: int = 0
    """Decode steps whose column is not canonical by its shape: outside the class, or reading a column that is."""
    _stale: bool = False
    """`column` repair left batch-shaped columns behind for good."""
    _newest: tuple[int, int] = (-1, -1)
    _verifies: bool = False
    """Whether its policy verifies; asked several times a step."""
    _gates: bool = False
    """Whether it verifies low margins only."""

    def __post_init__(self) -> None:
        self._verifies = self.params.policy.verifies
        self._gates = self.params.policy is Policy.GATE

    @property
    def clean(self) -> bool:
        """True when every column so far is canonical, so that a step inside the class is canonical too."""
        return not self.window and not self._stale

    @property
    def stale(self) -> bool:
        """True when `column` repair left batch-shaped columns behind for good."""
        return self._stale

    @property
    def gated(self) -> bool:
        """True when this request's steps may be verified."""
        return self.ungated is None and self._verifies

    def note(self, text: str) -> None:
        """Note once why this request claims nothing."""
        if text not in self.notes:
            self.notes.append(text)

    def note_prefill(self, why_not: str | None) -> None:
        """Note that a prefill forward of this request ended, and why its columns are not canonical (or None)."""
        self.prefills += 1
        if why_not is not None:
            self.note(why_not)

    def full(self, limit: int) -> bool:
        """Return whether the open window has reached ``limit`` columns; `column` repair never reads it back."""
        return self.repair is Repair.WINDOW and len(self.window) >= limit

    def start(self, prompt_tokens: int, generated: list[int]) -> None:
        """Begin after a prefill: prompt columns are canonical, re-prefilled generated ones are open.

        ``generated`` is empty for a new request. After a retraction it holds every token generated so far: their
        columns were re-prefilled at another shape, so the whole of them is the window.
        """
        self.window_start = prompt_tokens
        self.window = list(generated)
        if generated:
            self._newest = (prompt_tokens + len(generated) - 1, generated[-1])

    def read(self, position: int, token: int, in_class: bool = False) -> bool:
        """Note that a decode step read ``token`` at ``position`` and wrote that column on the fast path.

        Returns
        -------
        bool
            The step is structural: it ran inside the canonical class and so did every column it read. Its column is
            canonical as it is. ``token`` is then needed by a verify only.
        """
        expected = self.window_start + len(self.window)
        if position != expected:
            raise LedgerError(
                f"request {self.request_id}: decode step at position {position}, ledger expects {expected}"
            )
        self._newest = (position, token)
        if in_class and self.clean:
            self.window_start += 1
            return True
        self.outside += 1
        self.window.append(token)
        return False

    def passes(self, position: int, token: int) -> bool:
        """Note a decode step inside the class as :meth:`read` does, if nothing about it can ask for a verify.

        Nearly every step of a canonical server is such a one. False: nothing was noted; ask :meth:`read`.
        """
        if self.window or self._stale or position != self.window_start or not self._gates or self.ungated is not None:
            return False
        self.window_start = position + 1
        self._newest = (position, token)
        return True

    def rows(self) -> list[tuple[int, int]]:
        """Return the (position, token) rows that a verify of the newest column must compute, oldest first."""
        if self.repair is Repair.COLUMN or not self.window:
            return [self._newest]
        return [(self.window_start + i, token) for i, token in enumerate(self.window)]

    def repaired(self) -> None:
        """Note that a verify put its columns in place.

        With `column` repair the older open columns stay batch-shaped for good (the paper's choice), so the window
        is forgotten either way.
        """
        self._stale |= self.repair is Repair.COLUMN and len(self.window) > 1
        self.window_start += len(self.window)
        self.window.clear()
