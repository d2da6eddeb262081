"""The verify on a GPU: one CUDA graph of exactly M rows with attention and a logits buffer of its own.

FlashInfer's decode splits long contexts over thread blocks by a plan that looks at the whole batch; that is where the
batch leaks in. Our own kernel cuts a context by its own length (attention_hooks.py); where it does not fit the model,
FlashInfer attends with tensor cores and without the split. cuBLAS is row-invariant at a fixed M. The start-up self-test
checks both.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_margingate.serving.attention_hooks import prepare_verify
from sglang_margingate.serving.verifier import EagerVerifier


@dataclass
class GraphVerifier(EagerVerifier):
    """Runs verify passes as replays of one captured graph; see :class:`EagerVerifier` for the parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention, self.runner, self.planned = _capture(self.model_runner, self.rows)

    def _run(self, batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        if self.planned:
            # A plan for the next pass may overwrite the pinned buffer that the last one still copies from.
            torch.cuda.current_stream().synchronize()
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.attention)):
            return self.runner.execute(batch)


def _capture(model_runner: Any, rows: int) -> tuple[Any, Any, bool]:
    """Return the verify graph's attention backend, its runner, and whether FlashInfer plans each pass."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as module

    attention = FlashInferAttnBackend(model_runner, skip_prefill=True, init_new_workspace=True)
    # fast_decode_plan without tensor cores ignores disable_split_kv, so both are needed.
    attention.decode_use_tensor_cores = True
    attention.disable_cuda_graph_kv_split = True
    ours = prepare_verify(model_runner, attention, rows)
    with _one_size(module, rows), _own_logits(model_runner, rows):
        runner = module.DecodeCudaGraphRunner(model_runner, attn_backend=attention)
    return attention, runner, not ours


@contextmanager
def _one_size(module: Any, rows: int) -> Any:
    """Let the runner capture ``rows`` and nothing else."""
    original = module.get_batch_sizes_to_capture
    module.get_batch_sizes_to_capture = lambda *_args, **_kwargs: ([rows], [])
    try:
        yield
    finally:
        module.get_batch_sizes_to_capture = original


@contextmanager
def _own_logits(model_runner: Any, rows: int) -> Any:
    """Give the verify graph its own logits buffer; SGLang's is shared by all graphs, so a verify would overwrite it."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput

    original = model_runner.graph_shared_output
    model_runner.graph_shared_output = GraphSharedOutput(device=torch.device(model_runner.device), max_rows=rows)
    try:
        yield
    finally:
        model_runner.graph_shared_output = original
