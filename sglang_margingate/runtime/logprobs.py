"""Log-probabilities whose bits depend on their own row alone, and their best entries in one order.

SGLang's sampler takes another way for a whole batch once one of its requests samples (the logarithm of a softmax instead of
a log-softmax), writes over the logits on that way, and gathers the value of its own token before ours is put in place. The
best k of a row come from ``topk``, whose order among equal values depends on k and on the number of rows, and bf16 logits
are equal often. So the rows that a claim is made for are computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_margingate.runtime.prefill import Chunk
from sglang_margingate.runtime.state import RequestState, StepRow

ALIGN = 16
"""Rows are padded to a multiple of so many values: a row's sum may begin where its first byte is aligned."""

BLOCK_ROWS = 64
"""Rows that are ordered at once: their keys take eight bytes a value."""


def row_logprobs(logits: torch.Tensor, temperatures: torch.Tensor | None = None) -> torch.Tensor:
    """Return the log-probabilities of each row, float32 [rows, vocabulary], never below the smallest float32.

    Parameters
    ----------
    logits
        [rows, vocabulary], processed: with penalties, bias and a grammar's mask.
    temperatures
        [rows, 1] float32 that the logits are divided by; None: none.
    """
    scaled = logits.float() if temperatures is None else logits.float() / temperatures
    vocabulary = scaled.shape[1]
    more = -vocabulary % ALIGN
    if more:
        # Minus infinity adds nothing to a row's sum, and every row begins at the same alignment.
        scaled = torch.nn.functional.pad(scaled, (0, more), value=float("-inf"))
    out = torch.nn.functional.log_softmax(scaled, dim=-1)[:, :vocabulary]
    return out.clamp_(min=torch.finfo(out.dtype).min)


def best(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest ``k`` of each row and their columns, [rows, k] each: falling, equal ones by their column.

    Parameters
    ----------
    values
        float32 [rows, columns].
    k
        At most the number of columns.
    """
    parts = [_best(block, k) for block in values.split(BLOCK_ROWS)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([value for value, _ in parts]), torch.cat([index for _, index in parts])


def _best(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    columns = values.shape[1]
    bits = values.contiguous().view(torch.int32).long()
    # As integers, floats keep their order once the negative ones are turned round; a smaller column is a larger key.
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    last = torch.arange(columns - 1, -1, -1, device=values.device)
    keys = ((rising << 32) | last).topk(k, dim=-1).values  # no two are equal, so any algorithm gives this order
    index = columns - 1 - (keys & 0xFFFFFFFF)
    return values.gather(1, index), index


# ---- which rows ---------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Puts log-probabilities into the answers of one forward."""

    asks: list[bool]
    """Whether each request asks for some; empty where none does."""

    def keep(self, rows: list[int]) -> None:
        """Compute those of these rows: what chooses tokens may write over the logits."""
        ...

    def score(self, tokens: torch.Tensor | None) -> None:
        """Put the kept ones, if any, and those of the chosen ``tokens`` in the place of SGLang's."""
        ...


def keep_asking(rows: Sequence[StepRow], scorer: Scorer, decode: bool) -> None:
    """Keep the log-probabilities of gated and of seeded rows whose requests ask for them.

    Those of other requests are left as SGLang makes them.
    """
    if not scorer.asks:
        return
    # SGLang's values of a seeded row are of a token that its own sampler drew.
    asking = [row for row in rows if scorer.asks[row.index] and (row.state.ledger.gated or row.state.draw is not None)]
    for row in asking:
        # A step outside the class that nothing repaired has the batch's logits.
        row.scored = row.structural or row.repairs or not decode
        if row.state.most_tokens == 0:
            row.state.ledger.counters.scored += 1  # it is no step: no token was asked for
    if asking:
        scorer.keep([row.index for row in asking])


def keep_scored(states: Sequence[RequestState | None], chunks: Sequence[Chunk], scorer: Scorer) -> None:
    """The same for a prefill of which no token is chosen, as all of its requests want none."""
    rows = []
    for index, (state, chunk, asks) in enumerate(zip(states, chunks, scorer.asks)):
        if state is not None and chunk.last and state.ledger.gated and asks:
            state.ledger.counters.scored += 1
            rows.append(index)
    if rows:
        scorer.keep(rows)
