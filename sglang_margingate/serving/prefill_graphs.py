"""Prefills replayed from CUDA graphs at sizes of the prefill class: one whole graph per padded number of tokens.

An eager prefill of an 8B model is 33 layers of Python, a hook on each linear layer and Triton launches for each attention;
meanwhile the GPU waits. Our attention needs no plan on the host and a prefill is padded to a size of its class anyway, so
the transformer layers can be captured as they are. What a graph reads lies in buffers of fixed size: tokens, positions and
K/V slots of the padded size; new tokens, context length and table row of the most requests at that size. K/V slots of contexts are read
from SGLang's own ``req_to_token`` table, so no index is built. The grid of the attention is that of the padded size with the
most requests, and programs without a tile zero the padding's rows. The layer that makes logits runs after the graph, as in
an eager forward, so that log-probabilities of prompts work as they do there.

Why our own runner and not SGLang's ``full`` prefill graphs (``--cuda-graph-backend-prefill full``, 0.5.17): that one runs
FlashInfer's planned wrappers of its own over a fixed number of requests, captures each size again for every power of two of
prefix chunks (contexts of another length would be cut otherwise: other bits), takes other branches in its layers than an
eager forward (``set_tc_piecewise_forward_context``), runs eagerly what would be padded to more than twice its size, and
with every replay plans on the host. Its ``breakable`` pieces leave attention outside: 33 launches and all of its Python.
Here a replay is seven small copies and one launch, and graph and eager forward run the same kernels.

Which sizes are used is decided by a trial at start-up (canonical/prefill_graph_probe.py): a size at which a graph does not
give the bits of the eager forward is dropped. What does not fit a graph runs eagerly, with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sglang_margingate.canonical.attention_probe import Attend
from sglang_margingate.canonical.classes import Classes
from sglang_margingate.canonical.prefill_graph_probe import graph_sizes
from sglang_margingate.canonical.shape import ForwardShape
from sglang_margingate.serving import sgl, shape_hooks
from sglang_margingate.serving.attention_hooks import PREFILL, PagedPrefill
from sglang_margingate.serving.layers.padding import Running
from sglang_margingate.serving.several import group

log = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Larger prefills keep the GPU busy for longer than the host needs to launch them."""

MOST_REQUESTS, FEW_REQUESTS, TOKENS_A_REQUEST = 128, 8, 32
"""Requests of a prefill that a graph holds: of all sizes, of the smallest, and one more for each so many tokens. Each costs
an attention program for every K/V head and layer, though it be of no request; more run at a larger size, or eagerly."""

TIMED = 2
"""Replays of a size that are timed."""

Run = Callable[[], None]
Record = Callable[[Run], Run]
"""Capture what a function launches; return what launches it again."""

NONE_OF = (
    "input_embeds", "replace_embeds", "token_type_ids", "encoder_lens", "mm_input_embeds", "mrope_positions", "spec_info",
    "global_num_tokens_cpu", "multi_item_delimiter_indices", "tbo_split_seq_index", "tbo_children", "ngram_embedding_info",
    "cross_attention_custom_mask", "return_pooled_hidden_states", "return_hidden_states_before_norm",
)  # fmt: skip
"""What a batch must not carry: inputs and outputs that a graph has no buffer for."""


