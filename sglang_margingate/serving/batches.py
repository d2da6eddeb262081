"""SGLang's batches: the only place that builds a ``ForwardBatch``, and the views of them that the runtime sees.

Built: a decode for verify passes and trials, a prefill for trials and for graphs. Seen: a request where it is opened and where it has ended,
a forward where it begins, and how its tokens would be chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch

from sglang_margingate.canonical.engine import Extend
from sglang_margingate.gate.claims import Asked
from sglang_margingate.runtime.clock import Clock
from sglang_margingate.runtime.prefill import Chunk
from sglang_margingate.runtime.requests import Ended, Opened
from sglang_margingate.runtime.state import ATTRIBUTE
from sglang_margingate.runtime.view import ForwardView
from sglang_margingate.serving import sgl
from sglang_margingate.serving.answers.scores import Scores, fill_gaps


def decode_batch(model_runner: Any, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
    """Return the batch of a decode of these rows; those from ``real`` on are padding.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    pools
        Row of its ``req_to_token`` table, for each row of the batch.
    positions, tokens
        The position of the token that each row reads, and that token.
    real
        Rows that are no padding. Padding writes slot 0, which SGLang reserves for that.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    table = model_runner.req_to_token_pool.req_to_token
    # One copy to the device instead of three.
    ids, pool_t, pos_t = torch.tensor([tokens, pools, positions], dtype=torch.int64).to(model_runner.device)
    out_loc = table[pool_t, pos_t].long()
    out_loc[real:] = 0
    seq_lens_cpu = torch.tensor([p + 1 for p in positions], dtype=torch.int64)
    seq_lens = pos_t + 1
    return _bound(
        model_runner,
        forward_mode=ForwardMode.DECODE,
        batch_size=len(tokens),
        input_ids=ids,
        req_pool_indices=pool_t,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens_cpu,
        orig_seq_lens=seq_lens,
        out_cache_loc=out_loc,
        seq_lens_sum=int(seq_lens_cpu.sum()),
        positions=pos_t,
    )


def extend_batch(model_runner: Any, parts: Sequence[Extend], tokens: torch.Tensor) -> Any:
    """Return the batch of a prefill of parts of prompts.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    parts
        What each request of the batch prefills.
    tokens
        [requests, tokens]: the prompts, by row of the ``req_to_token`` table, and one token more than any part reads.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    device = model_runner.device
    table = model_runner.req_to_token_pool.req_to_token
    ends = torch.tensor([p.end for p in parts], dtype=torch.int64)
    starts, lengths = [p.start for p in parts], [p.end - p.start for p in parts]
    begins = torch.tensor([0, *accumulate(lengths[:-1])], dtype=torch.int32)
    asking = [p for p in parts if p.logprobs]
    logprobs: dict[str, Any] = {}
    if asking:
        logprobs = {
            "top_logprobs_nums": [0] * len(parts),
            "token_ids_logprobs": [None] * len(parts),
            # The token that each position is to be scored by: the one after it.
            "extend_input_logprob_token_ids_gpu": torch.cat(
                [tokens[p.row, p.start + 1 : p.end + 1] for p in asking]
            ).to(device),
        }
    return _bound(
        model_runner,
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(parts),
        input_ids=torch.cat([tokens[p.row, p.start : p.end] for p in parts]).to(device),
        req_pool_indices=torch.tensor([p.row for p in parts], dtype=torch.int64, device=device),
        seq_lens=ends.to(device),
        seq_lens_cpu=ends,
        orig_seq_lens=ends.to(device),
        out_cache_loc=torch.cat([table[p.row, p.start : p.end] for p in parts]).long(),
        seq_lens_sum=int(ends.sum()),
        positions=torch.cat([torch.arange(p.start, p.end) for p in parts]).to(device),
        extend_num_tokens=sum(lengths),
        extend_seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32, device=device),
        extend_start_loc=begins.to(device),
        extend_prefix_lens_cpu=starts,
        extend_seq_lens_cpu=lengths,
        extend_logprob_start_lens_cpu=[0 if p.logprobs else p.end - p.start for p in parts],
        return_logprob=bool(asking),
        **logprobs,
    )


def graph_batch(model_runner: Any, tokens: torch.Tensor, requests: torch.Tensor) -> Any:
    """Return the batch of a prefill whose tensors are buffers, to be captured in a CUDA graph.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    tokens
        [3, tokens]: token, position and the slot to write.
    requests
        [3, requests]: new tokens, length of the context, and row of the ``req_to_token`` table.
    """
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    (ids, positions, out_loc), (new, lengths, rows) = tokens, requests
    return _bound(
        model_runner,
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(rows),
        input_ids=ids,
        req_pool_indices=rows,
        seq_lens=lengths,
        orig_seq_lens=lengths,
        out_cache_loc=out_loc,
        seq_lens_sum=len(ids),
        positions=positions,
        extend_num_tokens=len(ids),
        extend_seq_lens=new,
    )


def _bound(model_runner: Any, return_logprob: bool = False, **fields: Any) -> Any:
    """Return a ``ForwardBatch`` of these fields that knows which K/V slots it writes."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch

    batch = ForwardBatch(
        **fields,
        return_logprob=return_logprob,
        spec_algorithm=model_runner.spec_algorithm,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        **{sgl.padding_field(): len(fields["input_ids"])},
    )
    sgl.bind_columns(model_runner, batch)
    return batch


VIEW = "margingate_view"
"""Attribute of a ``ForwardBatch``: its :class:`ForwardView`."""


ALL_TOKENS = 1 << 30
"""SGLang's top-k of a request that has none."""


