"""What a finished response may claim, and the sentence that says why. No evidence means ``none``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sglang_margingate.config import Policy
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.words import Guarantee


@dataclass(frozen=True)
class Claims:
    """What one server can claim at this moment, from what was tried at start-up and what was seen since.

    Parameters
    ----------
    notes
        Why this server claims nothing at all; empty while it may.
    prefill
        What the trial at start-up showed of prompt columns: ``batched`` (any companions, chunks and hits),
        ``grid`` (alone, in chunks of C), or None (nothing, or not tried).
    decode
        The trial showed that decode gives a row the same bits at every size of the class.
    gated_note
        Why steps that were not verified cannot be claimed, of the audit's bound; None while they can.
    output_scores, prompt_scores
        Log-probabilities of chosen tokens, and of a prompt's, were found to depend on their row alone.
    """

    notes: tuple[str, ...] = ()
    prefill: Literal["batched", "grid"] | None = None
    decode: bool = False
    gated_note: str | None = None
    output_scores: bool = False
    prompt_scores: bool = False

    @property
    def prefill_in_class(self) -> bool:
        """A prefill alone answers for the token that it chose: the canonical fast path found a class and tried it."""
        return self.prefill == "batched" or (self.prefill == "grid" and self.decode)


Asked = Literal["output", "prompt"]
"""Log-probabilities that a request asks for: of chosen tokens, or of its prompt's as well."""


def label(
    ledger: RequestLedger, claims: Claims, shown: int, aborted: bool = False, scoring: bool = False
) -> tuple[Guarantee, str]:
    """Return a finished request's guarantee and the sentence of why.

    Parameters
    ----------
    ledger
        The request's record; its counters hold every committed step.
    claims
        The server's.
    shown
        Tokens of the answer.
    aborted
        The answer was cut off.
    scoring
        The request asked for no token: its answer is what a prefill gives.
    """
    why = _why_nothing(ledger, claims, shown, aborted, scoring)
    if why is not None:
        return Guarantee.NONE, why
    if not shown:
        return _scored(ledger, claims)
    c, decodes = ledger.counters, shown - 1
    steps = "1 decode step" if decodes == 1 else f"{decodes} decode steps"
    if claims.prefill_in_class and not ledger.outside and not ledger.stale:
        if not decodes:
            return Guarantee.STRUCTURAL, "one token: it stands on its prefill alone, which ran inside the probed class"
        if claims.decode and c.structural >= decodes:
            return Guarantee.STRUCTURAL, f"the prefill and all of {steps} ran inside the probed class"
        if claims.decode and c.structural + c.repaired >= decodes:
            text = f"the prefill and {c.structural} of {steps} ran inside the probed class, and so did the verify of the rest"
            return Guarantee.STRUCTURAL, text
    if decodes and c.repaired >= decodes and not ledger.stale:
        return Guarantee.VERIFIED, f"all of {steps} were verified, on canonical columns"
    if claims.gated_note is not None:
        return Guarantee.NONE, claims.gated_note
    if not decodes:
        return (
            Guarantee.GATED,
            "one token: its prefill ran alone on the canonical grid, and there was no step to verify",
        )
    inside = f", {c.structural} ran inside the probed class" if c.structural else ""
    text = f"of {steps} {c.repaired} were verified{inside}, the others had a margin above the threshold"
    if ledger.stale:
        text += "; repair `column` left earlier columns batch-shaped"
    return Guarantee.GATED, text


def _scored(ledger: RequestLedger, claims: Claims) -> tuple[Guarantee, str]:
    """Return the label of a request that asked for no token, whose prefills were all canonical."""
    if claims.prefill_in_class and not ledger.outside and not ledger.stale:
        return (
            Guarantee.STRUCTURAL,
            "no token was asked for: it stands on its prefill alone, which ran inside the probed class",
        )
    if claims.gated_note is not None:
        return Guarantee.NONE, claims.gated_note
    return Guarantee.GATED, "no token was asked for: its prefill ran alone on the canonical grid"


def logprobs(
    ledger: RequestLedger, claims: Claims, guarantee: Guarantee, shown: int, asked: Asked | None, scoring: bool = False
) -> Literal["exact", "batch"] | None:
    """Return what a finished request's log-probabilities are: the same bits in any batch (``exact``), or the batch's.

    None where it asked for none. Exact are those of an answer of which every forward ran inside the class or was verified,
    computed by rows that depend on nothing else, each of which was seen; of a scoring request, those of its prefill.
    """
    if asked is None:
        return None
    inside = guarantee in (Guarantee.STRUCTURAL, Guarantee.VERIFIED) or (scoring and guarantee is Guarantee.GATED)
    seen = ledger.counters.scored >= (1 if scoring else shown)
    holds = claims.output_scores and (asked == "output" or claims.prompt_scores)
    return "exact" if inside and seen and holds else "batch"


def _why_nothing(ledger: RequestLedger, claims: Claims, shown: int, aborted: bool, scoring: bool) -> str | None:
    """Return why a response claims nothing, or None where there is evidence to judge."""
    reasons = [*claims.notes, *ledger.notes]
    if ledger.params.policy is Policy.OFF:
        reasons.insert(0, "its policy is off: stock decoding, nothing was observed")
    elif ledger.params.policy is Policy.LOG:
        reasons.insert(0, "its policy is log: margins are recorded, nothing is verified")
    elif ledger.ungated is not None:
        reasons.insert(0, ledger.ungated)
    if reasons:
        return "; ".join(dict.fromkeys(reasons))
    if aborted:
        return "the answer was cut off (aborted)"
    if not shown and not scoring:
        return "no token was chosen, so there is no step to claim anything for"
    if not ledger.prefills:
        return "no prefill forward of this request was seen to end"
    if ledger.counters.steps < shown:
        return f"only {ledger.counters.steps} of {shown} steps were observed"
    return None
