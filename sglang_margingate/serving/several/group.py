"""The ranks of a tensor-parallel group and their sum, as SGLang has them; the same in every served version."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from sglang_margingate.canonical.ranks import Ranks


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

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture what ``run`` launches as SGLang captures its decode graphs."""
        stream = torch.cuda.Stream()
        with capturing(stream):
            run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
        replay: Callable[[], None] = graph.replay
        return replay


def attention_names(model_runner: Any) -> list[str]:
    """Return the types of what attends, which a rank may choose by what works on its GPU."""
    backend = model_runner.attn_backend
    return [type(x).__name__ for x in (backend, *getattr(backend, "prefill_wrappers_paged", ()))]


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
