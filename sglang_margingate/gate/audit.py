"""The audit: a small random share of untriggered steps is verified, which bounds the rate of missed flips.

Why the bound holds: the untriggered steps of a run are a fixed population, some of which would flip. The sampler draws
each with the same probability, by a hash that knows nothing of margins, tokens or the batch. Given how many were
drawn, they are a simple random sample without replacement, so the number of flips found is hypergeometric whatever the
dependence between steps, and Clopper-Pearson's binomial bound is conservative for it: 0 flips in N audited steps
means that at most 3/N of the untriggered steps flip, at 95%.

What it does not say: it speaks of the traffic that was audited, not of other traffic; and a missed flip that was not
drawn stays missed. An audit is a shadow verify, so the output is the same with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from sglang_margingate.gate.stats import Rate, trials_needed

_MASK = (1 << 64) - 1
_CACHED_REQUESTS = 65_536

Verdict = Literal["within", "exceeded", "undecided"]


class AuditSampler:
    """Draw (request, step) pairs with probability `rate`, the same ones whoever else is in the batch.

    Parameters
    ----------
    rate
        Share of steps to draw, in [0, 1].
    seed
        Another seed draws other steps.

    Notes
    -----
    A request's id is hashed once (BLAKE2b); each step then costs one SplitMix64 round (Steele, Lea and Flood, OOPSLA
    2014), about half a microsecond, so that the scheduler can ask at every step.
    """

    def __init__(self, rate: float, seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"audit rate {rate} is not a share; give a number from 0 to 1")
        self.rate, self.seed = float(rate), int(seed)
        self._limit = round(rate * (1 << 64))
        self._streams: dict[str, int] = {}

    def draw(self, request_id: str, step: int) -> bool:
        """Return whether step `step` (output token index, from 0) of this request is audited."""
        stream = self._streams.get(request_id)
        if stream is None:
            if len(self._streams) >= _CACHED_REQUESTS:
                self._streams.clear()  # a cache only: the next draw hashes again
            digest = blake2b(request_id.encode(), digest_size=8, key=self.seed.to_bytes(16, "little", signed=True))
            stream = self._streams[request_id] = int.from_bytes(digest.digest(), "little")
        x = (stream + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        return (x ^ (x >> 31)) < self._limit


@dataclass
class AuditCounter:
    """Counts of an audit and what they bound."""

    audited: int = 0
    """Untriggered steps that were verified."""
    missed: int = 0
    """Flips among them."""
    untriggered: int = 0
    """All untriggered steps, audited ones included."""
    triggered: int = 0
    """Steps that triggered: none of their flips is missed."""

    def add_triggered(self, steps: int = 1) -> None:
        """Count steps that triggered."""
        self.triggered += steps

    def add_untriggered(self, *, audited: bool, flipped: bool = False) -> None:
        """Count one untriggered step; `flipped` is the audit's finding, meaningless without one."""
        self.untriggered += 1
        if audited:
            self.audited += 1
            self.missed += flipped

    def add(self, other: AuditCounter) -> None:
        """Add another counter's counts, as of a finished request."""
        self.audited += other.audited
        self.missed += other.missed
        self.untriggered += other.untriggered
        self.triggered += other.triggered

    @property
    def rate(self) -> Rate:
        """Missed flips per audited step: estimates the share of untriggered steps that flip."""
        return Rate(self.missed, self.audited)

    def bound(self, confidence: float = 0.95) -> float:
        """Return the upper bound of the share of *untriggered* steps that flip; 1 with nothing audited."""
        return self.rate.upper(confidence)

    def bound_per_step(self, confidence: float = 0.95) -> float:
        """Return the upper bound of missed flips per step of *any* kind: fewer, as triggered steps miss none."""
        steps = self.untriggered + self.triggered
        return self.bound(confidence) * (self.untriggered / steps if steps else 1.0)

    def verdict(self, max_miss: float, confidence: float = 0.95) -> Verdict:
        """Judge the bound against the largest acceptable one.

        Returns
        -------
        str
            ``within``: the bound is at most `max_miss`. ``undecided``: it is above only for lack of audited steps
            (no flip found, or the observed rate is within). ``exceeded``: the observed rate itself is above.
        """
        if self.bound(confidence) <= max_miss:
            return "within"
        return "exceeded" if self.missed and self.rate.value > max_miss else "undecided"

    def describe(self, max_miss: float | None = None, confidence: float = 0.95) -> str:
        """Return one line for logs and status, with counts, bound and, where it is undecided, what is lacking."""
        line = f"missed flips {self.rate.describe(confidence)} of audited steps; {self.untriggered:,} untriggered"
        if max_miss is None:
            return line
        verdict = self.verdict(max_miss, confidence)
        if verdict == "undecided" and not self.missed and max_miss > 0:
            return (
                f"{line}; {trials_needed(max_miss, confidence):,} audited steps without a flip would show {max_miss:g}"
            )
        return f"{line}; {verdict} (largest acceptable {max_miss:g})"
