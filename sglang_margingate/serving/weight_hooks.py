"""Hook functions for changes of a running server that void its map, self-test, thresholds and cached columns."""

from __future__ import annotations

from typing import Any

from sglang_margingate.serving import scheduler_hooks

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
    runtime = scheduler_hooks.runtime()
    if runtime is not None:
        failed = "" if getattr(result, "success", True) else ", which failed half-way or before"
        what = WHAT.get(type(request).__name__, type(request).__name__)
        runtime.weights_changed(f"the weights may not be those that were checked at the start, after {what}{failed}")


def after_adapter(result: Any, _scheduler: Any, request: Any) -> None:
    """Lower the server's guarantee once an adapter was loaded or unloaded: its layers were never probed."""
    runtime = scheduler_hooks.runtime()
    if runtime is not None and result.success:
        runtime.weights_changed(
            f"the LoRA adapter {request.lora_name!r:.80} was loaded or unloaded after the start-up checks"
        )
