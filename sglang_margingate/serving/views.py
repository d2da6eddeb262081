"""What SGLang's batches are to the runtime: views made where a forward begins, ends and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang_margingate.runtime.clock import Clock
from sglang_margingate.runtime.prefill import Chunk
from sglang_margingate.runtime.requests import Ended, Opened
from sglang_margingate.runtime.state import state_of
from sglang_margingate.runtime.step import ForwardView
from sglang_margingate.serving import sgl

VIEW = "margingate_view"
"""Attribute of a ``ForwardBatch``: its :class:`ForwardView`."""


def opened(req: Any) -> Opened:
    """Return what the runtime needs to know of a new request."""
    params = req.sampling_params
    penalised = params.frequency_penalty != 0 or params.presence_penalty != 0 or params.repetition_penalty != 1
    return Opened(
        req.rid, params.custom_params, params.top_k <= 1, float(params.temperature), params.sampling_seed,
        req.custom_logit_processor is not None, penalised,
    )  # fmt: skip


def ended(req: Any, digest: Callable[[], str] | None = None) -> Ended:
    """Return what the runtime needs to know of a request that has ended."""
    shown = len(req.output_ids) if req.finished_len is None else req.finished_len
    finish = req.finished_reason.to_json().get("type") if req.finished_reason is not None else "abort"
    return Ended(shown, finish, int(req.retraction_count), lambda: list(req.origin_input_ids), digest)


def begin(batch: Any, reqs: Sequence[Any], clock: Clock) -> None:
    """Attach a view to a forward's batch where it begins."""
    mode = batch.forward_mode
    if not (mode.is_decode() or mode.is_extend()):
        return  # an idle forward has no rows
    view = ForwardView([state_of(req) for req in reqs], mode.is_decode(), clock.mark(), not batch.is_prefill_only)
    if not view.decode:
        # Read now: a request may be retracted, and its output grow, before a delayed sampling.
        view.chunks = [
            Chunk(
                prefix, prefix + length, len(req.origin_input_ids), tuple(req.output_ids), int(req.cached_tokens or 0)
            )
            for req, prefix, length in zip(reqs, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu)
        ]
    setattr(batch, VIEW, (view, list(reqs)))


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
        self.slots = [sgl.pool_index(req) for req in reqs]
        self.columns: torch.Tensor | None = batch.out_cache_loc
        self.plain_argmax = (
            self.all_greedy
            and not self.processes
            and not info.has_custom_logit_processor
            and not batch.return_logprob
            and not any(info.return_sampling_masks or [])
            and batch.ngram_embedding_info is None
            and sgl.only_samples(model_runner, info)
            and type(model_runner.sampler).__module__ == "sglang.srt.layers.sampler"  # no sampler backend of the user's
        )
        if self.plain_argmax:  # then ModelRunner.sample is not called, which would do so
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

    def choose(self) -> torch.Tensor:
        """Let SGLang's own sampler choose."""
        tokens: torch.Tensor = self._original(self._model_runner, self._output, self._batch)
        return tokens
