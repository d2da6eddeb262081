"""Log-probabilities in SGLang's answers: those of rows that a claim is made for are put in the place of SGLang's own.

What is asked for comes from the batch: the chosen token's, the best k, those of given token ids. SGLang turns what stands in
its ``LogitsProcessorOutput`` into answers, for one token or many, streamed or not, native or OpenAI's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sglang_margingate.runtime.logprobs import best, row_logprobs
from sglang_margingate.runtime.state import state_of

ORIGINAL = "SGLANG_RETURN_ORIGINAL_LOGPROB"
"""SGLang's switch: log-probabilities before the temperature."""


NOTHING = torch.empty(0)


class Scores:
    """Log-probabilities of some rows of one forward.

    Parameters
    ----------
    output
        SGLang's ``LogitsProcessorOutput``.
    batch
        Its ``ForwardBatch``.
    reqs
        The requests behind the rows.
    """

    def __init__(self, output: Any, batch: Any, reqs: Sequence[Any]) -> None:
        self._output, self._batch, self._reqs = output, batch, reqs
        self._rows: list[int] = []
        self._index = self._logprobs = NOTHING  # one is made for each forward, and few ask for any

    def keep(self, rows: list[int], logits: torch.Tensor) -> None:
        """Compute the log-probabilities of ``rows`` of the processed logits [B, V], before anything writes over those."""
        device = logits.device
        self._rows, self._index = rows, to_device(rows, torch.int64, device)
        temperatures = [temperature(self._reqs[row]) for row in rows]
        scale = None
        if any(t != 1.0 for t in temperatures):
            scale = to_device(temperatures, torch.float32, device)[:, None]
        self._logprobs = row_logprobs(logits[self._index], scale)

    def put(self, tokens: torch.Tensor | None) -> None:
        """Write them into SGLang's output, and those of the chosen ``tokens`` [B] where some were chosen."""
        if not self._rows:
            return
        out, found = self._output, self._logprobs
        if tokens is not None and out.next_token_logprobs is not None:
            chosen = tokens[self._index].long()[:, None]
            out.next_token_logprobs[self._index] = found.gather(1, chosen)[:, 0]
        most = max(self._batch.top_logprobs_nums[row] for row in self._rows)
        if most > 0:
            values, index = best(found, most)
            for at, row in enumerate(self._rows):
                k = self._batch.top_logprobs_nums[row]
                if k > 0:
                    out.next_token_top_logprobs_val[row] = values[at, :k]
                    out.next_token_top_logprobs_idx[row] = index[at, :k]
        for at, row in enumerate(self._rows):
            wanted = self._batch.token_ids_logprobs[row]
            if wanted:
                out.next_token_token_ids_logprobs_val[row] = found[at, to_device(wanted, torch.int64, found.device)]


def fill_gaps(output: Any) -> None:
    """Give requests that name no tokens an empty tensor where others of their batch do: SGLang leaves a list there.

    SGLang 0.5.17 and 0.5.20 then ask that list for ``tolist``, and the server ends; 0.5.23 fills the gaps itself.
    """
    values = output.next_token_token_ids_logprobs_val
    if values:
        empty = torch.empty(0)
        output.next_token_token_ids_logprobs_val = [v if isinstance(v, torch.Tensor) else empty for v in values]


def temperature(req: Any) -> float:
    """Return what a request's logits are divided by for its log-probabilities.

    One that asks for no token is scored as it is: SGLang does so, unless a neighbour's token is drawn from the same forward.
    """
    params = req.sampling_params
    if params.max_new_tokens == 0 or os.environ.get(ORIGINAL, "").lower() in ("1", "true"):
        return 1.0
    return float(params.temperature)


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return values on a device, without a wait for what runs there."""
    made = torch.tensor(values, dtype=dtype)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


# ---- hook functions ---------------------------------------------------------------------------------------------------


class Best(NamedTuple):
    """What ``torch.topk`` returns."""

    values: torch.Tensor
    indices: torch.Tensor


class Ordered:
    """Rows of values whose ``topk`` has one order, also among equal ones and whatever the neighbours' k is."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def topk(self, k: int, dim: int = -1) -> Best:
        """Return the best ``k`` of each row: falling, equal ones by their column."""
        return Best(*best(self._values.float(), k))


def order_prompt_top(original: Any, logprobs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Let SGLang list the best k of a prompt's positions in an order that its neighbours cannot change."""
    return original(Ordered(logprobs), *args, **kwargs)


class _WithoutToken:
    """SGLang's output of a forward, but for the log-probability of a token that was not asked for."""

    next_token_logprobs = None

    def __init__(self, output: Any) -> None:
        self._output = output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def add_return_values(
    original: Any,
    processor: Any,
    i: int,
    req: Any,
    pt: int,
    next_token_ids: list[int],
    num_input_logprobs: int,
    output: Any,
) -> Any:
    """Give a gated request that asks for no token the same answer whether or not its neighbours ask for one.

    SGLang chooses a token for each request of a forward unless all of them want none, and shows that one's log-probability.
    """
    state = state_of(req)
    if req.is_prefill_only and state is not None and state.ledger.gated:
        output = _WithoutToken(output)
    return original(processor, i, req, pt, next_token_ids, num_input_logprobs, output)
