"""Tries whether log-probabilities give a row the same bits at every number of rows and in every place among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS = (1, 2, 3, 5, 8, 17, 33, 64, 129)
"""Numbers of rows to try."""

LogProbs = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ScoreTrial:
    """What start-up found of log-probabilities.

    Parameters
    ----------
    output
        Those of chosen tokens depend on their row alone.
    prompt
        Those of a prompt's tokens do, whoever shares its prefill.
    notes
        What does not hold, in words.
    """

    output: bool = False
    prompt: bool = False
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return plain types for status page and manifest."""
        return {"output": self.output, "prompt": self.prompt, "notes": list(self.notes)}


NO_SCORES = ScoreTrial()


def rows_hold(logprobs: LogProbs, vocabulary: int, device: torch.device | str) -> str | None:
    """Return what changed the bits of a row of log-probabilities, or None when nothing did.

    Parameters
    ----------
    logprobs
        Takes logits [rows, vocabulary].
    vocabulary, device
        The model's.
    """
    generator = torch.Generator().manual_seed(8)
    # Rounded as a model's logits are, and of their size: sums that end in other bits whenever their order changes.
    made = (4 * torch.randn(max(ROWS), vocabulary, generator=generator)).bfloat16().float().to(device)
    probed = made[:1].clone()
    wanted = logprobs(probed)[0]
    for rows in ROWS:
        for at in sorted({0, rows // 2, rows - 1}):
            logits = made[:rows].clone()
            logits[at] = probed[0]
            if not torch.equal(logprobs(logits)[at], wanted):
                return f"{rows} rows, at place {at}"
    return None
