"""The ranks of a tensor-parallel group and their sum, as SGLang has them; the same in every served version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from margingate_kernels import rank_sum

from sglang_margingate.canonical.ranks import Ranks

Run = Callable[[], None]

_kept: list[Run] = []


@lru_cache
def ranks() -> Ranks:
    """Return the ranks of this process's tensor-parallel group, which share the store that torch's groups were made with."""
    from sglang.srt.distributed.parallel_state import get_tp_group
    from torch.distributed import distributed_c10d

    group = get_tp_group()
    if group.world_size == 1:
        return Ranks()
    return Ranks(group.rank_in_group, group.world_size, distributed_c10d._get_default_store())


class GroupReduce:
    """The sum over ranks as SGLang's layers ask for it (:class:`~sglang_margingate.canonical.reduce_probe.Reduce`)."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of [rows, hidden]; ``x`` may be overwritten."""
        from sglang.srt.distributed.parallel_state import get_tp_group

        out: torch.Tensor = get_tp_group().all_reduce(x)
        return out

    def record(self, run: Run) -> Run:
        """Capture what ``run`` launches as SGLang captures its decode graphs.

        The graph stays: the other ranks have opened its memory, and it must not be freed before they close it.
        """
        replay = recorder()(run)
        _kept.append(replay)
        return replay


def gather_sums(most_rows: int) -> None:
    """Add up sums of up to ``most_rows`` rows by gathering the parts: in the order of ranks at every size."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    original, ranks = group.all_reduce, group.world_size

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or len(x) > most_rows:
            return original(x)
        return rank_sum(group.all_gather(x.contiguous(), dim=0).view(ranks, *x.shape))

    group.all_reduce = all_reduce


def attention_names(model_runner: Any) -> list[str]:
    """Return the types of what attends, which a rank may choose by what works on its GPU."""
    backend = model_runner.attn_backend
    wrappers = getattr(backend, "prefill_wrappers_paged", ())
    kinds = [f" {x.kind.value}" if hasattr(x, "kind") else "" for x in wrappers]
    return [type(backend).__name__, *(type(x).__name__ + kind for x, kind in zip(wrappers, kinds))]


def recorder() -> Callable[[Run], Run]:
    """Return what captures a forward into a CUDA graph, in the memory that SGLang's graphs share."""
    from sglang.srt.model_executor.runner_utils.pool import get_or_create_global_graph_memory_pool

    pool, stream = get_or_create_global_graph_memory_pool(torch.cuda), torch.cuda.Stream()

    def record(run: Run) -> Run:
        stream.wait_stream(torch.cuda.current_stream())
        with capturing(stream):
            with torch.cuda.stream(stream):
                run()  # kernels are compiled and loaded outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run()
        replay: Run = graph.replay
        return replay

    return record


def capturing(stream: Any) -> AbstractContextManager[Any]:
    """Return the context in which CUDA graphs with sums over ranks are captured on ``stream``; nothing on one rank."""
    if ranks().size == 1:
        return nullcontext()
    from sglang.srt.distributed.parallel_state import graph_capture

    found: AbstractContextManager[Any] = graph_capture(stream=stream)
    return found


def replace_reduce(make: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> None:
    """Put what ``make`` makes of the sum over ranks in its place: a fault, for tests."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    group.all_reduce = make(group.all_reduce)
