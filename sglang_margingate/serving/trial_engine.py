"""SGLang's runners as the trials of canonical/ ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_margingate.canonical.engine import Extend
from sglang_margingate.runtime.verifier import Verifier
from sglang_margingate.serving.batches import decode_batch, extend_batch


class TrialEngine:
    """The runners that will serve, and the verifier; see :class:`~sglang_margingate.canonical.engine.Engine`.

    Parameters
    ----------
    verifier
        The verifier of this process.
    model_runner
        SGLang's ``ModelRunner``.
    """

    def __init__(self, verifier: Verifier, model_runner: Any) -> None:
        self._verifier = verifier
        self._runner = model_runner
        self.device: str = self._runner.device
        self.rows = verifier.rows
        self.capacity: int = self._runner.max_total_num_tokens - 1  # slot 0 is SGLang's padding
        self.vocab_size: int = self._runner.model_config.vocab_size
        self.table: torch.Tensor = self._runner.req_to_token_pool.req_to_token
        self.model: torch.nn.Module = self._runner.model

    def extend(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        """Run one prefill forward; return each part's last logits."""
        return self._run(self._runner.eager_runner, extend_batch(self._runner, parts, tokens))

    def decode(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one decode forward as it will be served; return its logits."""
        runner = self._runner.eager_runner if self.device == "cpu" else self._runner.decode_cuda_graph_runner
        return self._run(runner, decode_batch(self._runner, requests, positions, tokens, len(tokens)))

    def verify(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one verify pass of at most M rows; return their logits."""
        return self._verifier.forward(requests, positions, tokens)

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of K then V of each layer at ``slots``."""
        return self._verifier.kv.read(slots)

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        """Put back what :meth:`read` returned."""
        self._verifier.kv.write(slots, columns)

    def _run(self, runner: Any, batch: Any) -> torch.Tensor:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()  # the last plan's pinned buffer may still be in use
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self._runner.attn_backend)):
            logits: torch.Tensor = runner.execute(batch).next_token_logits
        return logits