def opened(req: Any) -> Opened:
    """Return what the runtime needs to know of a new request."""
    params = req.sampling_params
    penalised = params.frequency_penalty != 0 or params.presence_penalty != 0 or params.repetition_penalty != 1
    penalised |= params.min_new_tokens > 0  # one of SGLang's penalties: it counts from 0 again after a retraction
    return Opened(
        req.rid, params.custom_params, params.top_k <= 1, float(params.temperature), params.sampling_seed,
        0 if params.top_k >= ALL_TOKENS else params.top_k, float(params.top_p), float(params.min_p),
        req.custom_logit_processor is not None, penalised, params.max_new_tokens,
    )  # fmt: skip


def ended(req: Any, digest: Callable[[], str] | None = None) -> Ended:
    """Return what the runtime needs to know of a request that has ended."""
    shown = len(req.output_ids) if req.finished_len is None else req.finished_len
    finish = req.finished_reason.to_json().get("type") if req.finished_reason is not None else "abort"
    prompt, output = (lambda: list(req.origin_input_ids)), (lambda: list(req.output_ids[:shown]))
    return Ended(shown, finish, int(req.retraction_count), prompt, output, digest, asked(req))


def asked(req: Any) -> Asked | None:
    """Return which log-probabilities a request asks for, None where it asks for none."""
    if not req.return_logprob:
        return None
    start = req.logprob_start_len
    return "prompt" if 0 <= start < len(req.origin_input_ids) else "output"


def begin(batch: Any, reqs: Sequence[Any], clock: Clock) -> ForwardView | None:
    """Attach a view to a forward's batch where it begins, and return it; None where it has no rows."""
    mode = batch.forward_mode
    if not (mode.is_decode() or mode.is_extend()):
        return None  # an idle forward has no rows
    view = ForwardView(
        [getattr(req, ATTRIBUTE, None) for req in reqs], mode.is_decode(), clock.mark(), not batch.is_prefill_only
    )
    if not view.decode:
        # Read now: a request may be retracted, and its output grow, before a delayed sampling.
        view.chunks = [
            Chunk(
                prefix, prefix + length, len(req.origin_input_ids), tuple(req.output_ids), int(req.cached_tokens or 0)
            )
            for req, prefix, length in zip(reqs, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
        ]
    setattr(batch, VIEW, (view, list(reqs)))
    return view


def needs_processing(info: Any) -> bool:
    """Return whether penalties, bias or a grammar change the logits before the argmax."""
    return bool(
        info.grammars
        or info.logit_bias is not None
        or info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or (info.penalizer_orchestrator is not None and info.penalizer_orchestrator.is_required)
    )


class BatchSampling:
    """How SGLang would choose the tokens of one forward (:class:`~sglang_margingate.runtime.step.Sampling`)."""

    def __init__(self, original: Any, model_runner: Any, logits_output: Any, batch: Any, reqs: Sequence[Any]) -> None:
        self._original, self._model_runner, self._output, self._batch = original, model_runner, logits_output, batch
        self._info = info = batch.sampling_info
        self.logits: torch.Tensor = logits_output.next_token_logits
        self.all_greedy = bool(info.is_all_greedy)
        self.processes = needs_processing(info)
        self.slots = sgl.pool_index.of_all(reqs)
        self.asks = [bool(req.return_logprob) for req in reqs] if batch.return_logprob else []
        self._scores = Scores(logits_output, batch, reqs)
        self.columns: torch.Tensor | None = batch.out_cache_loc
        self.chose_s = 0.0
        """Seconds that SGLang's own sampler took."""
        self.plain = (
            not info.has_custom_logit_processor
            and not batch.return_logprob
            and not any(info.return_sampling_masks or [])
            and batch.ngram_embedding_info is None
            and sgl.only_samples(model_runner, info)
            and type(model_runner.sampler).__module__ == "sglang.srt.layers.sampler"  # no sampler backend of the user's
        )
        self.plain_argmax = self.plain and self.all_greedy and not self.processes
        if self.plain:  # then ModelRunner.sample is not called, which would do so
            sgl.forget_observation(logits_output)

    def positions(self) -> Sequence[int]:
        """Return the position of the token that each row of a decode read; SGLang's CPU mirror costs no wait."""
        cpu = self._batch.seq_lens_cpu
        positions: list[int] = self._batch.positions.tolist() if cpu is None else [n - 1 for n in cpu.tolist()]
        return positions

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits that argmax is taken from, [B, V], leaving ``logits`` untouched.

        Penalties, bias and grammar masks are functions of the committed tokens, so applying them to a copy here and to
        the original later gives the same result twice. Custom logit processors may keep state: requests that bring one
        are not observed.
        """
        if not self.processes:
            return logits
        copy, info = logits.clone(), self._info
        info.update_regex_vocab_mask()
        info.apply_logits_bias(copy)
        info.grammar_mask = None
        return copy

    def keep(self, rows: list[int]) -> None:
        """Compute log-probabilities of these rows: SGLang's sampler may write over the logits."""
        self._scores.keep(rows, self.processed(self.logits))

    def score(self, tokens: torch.Tensor | None) -> None:
        """Put the kept ones, and those of the chosen ``tokens``, in the place of SGLang's."""
        self._scores.put(tokens)

    def choose(self) -> torch.Tensor:
        """Let SGLang's own sampler choose."""
        start = perf_counter()
        tokens: torch.Tensor = self._original(self._model_runner, self._output, self._batch)
        self.chose_s += perf_counter() - start
        if self._batch.return_logprob:
            fill_gaps(self._output)
        return tokens
