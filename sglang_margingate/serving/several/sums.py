"""The sum over ranks of this server: probed, and gathered where it has no order of its own."""

from __future__ import annotations

import logging
from typing import Any

from sglang_margingate.canonical.reduce_probe import ReduceProbe, probe_reduce
from sglang_margingate.runtime.faults import TestKnobs, split_reduce
from sglang_margingate.serving.engines import sums_over_ranks
from sglang_margingate.serving.several import group

log = logging.getLogger(__name__)

GRAPH_DENSE, GRAPH_LARGEST, GRAPH_STEP = 1024, 4096, 64
"""Numbers of rows at which the sum over ranks is probed in a CUDA graph: all up to the first, as decode graphs may have any
of them, then those of prefill graphs."""


GATHER_ROWS = 64
"""Without decode graphs: up to which number of rows a sum without one order is made by gathering."""


def probe_sums(model_runner: Any, rows: list[int], wanted: list[int], knobs: TestKnobs) -> ReduceProbe:
    """Probe the sum over ranks, at the sizes of decode and prefill graphs inside graphs too; mend what has no one order.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    rows
        Numbers of rows to probe, ascending.
    wanted
        Sizes of the decode graphs; empty without them.
    knobs
        Faults injected on purpose.
    """
    if knobs.split_reduce:
        group.replace_reduce(lambda reduce: split_reduce(reduce, knobs.split_reduce))
    in_graphs = [m for m in rows if m <= GRAPH_DENSE or (m <= GRAPH_LARGEST and m % GRAPH_STEP == 0)]

    def probe() -> ReduceProbe:
        found = probe_reduce(
            group.GroupReduce(), group.ranks(), model_runner.model_config.hidden_size, model_runner.dtype,
            model_runner.device, rows, in_graphs if wanted else (), sums_over_ranks(model_runner.model),
        )  # fmt: skip
        say = log.info if found.holds else log.warning
        say("margingate: %s", found.describe())
        return found

    found, most = probe(), 2 * max(wanted or [GATHER_ROWS])  # batches are padded, to less than twice as many rows
    if found.holds_to(most):
        return found
    log.warning(
        "margingate: sums of up to %d rows are gathered and added up in the order of ranks: one order, at a cost", most
    )
    group.gather_sums(most)
    return probe()
