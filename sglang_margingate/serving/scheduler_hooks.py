"""Hook functions that run in SGLang's scheduler processes: they translate, the runtime decides."""

from __future__ import annotations

import gc
import sys
from time import perf_counter
from typing import Any

import torch

from sglang_margingate.canonical.classes import NO_GRAPHS
from sglang_margingate.canonical.ranks import RankError
from sglang_margingate.runtime.faults import column_digest, wants_digest
from sglang_margingate.runtime.logprobs import keep_scored
from sglang_margingate.runtime.namespaces import namespace, uses_backend
from sglang_margingate.runtime.state import ATTRIBUTE, state_of
from sglang_margingate.runtime.status import Runtime
from sglang_margingate.runtime.view import SHAPE, ForwardShape
from sglang_margingate.serving import batches, sgl
from sglang_margingate.serving.answers.summary import FIELD, PerRequest
from sglang_margingate.serving.hooks import spare_collector
from sglang_margingate.serving.setup import build_runtime
from sglang_margingate.serving.several import group
from sglang_margingate.serving.several.schedulers import attest

_runtime: Runtime | None = None


def set_up(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Build this process's runtime right before the event loop, and attest it to the launcher.

    An exception here ends the scheduler before it takes a request, and SGLang then ends the launcher.
    """
    global _runtime
    try:
        _runtime = build_runtime(scheduler)
    except Exception as error:
        # SGLang prints the traceback; this line is for the person who started the server.
        ranks = group.ranks()
        who = f"rank {ranks.rank} of {ranks.size}: " if ranks.size > 1 else ""
        print(f"margingate: refusing to serve: {who}{error}", file=sys.stderr, flush=True)
        raise
    spare_collector()
    gc.callbacks.append(_runtime.host.pauses)
    info["margingate"] = _runtime.status()
    place = _runtime.facts["scheduler"]
    if place["of"] > 1:
        attest(place["dp_rank"], sgl.tp_rank(), _runtime.facts["ranks"][0]["decides"])
    return info


# ---- the way of a request ----------------------------------------------------------------------------------------------


def open_request(_result: Any, req: Any, *_: Any, **__: Any) -> None:
    """Attach a state to a new request. SGLang's own requests before set-up (warm-up forwards) get none."""
    if _runtime is None:
        return
    state = _runtime.requests.open(batches.opened(req))
    setattr(req, ATTRIBUTE, state)
    if uses_backend(_runtime.config):
        req.extra_key = namespace(state.ledger.gated, req.extra_key, req.lora_id, _runtime.labels.weight_changes)


def begin_forward(result: Any, _cls: Any, batch: Any, *_: Any, **__: Any) -> None:
    """Attach the view of a forward to its batch."""
    if _runtime is not None and batch.reqs is not None:
        start = perf_counter()
        view = batches.begin(result, batch.reqs, _runtime.recorder.clock)
        if view is not None:
            view.host_s = perf_counter() - start


def end_forward(output: Any, model_runner: Any, batch: Any, *_: Any, **__: Any) -> Any:
    """Note what a forward did, whether or not a token is chosen from it."""
    found = getattr(batch, batches.VIEW, None)
    if _runtime is not None and found is not None and not model_runner.is_draft_worker:
        start, view = perf_counter(), found[0]
        view.shape = _shape(model_runner, batch, output.can_run_graph)
        _runtime.step.ended(view)
        view.host_s += perf_counter() - start
    return output


def _shape(model_runner: Any, batch: Any, graph: bool) -> ForwardShape | None:
    """Return what a forward ran at, as far as anybody saw it."""
    fast = None if _runtime is None else _runtime.fast
    decode, seen = batch.forward_mode.is_decode(), getattr(batch, SHAPE, None)
    if seen is None and graph:
        if not decode:
            return None  # SGLang's own prefill graphs: nobody sees their size
        padded = int(model_runner.decode_cuda_graph_runner.bs)  # the graph that was replayed
        graphs = NO_GRAPHS if fast is None else fast.trial.graphs
        seen = graphs.shape(len(batch.seq_lens), padded)
    elif seen is None:
        rows = len(batch.input_ids)
        seen = ForwardShape(rows, rows, False)  # SGLang's eager runner pads nothing
    return fast.judged(seen) if fast is not None and decode else seen


def sample(original: Any, model_runner: Any, logits_output: Any, batch: Any) -> Any:
    """Gate one step."""
    found = getattr(batch, batches.VIEW, None)
    logits = logits_output.next_token_logits
    if _runtime is None or found is None or model_runner.is_draft_worker or logits is None:
        return original(model_runner, logits_output, batch)
    view, reqs = found
    if len(view.states) != len(logits):
        return original(model_runner, logits_output, batch)
    clock, start = _runtime.recorder.clock, perf_counter()
    waits = clock.waited_s
    sampling = batches.BatchSampling(original, model_runner, logits_output, batch, reqs)
    tokens = _runtime.step.sample(view, sampling)
    end = perf_counter()
    spent = view.host_s + end - start - sampling.chose_s - (clock.waited_s - waits)
    _runtime.host.forward(view.decode, spent, view.waited, end)
    _runtime.metrics.host(view.decode, spent, view.waited)
    return tokens


def compute_logprobs_only(original: Any, model_runner: Any, logits_output: Any, batch: Any) -> None:
    """Score a forward of which no token is chosen."""
    found = getattr(batch, batches.VIEW, None)
    logits = logits_output.next_token_logits
    sampling = None
    if _runtime is not None and found is not None and logits is not None and len(found[0].states) == len(logits):
        sampling = batches.BatchSampling(original, model_runner, logits_output, batch, found[1])
        keep_scored(found[0].states, found[0].chunks, sampling)
    original(model_runner, logits_output, batch)
    if sampling is not None:
        sampling.score(None)


def after_finish_state(_result: Any, req: Any, *_: Any, **__: Any) -> None:
    """Close a request's record once it has finished, and attach its summary."""
    state = state_of(req)
    if _runtime is None or state is None or not req.finished():
        return
    summary = _runtime.requests.finish(state, batches.ended(req, _digest(req)))
    if summary is not None:
        req.customized_info = {**(req.customized_info or {}), FIELD: PerRequest([summary])}


def _digest(req: Any) -> Any:
    verifier = None if _runtime is None else _runtime.step.verifier
    if verifier is None or not wants_digest():
        return None
    first = len(req.origin_input_ids)
    positions = list(range(first, first + len(req.output_ids) - 1))
    return lambda: column_digest(verifier.kv, verifier.slots(int(sgl.pool_index(req)), positions)) if positions else ""


def cumulate_penalties(original: Any, batch: Any) -> None:
    """Count the token that a request alone would have counted by now, whoever else arrived.

    With overlap SGLang counts ``output_ids[-1]`` before the newest step's result is there: one token late, each once. But
    when somebody's prefill runs in between, that result is there already, and the token before it is never counted.
    """
    if _runtime is None or not batch.enable_overlap or not any(_gated(req) for req in batch.reqs):
        original(batch)
        return
    tokens = [penalised_token(req) for req in batch.reqs]
    ids = torch.tensor(tokens, dtype=torch.int64).to(batch.device, non_blocking=True)
    batch.sampling_info.penalizer_orchestrator.cumulate_output_tokens(ids)


def penalised_token(req: Any) -> int:
    """Return the token that penalties count before a request's next decode."""
    state = state_of(req)
    index = len(req.output_ids) - 1
    if state is not None and state.ledger.gated:
        index = state.resumed_at + req.decode_batch_idx - 1
    return int(req.output_ids[index] if index >= 0 else req.origin_input_ids[-1])


def _gated(req: Any) -> bool:
    state = state_of(req)
    return state is not None and state.ledger.gated


# ---- prefill admission -------------------------------------------------------------------------------------------------


def _alone(req: Any) -> bool:
    """Return whether a request is prefilled by itself, on the grid."""
    return _runtime is not None and _runtime.step.rules.isolated and _gated(req)


def add_one_req(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit a waiting request to the prefill batch; a gated one only alone and with its chunk on the grid."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    alone = _alone(req)
    if adder.can_run_list and (alone or any(_alone(r) for r in adder.can_run_list)):
        return AddReqResult.OTHER
    if alone:
        _cap(adder, req)
    return original(adder, req, *args, **kwargs)


def add_chunked_req(original: Any, adder: Any, req: Any) -> Any:
    """Continue a chunked prompt; a gated one's next chunk stays on the grid."""
    if _alone(req):
        _cap(adder, req)
    return original(adder, req)


def _cap(adder: Any, req: Any) -> None:
    assert _runtime is not None
    limit = _runtime.step.rules.chunk_limit(sgl.prefix_len(req), len(req.origin_input_ids))
    if limit is not None:
        # The adder lives for one scheduling round and admits nobody beside a gated request: no need to restore.
        adder.rem_chunk_tokens = limit if adder.rem_chunk_tokens is None else min(adder.rem_chunk_tokens, limit)


# ---- status ------------------------------------------------------------------------------------------------------------


def add_status(result: Any, *_: Any, **__: Any) -> Any:
    """Add the gate's counters to SGLang's internal state."""
    if _runtime is not None:
        compare_counts(_runtime)
        result.internal_state["margingate"] = _runtime.status()
    return result


STATUS_SECONDS = 10.0


def compare_counts(runtime: Runtime) -> None:
    """Compare what the ranks have counted: SGLang asks all of them at the same point between two forwards."""
    ranks = group.ranks()
    if ranks.size == 1:
        return
    runtime.recorder.catch_up()  # how far each has read is its own affair; what was chosen is not
    runtime.recorder.settle()
    try:
        ranks.same("counted steps", runtime.recorder.totals.decisions(), seconds=STATUS_SECONDS)
    except RankError as error:
        runtime.lower(str(error))


WHAT = {
    "UpdateWeightFromDiskReqInput": "an update from disk",
    "UpdateWeightsFromDistributedReqInput": "an update from other processes",
    "UpdateWeightsFromTensorReqInput": "an update from tensors",
    "UpdateWeightsFromIPCReqInput": "an update from a checkpoint engine",
    "ReleaseMemoryOccupationReqInput": "a release of memory",
    "ResumeMemoryOccupationReqInput": "memory that was taken again",
}


def after_update(result: Any, _manager: Any, request: Any) -> None:
    """Lower the server's guarantee: nothing of its start-up checks was made with these weights.

    A failed update counts as well: SGLang loads in place, so some weights may be new ones by then.
    """
    if _runtime is not None:
        failed = "" if getattr(result, "success", True) else ", which failed half-way or before"
        kind = type(request).__name__
        _runtime.weights_changed(
            f"the weights may not be those that were checked at the start, after {WHAT.get(kind, kind)}{failed}",
            kind != "ReleaseMemoryOccupationReqInput",
        )


def after_adapter(result: Any, _scheduler: Any, request: Any) -> None:
    """Lower the server's guarantee once an adapter was loaded or unloaded: its layers were never probed."""
    if _runtime is not None and result.success:
        _runtime.weights_changed(
            f"the LoRA adapter {request.lora_name!r:.80} was loaded or unloaded after the start-up checks"
        )
