"""What moved between the versions of SGLang that are served, under one name each.

Which way is the right one is found out once per process, by what is there and not by a version's number: the same change
came in one version for one field and in another for the next. Everything else in serving/ reads these.

======================  =====================================  ======================================  ==========
Name                    0.5.17                                 later                                   seen first
======================  =====================================  ======================================  ==========
``pool_index(req)``     ``req.req_pool_idx``                   ``req.kv.req_pool_idx``                 0.5.19
``protected_len(req)``  ``req.cache_protected_len``            ``req.kv.cache_protected_len``          0.5.19
``prefix_len(req)``     length of ``req.prefix_indices``       ``req.prefix_len``                      0.5.23
``matched_len(m)``      length of ``m.device_indices``         ``m.device_prefix_len``                 0.5.23
``resolve(args)``       settings are resolved when made        ``resolve_once()``; the object keeps    0.5.19
                                                               what the user gave
``graph_config(mr)``    ``server_args.cuda_graph_config``      the published configuration's           0.5.19
``padding_field()``     ``num_token_non_padded_cpu``           ``global_num_token_non_padded_cpu``     0.5.20
``bind_columns(..)``    nothing to do                          the translator rebinds, later plans     0.5.19, 23
``tp_rank()``           the same everywhere; ``scheduler.ps``  is gone                                 0.5.23
``dp_rank(scheduler)``  ``scheduler.ps.dp_rank``               ``get_parallel().dp_rank``              0.5.23
======================  =====================================  ======================================  ==========
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any

Read = Callable[[Any], Any]


class Moved(AttributeError):
    """A version of SGLang keeps a value at none of the known places."""


class Reader:
    """Reads a value that SGLang moved; the first object that is read decides where it lies, once for the process.

    Parameters
    ----------
    what
        The value in words, for the error.
    places
        Attribute paths to look at, the newest first, each with what makes the value of what is found there.
    """

    def __init__(self, what: str, *places: tuple[str, Callable[[Any], Any] | None]) -> None:
        self.what, self.places = what, places
        self._read: Read | None = None

    def __call__(self, thing: Any) -> Any:
        """Return the value."""
        read = self._read
        return self._choose(thing)(thing) if read is None else read(thing)

    def of_all(self, things: Sequence[Any]) -> list[Any]:
        """Return the value of each; this is what the decode loop asks, for all of its rows."""
        if self._read is None and things:
            self._choose(things[0])
        return list(map(self._read, things)) if self._read is not None else []

    def _choose(self, thing: Any) -> Read:
        for path, make in self.places:
            at = attrgetter(path)
            try:
                at(thing)
            except AttributeError:
                continue
            self._read = at if make is None else lambda found, at=at, make=make: make(at(found))
            return self._read
        places = ", ".join(path for path, _ in self.places)
        raise Moved(f"{self.what} is at none of {places} of SGLang's {type(thing).__name__}: it moved in this version")


pool_index = Reader("a request's row of the table of K/V slots", ("kv.req_pool_idx", None), ("req_pool_idx", None))
protected_len = Reader(
    "how many columns the radix tree holds for a request",
    ("kv.cache_protected_len", None),
    ("cache_protected_len", None),
)
prefix_len = Reader("how much of a request is in K/V", ("prefix_len", None), ("prefix_indices", len))
matched_len = Reader("the length of a prefix hit", ("device_prefix_len", None), ("device_indices", len))


# ---- settings ---------------------------------------------------------------------------------------------------------


@lru_cache
def _resolving_view() -> Callable[[Any], Any] | None:
    try:
        from sglang.srt.arg_groups.model_override_base import resolving_view
    except ImportError:
        return None  # 0.5.17: what the object holds is resolved
    view: Callable[[Any], Any] = resolving_view
    return view


def resolve(args: Any) -> Any:
    """Return a read-only view of SGLang's settings as it decided on them, deciding now where it has not yet.

    Later versions keep in ``ServerArgs`` what the user gave, None where nothing was given: a check of the raw object
    would let a value pass that SGLang chose by itself.
    """
    once = getattr(args, "resolve_once", None)
    if once is not None:
        once()
    return resolved(args)


def resolved(args: Any) -> Any:
    """Return the same view where the launcher has resolved the settings already, as in every scheduler process."""
    view = _resolving_view()
    return args if view is None else view(args)


def graph_config(model_runner: Any) -> Any:
    """Return the configuration that CUDA graph runners read their sizes from, or None where there is none yet.

    A change of ``decode.bs`` in it is what they capture.
    """
    if _resolving_view() is None:
        return model_runner.server_args.cuda_graph_config
    from sglang.srt.runtime_context import get_exec

    return get_exec().graph.cuda_graph_config


def model_config(server_args: Any) -> Any:
    """Return what SGLang reads of the model's files, in the launcher, before anything is loaded."""
    try:
        from sglang.srt.arg_groups.model_override_base import model_config_of
    except ImportError:
        return server_args.get_model_config()  # 0.5.17
    return model_config_of(server_args)


def tp_rank() -> int:
    """Return this process's rank in its tensor-parallel group."""
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().tp_rank)


def dp_rank(scheduler: Any) -> int:
    """Return which scheduler of the server this is, counted from 0."""
    parallel = getattr(scheduler, "ps", None)
    if parallel is None:  # 0.5.23
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
    return int(parallel.dp_rank or 0)


# ---- forwards ---------------------------------------------------------------------------------------------------------


@lru_cache
def padding_field() -> str:
    """Return the field of ``ForwardBatch`` that counts the rows that are no padding."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    new = "global_num_token_non_padded_cpu"
    return new if hasattr(ForwardBatch, new) or new in ForwardBatch.__annotations__ else "num_token_non_padded_cpu"


def bind_columns(model_runner: Any, batch: Any) -> None:
    """Tell a batch that was built by hand which K/V slots it writes, as ``ForwardBatch.init_new`` does."""
    translator = getattr(model_runner, "kv_index_translator", None)
    if translator is None:
        return
    if hasattr(translator, "own_plan"):
        translator.own_plan(batch).bind(batch, translator)
    else:
        translator.rebind_write_loc(batch)


# ---- sampling ---------------------------------------------------------------------------------------------------------


def only_samples(model_runner: Any, sampling_info: Any) -> bool:
    """Return whether ``ModelRunner.sample`` does nothing beside its sampler: no observer looks on and no mark is set."""
    observer = getattr(model_runner, "sampling_observer", None)
    if observer is not None and observer.is_active(sampling_info):
        return False
    return not getattr(sampling_info, "has_watermark_candidates", False)


def forget_observation(logits_output: Any) -> None:
    """Drop what an observer left on an output that graph runners use again, as ``ModelRunner.sample`` does."""
    if getattr(logits_output, "auxiliary_device_output", None) is not None:
        logits_output.auxiliary_device_output = None


def one_way_to_prompt_logprobs(model: Any) -> None:
    """Let log-probabilities of prompts be computed in one way, whatever the neighbours ask for.

    Since 0.5.20 a fused kernel sums a row otherwise than the one beside it, and which is taken follows the largest k in the batch.
    """
    processor: Any = getattr(getattr(model, "logits_processor", None), "input_logprob_processor", None)
    if getattr(processor, "enable_fast_input_logprobs", False):
        processor.enable_fast_input_logprobs = False
