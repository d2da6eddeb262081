"""Prefill rules: what keeps prompt columns canonical, and what is noted when it was not.

The canonical recipe (``isolated``): a gated request's prompt is prefilled alone, in chunks of C tokens on a fixed grid,
so that chunk j always has the same rows and the same prefix [0, jC), whatever else waits and whatever was cached::

    prompt of 150, C = 64      [0, 64) [64, 128) [128, 150)

Re-prefill after a retraction stops at the prompt's end too, so the prompt's chunks keep their shapes; the generated
columns behind it are recomputed by a verify (:attr:`Reason.RESUME`). Requests that did not ask for determinism are
batched as usual.

Where the canonical fast path has shown that prefill depends on neither companions, chunking nor prefix hits (``batched``),
SGLang batches and chunks as it likes, hits are used in full, and a request is only noted when a forward left the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.runtime.shape import SHAPE
from sglang_margingate.serving.state import RequestState, state_of

if TYPE_CHECKING:
    from sglang_margingate.serving.runtime import Runtime


class PrefillRules:
    """Keeps gated requests' prefill chunks on the canonical grid, and notes what left it.

    Parameters
    ----------
    config
        The server's configuration.
    isolated
        Whether gated prompts keep to the grid, one at a time; False: they are batched.
    """

    def __init__(self, config: MarginGateConfig, isolated: bool = True) -> None:
        self.config, self.isolated = config, isolated

    def chunk_limit(self, prefix: int, prompt: int) -> int | None:
        """Return the most tokens the next chunk may have, or None where any number is fine.

        Parameters
        ----------
        prefix
            Tokens already in K/V.
        prompt
            Tokens of the prompt; what lies behind was generated before a retraction.
        """
        if prefix >= prompt:
            return None
        return min(self.config.chunk - prefix % self.config.chunk, prompt - prefix)

    def note_chunk(self, req: Any, state: RequestState, batch: Any, index: int) -> None:
        """Lower the request's guarantee when one of its chunks ran at a shape of its own."""
        if not state.ledger.gated:
            return
        if not self.isolated:
            shape = getattr(batch, SHAPE, None)
            if shape is None or not shape.in_class:
                self._note(state, "a prefill forward ran outside the canonical class")
            return
        if len(batch.extend_seq_lens_cpu) > 1:
            self._note(state, "a prompt chunk shared its forward with another request")
        prefix, length = int(batch.extend_prefix_lens_cpu[index]), int(batch.extend_seq_lens_cpu[index])
        limit = self.chunk_limit(prefix, len(req.origin_input_ids))
        if limit is not None and (prefix % self.config.chunk or length != limit):
            # Memory pressure may shrink a chunk (PrefillAdder.add_chunked_req).
            self._note(state, f"prompt chunk [{prefix}, {prefix + length}) left the grid of {self.config.chunk}")

    @staticmethod
    def _note(state: RequestState, text: str) -> None:
        if text not in state.ledger.notes:
            state.ledger.notes.append(text)


def _alone(runtime: Runtime, req: Any) -> bool:
    """Return whether a request is prefilled by itself, on the grid."""
    state = state_of(req)
    return runtime.prefill_rules.isolated and state is not None and state.ledger.gated


def add_one_req(runtime: Runtime, original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a waiting request to the prefill batch; a gated one only alone and with its chunk on the grid."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    alone = _alone(runtime, req)
    if adder.can_run_list and (alone or any(_alone(runtime, r) for r in adder.can_run_list)):
        return AddReqResult.OTHER
    if alone:
        _cap(runtime, adder, req)
    return original(adder, req, *args, **kwargs)


def add_chunked_req(runtime: Runtime, original: Any, adder: Any, req: Any) -> Any:
    """Continue a chunked prompt; a gated one's next chunk stays on the grid."""
    if _alone(runtime, req):
        _cap(runtime, adder, req)
    return original(adder, req)


def _cap(runtime: Runtime, adder: Any, req: Any) -> None:
    limit = runtime.prefill_rules.chunk_limit(len(req.prefix_indices), len(req.origin_input_ids))
    if limit is not None:
        # The adder lives for one scheduling round and admits nobody beside a gated request: no need to restore.
        adder.rem_chunk_tokens = limit if adder.rem_chunk_tokens is None else min(adder.rem_chunk_tokens, limit)