class Inputs:
    """The buffers that graphs read.

    Parameters
    ----------
    tokens, requests
        Of the largest prefill.
    device
        Where they live.
    """

    def __init__(self, tokens: int, requests: int, device: torch.device | str) -> None:
        self.tokens = torch.zeros(3, tokens, dtype=torch.int64, device=device)
        """Token, position and the slot to write, of each token. Padding writes slot 0, which SGLang reserves for that."""
        self.requests = torch.zeros(3, requests, dtype=torch.int64, device=device)
        """New tokens, length of the context with them, and row of the table, of each request."""

    def requests_at(self, size: int) -> torch.Tensor:
        """Return what a graph of ``size`` tokens reads of :attr:`requests`."""
        return self.requests[:, : max(FEW_REQUESTS, size // TOKENS_A_REQUEST)]

    def fill(self, batch: Any, size: int) -> None:
        """Copy a batch of SGLang's into the buffers, and pad it to ``size`` tokens and the most requests."""
        rows, n = len(batch.input_ids), batch.batch_size
        self.tokens[:, rows:size].zero_()
        for into, value in zip(self.tokens, (batch.input_ids, batch.positions, batch.out_cache_loc)):
            into[:rows].copy_(value)
        self.requests[:, n:].zero_()
        for into, value in zip(self.requests, (batch.extend_seq_lens, batch.seq_lens, batch.req_pool_indices)):
            into[:n].copy_(value)


class GraphAttention:
    """Our prefill attention over the buffers: what it reads is known when the graph runs, not when it is captured.

    Parameters
    ----------
    attend
        The kernel.
    inputs
        The buffers.
    table
        SGLang's ``req_to_token``: int32 [requests, tokens], the pool slot of each column.
    """

    def __init__(self, attend: Attend, inputs: Inputs, table: torch.Tensor) -> None:
        self._attend, self._inputs = attend, inputs
        self._slots, self._wide = table.view(-1), table.shape[1]

    def plan(self, size: int) -> None:
        """Cut the requests into tiles, for all layers of a forward of ``size`` rows."""
        new, length, row = self._inputs.requests_at(size)
        begins = row * self._wide
        queries = torch.nn.functional.pad(new.cumsum(0), (1, 0)).int()
        self._attend.plan(queries, begins.int(), size, (begins + length).int())

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend in one layer; see :class:`margingate_kernels.PrefillAttention`."""
        return self._attend(q, k, v, self._slots, scale)


@dataclass(frozen=True)
class Graph:
    """One captured size: what its layers were seen to run at while it was captured, and what replays it."""

    shape: ForwardShape
    requests: int
    """Most that it holds."""
    replay: Run


class Side(Protocol):
    """What graphs need of SGLang."""

    model: Any
    """Called with tokens, positions and batch: the layers, then the layer that makes logits."""
    layers: Any
    """The part of the model that is captured: everything up to the last hidden states."""

    def batch(self, inputs: Inputs, size: int) -> Any:
        """Return the batch whose tensors are the buffers, at this size."""

    def timed(self) -> AbstractContextManager[Any]:
        """Return the context that times a prefill for SGLang's metrics."""

    def serving(self) -> AbstractContextManager[Any]:
        """Return the context that a forward needs around it."""


class PrefillGraphs:
    """The graphs of one server.

    Parameters
    ----------
    side
        SGLang's side.
    inputs
        The buffers.
    attention
        What attends.
    hidden
        [most tokens, hidden size]: where every graph leaves the last hidden states.
    record
        Captures a forward.
    """

    def __init__(
        self,
        side: Side,
        inputs: Inputs,
        attention: GraphAttention,
        hidden: torch.Tensor,
        record: Record,
    ) -> None:
        self._side, self._inputs = side, inputs
        self._attention, self._hidden, self._record = attention, hidden, record
        self._graphs: dict[int, Graph] = {}
        self._on = True
        self.replays = 0
        """Forwards that were replayed."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Captured sizes in use, rising."""
        return tuple(sorted(self._graphs))

    def capture(self, size: int) -> None:
        """Capture the layers at ``size`` tokens, which must be of the class: the layers' hooks note whether they were.

        Raises
        ------
        RuntimeError
            What came out is not a prefill inside the class; or what capturing raised.
        """
        batch = self._side.batch(self._inputs, size)
        setattr(batch, PREFILL, self._attention)
        self._inputs.tokens.zero_()
        self._inputs.requests.zero_()  # requests without tokens: nothing is read, and slot 0 is written

        def run() -> None:
            self._attention.plan(size)
            out = self._side.layers(batch.input_ids, batch.positions, batch)
            if not isinstance(out, torch.Tensor):
                raise RuntimeError(f"the layers give {type(out).__name__}, not one tensor of hidden states")
            self._hidden[:size].copy_(out)

        seen = shape_hooks.prefill(size)
        with shape_hooks.running(seen), torch.no_grad(), self._side.serving():
            replay = self._record(run)
        shape = seen.shape()
        if not shape.in_class or seen.together != size:
            raise RuntimeError(
                f"its layers ran at {seen.together} rows, {'in' if shape.in_class else 'outside'} the class"
            )
        self._graphs[size] = Graph(shape, self._inputs.requests_at(size).shape[1], replay)

    def drop(self, size: int) -> None:
        """Use the graph of this size no more."""
        del self._graphs[size]

    def milliseconds(self, size: int) -> float:
        """Return the least time of a few replays, with the buffers as they are: products of matrices do not look at their input."""
        wait = torch.cuda.synchronize if self._hidden.is_cuda else lambda: None
        times = []
        for _ in range(TIMED):
            wait()
            start = time.perf_counter()
            self._graphs[size].replay()
            wait()
            times.append(1000 * (time.perf_counter() - start))
        return min(times)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run prefills eagerly meanwhile."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def size_for(self, batch: Any) -> int | None:
        """Return the size that this batch is to be replayed at, None where it must run eagerly."""
        if not self._on or batch.forward_mode.name != "EXTEND":
            return None
        carried = (getattr(batch, name, None) for name in NONE_OF)
        if any(value is not None and value is not False for value in carried):
            return None
        if any(x is not None for name in ("lora_ids", "mm_inputs") for x in getattr(batch, name, None) or ()):
            return None
        mode = batch.capture_hidden_mode
        if batch.input_ids is None or (mode is not None and mode.name != "NULL"):
            return None
        rows = len(batch.input_ids)
        if not rows or rows != batch.extend_num_tokens:
            return None
        requests = batch.batch_size
        fits = (size for size, graph in self._graphs.items() if size >= rows and graph.requests >= requests)
        return min(fits, default=None)

    def run(self, batch: Any, size: int, forward: Running) -> Any:
        """Replay the layers for ``batch`` and make its logits; note in ``forward`` what the layers ran at."""
        graph, rows = self._graphs[size], len(batch.input_ids)
        self._inputs.fill(batch, size)
        forward.replayed(graph.shape)
        with self._side.timed(), torch.no_grad():
            graph.replay()
            self.replays += 1
            with _giving(self._side.layers, self._hidden[:rows]):
                return self._side.model.forward(batch.input_ids, batch.positions, batch)


@contextmanager
def _giving(layers: Any, hidden: torch.Tensor) -> Iterator[None]:
    """Let ``layers`` return ``hidden``, so that the model's own forward does what comes after them."""
    layers.forward = lambda *_args, **_kwargs: hidden
    try:
        yield
    finally:
        del layers.forward


# ---- SGLang's side ----------------------------------------------------------------------------------------------------


class RunnerSide:
    """SGLang's ``ModelRunner`` as graphs need it."""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        self.model, self.layers = model_runner.model, model_runner.model.model

    def batch(self, inputs: Inputs, size: int) -> Any:
        """Return the batch whose tensors are the buffers."""
        from sglang_margingate.serving.batches import graph_batch

        return graph_batch(self._runner, inputs.tokens[:, :size], inputs.requests_at(size))

    def timed(self) -> AbstractContextManager[Any]:
        """Return SGLang's timer of prefills, if it has one."""
        from sglang.srt.utils.device_timer import device_timer_ctx

        timer = getattr(self._runner, "device_timer", None)
        found: AbstractContextManager[Any] = nullcontext() if timer is None else device_timer_ctx(timer, "extend")
        return found

    def serving(self) -> AbstractContextManager[Any]:
        """Return SGLang's forward context."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        found: AbstractContextManager[Any] = forward_context(ForwardContext(attn_backend=self._runner.attn_backend))
        return found


def obstacle(model_runner: Any, classes: Classes) -> str | None:
    """Return why this server's prefills cannot be captured, or None."""
    args, table = sgl.resolved(model_runner.server_args), model_runner.req_to_token_pool.req_to_token
    wrappers = getattr(model_runner.attn_backend, "prefill_wrappers_paged", ())
    checks = (
        (bool(classes.unknown), "the probe does not know all of its layers"),
        (not classes.prefill.sizes, "no class holds a prefill"),
        (not wrappers or not all(isinstance(w, PagedPrefill) for w in wrappers), "our attention does not prefill it"),
        (not hasattr(getattr(model_runner.model, "model", None), "layers"), "its layers were not found"),
        (args.pp_size > 1, "its layers are spread over processes"),
        (bool(getattr(args, "enable_lora", False)), "adapters change its layers"),
        (bool(getattr(args, "enable_hierarchical_cache", False)), "columns are loaded layer by layer"),
        (bool(getattr(args, "enable_two_batch_overlap", False)), "forwards are run in two halves"),
        (bool(getattr(args, "enable_pdmux", False)), "prefill and decode share the GPU"),
        (table.dtype != torch.int32 or not table.is_contiguous(), "its table of slots has another layout"),
        (table.numel() >= 2**31, "its table of slots is too large for 32-bit places"),
    )
    return next((why for found, why in checks if found), None)


def capture_all(graphs: PrefillGraphs, sizes: list[int], agree: Callable[[str, bool], bool]) -> tuple[str, ...]:
    """Capture the sizes that every rank can, up to the first that one cannot; return in words what was not captured.

    A rank that went on alone would wait for the others in its next sum over ranks.
    """
    for size in reversed(sizes):  # the largest first: the others fit into its memory
        why = "another rank cannot"
        try:
            graphs.capture(size)
        except Exception as error:  # whatever a model's own code may raise: the server can do without
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.debug("margingate: capture at %d tokens", size, exc_info=True)
        if not agree(f"the prefill graph of {size} tokens", size in graphs.sizes):
            if size in graphs.sizes:
                graphs.drop(size)
            # The device may be in no state to capture more.
            return (f"prefills are not captured at {size} tokens: {why}",)
    return ()


def capture_prefill_graphs(model_runner: Any, classes: Classes) -> tuple[PrefillGraphs | None, tuple[str, ...]]:
    """Capture the prefill graphs of this server; return them, and in words what could not be captured.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``, its decode graphs captured.
    classes
        The classes that forwards stay in.
    """
    if (why := obstacle(model_runner, classes)) is not None:
        return None, (f"prefills are not captured in CUDA graphs: {why}",)
    args, config, device = sgl.resolved(model_runner.server_args), model_runner.model_config, model_runner.device
    chunk = args.chunked_prefill_size if (args.chunked_prefill_size or 0) > 0 else MOST_TOKENS
    sizes = graph_sizes(classes.prefill, min(chunk, MOST_TOKENS))
    if not sizes:
        return None, (f"prefills are not captured in CUDA graphs: the class has no size of at most {chunk} tokens",)
    table = model_runner.req_to_token_pool.req_to_token
    inputs = Inputs(sizes[-1], min(MOST_REQUESTS, len(table)), device)
    attention = GraphAttention(model_runner.attn_backend.prefill_wrappers_paged[0].make(sizes[-1]), inputs, table)
    hidden = torch.zeros(sizes[-1], config.hidden_size, dtype=model_runner.dtype, device=device)
    start, free = time.perf_counter(), torch.cuda.mem_get_info()[0]
    graphs = PrefillGraphs(RunnerSide(model_runner), inputs, attention, hidden, group.recorder())
    notes = capture_all(graphs, sizes, group.ranks().agree)
    torch.cuda.synchronize()
    if graphs.sizes:
        log.info(
            "margingate: prefills in CUDA graphs at %s tokens, up to %d requests: captured in %.1f s, %.0f MiB",
            ", ".join(map(str, graphs.sizes)), inputs.requests.shape[1], time.perf_counter() - start,
            (free - torch.cuda.mem_get_info()[0]) / 2**20,
        )  # fmt: skip
    return (graphs if graphs.sizes else None), notes
