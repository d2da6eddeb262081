"""SGLang's runners as verify and trials ask for them.

Verify passes are plain forwards on a CPU, on a GPU one CUDA graph of exactly M rows. FlashInfer's decode splits long contexts
over thread blocks by a plan that looks at the whole batch; that is where the batch leaks in. Our own kernel cuts a context by
its own length (attention_hooks.py); where it does not fit the model, FlashInfer attends with tensor cores and without the
split. cuBLAS is row-invariant at a fixed M. The start-up self-test checks both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sglang_margingate.canonical.engine import Extend
from sglang_margingate.config import ConfigError
from sglang_margingate.runtime.verifier import KvAccess, Verifier
from sglang_margingate.serving.attention_hooks import prepare_verify
from sglang_margingate.serving.batches import decode_batch, extend_batch
from sglang_margingate.serving.several import group


class EagerEngine:
    """Decodes without CUDA graphs, through the model's own attention back end.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    """

    def __init__(self, model_runner: Any) -> None:
        self.model_runner, self.device = model_runner, model_runner.device
        self.table: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.kv = KvAccess.of(model_runner.token_to_kv_pool)

    def prepare(self, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
        """Return SGLang's ``ForwardBatch`` of a decode of these rows; those from ``real`` on are padding."""
        return decode_batch(self.model_runner, pools, positions, tokens, real)

    def run(self, batch: Any) -> torch.Tensor:
        """Run it, but not through ``ModelRunner.forward``: that also counts it as a step of the server (EPLB, dumper)."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        mr = self.model_runner
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=mr.attn_backend)):
            mr.attn_backend.init_forward_metadata(batch)
            logits: torch.Tensor = mr.model.forward(batch.input_ids, batch.positions, batch).next_token_logits
        return logits


class GraphEngine(EagerEngine):
    """Decodes by replays of one captured graph of M rows.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    rows
        The canonical M.
    """

    def __init__(self, model_runner: Any, rows: int) -> None:
        super().__init__(model_runner)
        self.attention, self.runner, self.planned = _capture(model_runner, rows)

    def run(self, batch: Any) -> torch.Tensor:
        """Replay the graph."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        if self.planned:
            # A plan for the next pass may overwrite the pinned buffer that the last one still copies from.
            torch.cuda.current_stream().synchronize()
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.attention)):
            logits: torch.Tensor = self.runner.execute(batch).next_token_logits
        return logits


def make_verifier(model_runner: Any, rows: int) -> Verifier:
    """Return the verifier that fits the device: a CUDA graph where graphs are on, plain forwards elsewhere."""
    if model_runner.device == "cpu":
        return Verifier(EagerEngine(model_runner), rows)
    if model_runner.decode_cuda_graph_runner is None:
        raise ConfigError(
            "the gate needs decode CUDA graphs on a GPU: its verify graph fixes the attention plan. "
            "Leave out --disable-cuda-graph and --disable-decode-cuda-graph"
        )
    return Verifier(GraphEngine(model_runner, rows), rows)


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
def _one_size(module: Any, rows: int) -> Iterator[None]:
    """Let the runner capture ``rows`` and nothing else."""
    original = module.get_batch_sizes_to_capture
    module.get_batch_sizes_to_capture = lambda *_args, **_kwargs: ([rows], [])
    try:
        yield
    finally:
        module.get_batch_sizes_to_capture = original


@contextmanager
def _own_logits(model_runner: Any, rows: int) -> Iterator[None]:
    """Give the verify graph its own logits buffer; SGLang's is shared by all graphs, so a verify would overwrite it."""
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput

    original = model_runner.graph_shared_output
    model_runner.graph_shared_output = GraphSharedOutput(device=torch.device(model_runner.device), max_rows=rows)
    try:
        yield
    finally:
        model_runner.graph_shared_output = original


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
        return self._run(self._runner.eager_runner, extend_batch(self._runner, parts, tokens)).next_token_logits

    def scores(self, parts: Sequence[Extend], tokens: torch.Tensor) -> torch.Tensor:
        """Run one prefill forward; return the log-probability of each token after those of the parts that ask."""
        return self._run(self._runner.eager_runner, extend_batch(self._runner, parts, tokens)).input_token_logprobs

    def decode(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one decode forward as it will be served; return its logits."""
        runner = self._runner.eager_runner if self.device == "cpu" else self._runner.decode_cuda_graph_runner
        return self._run(runner, decode_batch(self._runner, requests, positions, tokens, len(tokens))).next_token_logits

    def verify(self, requests: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one verify pass of at most M rows; return their logits."""
        return self._verifier.forward(requests, positions, tokens)

    def keep_graphs(self, sizes: Sequence[int]) -> None:
        """Let SGLang choose among these captured decode sizes only."""
        runner = self._runner.decode_cuda_graph_runner
        runner.capture_bs = [size for size in runner.capture_bs if size in sizes]

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of K then V of each layer at ``slots``."""
        return self._verifier.kv.read(slots)

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        """Put back what :meth:`read` returned."""
        self._verifier.kv.write(slots, columns)

    def agree(self, what: str, holds: bool) -> bool:
        """Return whether something holds on every rank."""
        return group.ranks().agree(what, holds)

    def _run(self, runner: Any, batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        if self.device != "cpu":
            torch.cuda.current_stream().synchronize()  # the last plan's pinned buffer may still be in use
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self._runner.attn_backend)):
            return runner.execute(batch)


def sums_over_ranks(model: Any) -> int:
    """Return how many layers of a model add up over ranks."""
    from sglang.srt.layers.linear import RowParallelLinear

    return sum(isinstance(module, RowParallelLinear) and module.reduce_results for module in model.modules())
