"""What the step sees of a forward: its requests, the shape that it ran at, and how its tokens would be chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sglang_margingate.canonical.shape import ForwardShape
from sglang_margingate.runtime.logprobs import Scorer
from sglang_margingate.runtime.prefill import Chunk
from sglang_margingate.runtime.state import RequestState

__all__ = ["SHAPE", "ForwardShape", "ForwardView", "Sampling"]

SHAPE = "margingate_shape"
"""Attribute of a ``ForwardBatch`` that ran without a graph: its :class:`ForwardShape`, set where the forward ended."""


@dataclass(slots=True)
class ForwardView:
    """One forward of the server's, as the step sees it; made when it begins, completed where it ends.

    Parameters
    ----------
    states
        The requests behind its rows, in order; None for one that was made before set-up.
    decode
        It decodes; False: it prefills.
    began
        A mark of the clock.
    """

    states: list[RequestState | None]
    decode: bool
    began: Any
    chooses: bool = True
    """Tokens are chosen from it; False where all of its requests want none."""
    shape: ForwardShape | None = None
    """What it ran at; None where nobody saw it."""
    chunks: list[Chunk] = field(default_factory=list)
    """The requests' parts, of a prefill."""
    canonical: list[bool] = field(default_factory=list)
    """Whether each request's part is canonical, of a prefill."""
    host_s: float = 0.0
    """Seconds that our hooks took of it so far."""
    waited: bool = False
    """The host waited for a verdict."""


class Sampling(Scorer, Protocol):
    """How SGLang would choose a forward's tokens."""

    logits: torch.Tensor
    """[B, V] float32; a repair is written into it."""
    all_greedy: bool
    plain: bool
    """SGLang's sampler would do nothing but choose tokens: no log-probabilities, logit processors or observers."""
    plain_argmax: bool
    """SGLang's sampler would do nothing but take the argmax of the logits as they are."""
    processes: bool
    """Penalties, bias or a grammar change the logits before the argmax."""
    slots: list[Any]
    """Each request's row in the table of K/V slots; None for one that has ended."""
    columns: torch.Tensor | None
    """[B] pool slots of the K/V columns that a decode wrote."""

    def positions(self) -> Sequence[int]:
        """Return the position of the token that each row of a decode read."""
        ...

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what argmax is taken from, leaving ``logits`` untouched; the same result however often it is asked."""
        ...

    def choose(self) -> torch.Tensor:
        """Let SGLang choose the tokens, [B]."""
        ...
