"""The gate: which steps are verified, and why."""

from __future__ import annotations

from sglang_margingate.config import Policy
from sglang_margingate.words import Reason

NEVER_MISSED = (Reason.RESUME, Reason.LIMIT)
"""Reasons that verify a step whatever its margin and put the answer in place: no flip of it can be missed."""


OUTCOMES = ("stable", "would trigger", "triggered", "flipped", "repaired", "missed")
"""What became of a step. `would trigger`: its margin was low and its policy verifies nothing (``log``)."""


def triggers(margin: float, threshold: float) -> bool:
    """Return whether a step's margin is low: ``margin <= threshold``, so exact ties always trigger.

    A margin that is not a number triggers too: such logits carry no evidence that the token is safe.
    """
    return not margin > threshold


def missed(reason: Reason, triggered: bool, flipped: bool) -> bool:
    """Return whether a step is a missed flip: it flipped and its margin would not have had it verified.

    Known only where a step was verified all the same: by the audit, or by the policy ``always`` (which repairs it; the
    margin would have missed it). A structural step never triggers, so its flip is missed. This is the one definition;
    server, dashboard and report share it.
    """
    return flipped and not triggered and reason not in NEVER_MISSED


def outcome(reason: Reason, triggered: bool, flipped: bool, repaired: bool) -> str:
    """Return what became of a step, in one word of :data:`OUTCOMES`; server, dashboard and report share it.

    Whether a flip was repaired and whether it lay above the threshold are two facts: under `always` both hold of some, and
    no flip is missed. Missed here means: seen by the audit alone, so that the answer kept the fast path's token.
    """
    if flipped:
        if repaired:
            return "repaired"
        return "missed" if missed(reason, triggered, flipped) else "flipped"
    if triggered:
        return "would trigger" if reason is Reason.NONE else "triggered"
    return "stable"


def decide(
    policy: Policy, margin: float, threshold: float, audit: bool = False, structural: bool = False, full: bool = False
) -> Reason:
    """Return why a step is to be verified, or :attr:`Reason.NONE`.

    Parameters
    ----------
    policy
        The request's policy.
    margin
        The fast path's margin in logits (arXiv 2605.30218: top-1 minus top-2).
    threshold
        The request's threshold (tau) in logits.
    audit
        Whether this step was drawn for the audit.
    structural
        Whether the step ran inside the canonical class, so that its margin decides nothing.
    full
        Whether the request's open window has reached its limit.
    """
    if policy is Policy.ALWAYS:
        return Reason.ALWAYS
    if policy is not Policy.GATE:
        return Reason.NONE
    if not structural and triggers(margin, threshold):
        return Reason.MARGIN
    if full:
        return Reason.LIMIT
    return Reason.AUDIT if audit else Reason.NONE
