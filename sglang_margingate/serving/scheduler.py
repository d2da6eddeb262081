"""Hook functions that run in SGLang's scheduler processes; the work is done by :mod:`.runtime` and :mod:`.step`."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from sglang_margingate.serving import prefill
from sglang_margingate.serving.runtime import Runtime
from sglang_margingate.serving.setup import build_runtime
from sglang_margingate.serving.state import state_of
from sglang_margingate.serving.step import BATCH_REQS, BATCH_START, StepHook

log = logging.getLogger(__name__)

_runtime: Runtime | None = None
_step: StepHook | None = None


def runtime() -> Runtime | None:
    """Return this process's runtime, None before :func:`set_up`."""
    return _runtime


def set_up(info: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """Build this process's runtime right before the event loop, and attest it to the launcher.

    An exception here ends the scheduler before it takes a request, and SGLang then ends the launcher.
    """
    global _runtime, _step
    try:
        _runtime = build_runtime(scheduler)
    except Exception as error:
        # SGLang prints the traceback; this line is for the person who started the server.
        print(f"margingate: refusing to serve: {error}", file=sys.stderr, flush=True)
        raise
    _step = StepHook(_runtime)
    info["margingate"] = _runtime.status()
    return info


def open_request(_result: Any, req: Any, *_: Any, **__: Any) -> None:
    """Attach a state to a new request. SGLang's own requests before set-up (warm-up forwards) get none."""
    if _runtime is not None:
        _runtime.open_request(req)


def tag_batch(result: Any, _cls: Any, batch: Any, *_: Any, **__: Any) -> None:
    """Remember the requests behind a forward's rows and when it began."""
    setattr(result, BATCH_REQS, list(batch.reqs))
    setattr(result, BATCH_START, time.perf_counter())


def sample(original: Any, model_runner: Any, logits_output: Any, batch: Any) -> Any:
    """Gate one step."""
    if _step is None or model_runner.is_draft_worker:
        return original(model_runner, logits_output, batch)
    return _step.sample(original, model_runner, logits_output, batch)


def after_finish_state(_result: Any, req: Any, *_: Any, **__: Any) -> None:
    """Close a request's record once it has finished."""
    if _runtime is not None and _step is not None and req.finished():
        _step.drain(state_of(req), len(req.output_ids))
        _runtime.finish(req)


def add_one_req(original: Any, adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Admit one waiting request under the prefill rules."""
    if _runtime is None or not _runtime.config.policy.verifies:
        return original(adder, req, *args, **kwargs)
    return prefill.add_one_req(_runtime, original, adder, req, *args, **kwargs)


def add_chunked_req(original: Any, adder: Any, req: Any) -> Any:
    """Continue a chunked prompt under the prefill rules."""
    if _runtime is None or not _runtime.config.policy.verifies:
        return original(adder, req)
    return prefill.add_chunked_req(_runtime, original, adder, req)


def add_status(result: Any, *_: Any, **__: Any) -> Any:
    """Add the gate's counters to SGLang's internal state."""
    if _runtime is not None:
        result.internal_state["margingate"] = _runtime.status()
    return result
