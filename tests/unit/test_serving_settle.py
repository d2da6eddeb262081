"""The way of a step's record: pending, committed, settled."""

from __future__ import annotations

import time
from types import SimpleNamespace

from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.serving.metrics import Metrics
from sglang_margingate.serving.runtime import SETTLE_ROWS, Runtime
from sglang_margingate.serving.state import RequestState, StepRow
from sglang_margingate.serving.step import StepHook
from sglang_margingate.trace.schema import STEP_COLUMNS


def test_committed_steps_are_settled_together() -> None:
    """Counting and tracing wait for many steps, but not for long, and never beyond the end of a request."""
    rows: list[tuple] = []
    writer = SimpleNamespace(add_steps=rows.extend, add_request=lambda row: None)
    config = MarginGateConfig(policy=Policy.LOG)
    runtime = Runtime(config, SimpleNamespace(tokenizer=None), None, None, writer, Metrics(False, "m"))
    hook = StepHook(runtime)
    ledger = RequestLedger("r", RequestParams(Policy.LOG, 0.5, "arith", False), config.repair, True)
    state = RequestState(ledger)

    def step(margin: float) -> None:
        row = StepRow(0, 0, state, 10 + state.next_step, False, 0.5, fast_token=7, second_token=8, margin=margin)
        batch = SimpleNamespace(margingate_start=time.perf_counter())
        hook._record([row], [7], 1, True, batch, 0.0)

    runtime._settled = time.time() + 60  # not due by time
    step(0.25)
    step(3.0)
    assert (len(rows), runtime.totals.steps) == (0, 0), "nothing is settled yet"
    for _ in range(SETTLE_ROWS):
        step(3.0)
    assert len(rows) == runtime.totals.steps == SETTLE_ROWS, "the newest two are not settled and not committed"
    runtime._settled = 0.0
    step(3.0)
    assert len(rows) == SETTLE_ROWS + 2, "due by time: all but the pending one"
    names = [c.name for c in STEP_COLUMNS]
    assert [dict(zip(names, row))["step"] for row in rows] == list(range(SETTLE_ROWS + 2))
    assert [dict(zip(names, row))["margin"] for row in rows[:2]] == [0.25, 3.0]
    assert len(rows[0]) == len(names)

    runtime._settled = time.time() + 60
    req = SimpleNamespace(
        rid="r", margingate_state=state, output_ids=[7] * (SETTLE_ROWS + 3), finished_len=None, retraction_count=0,
        finished_reason=None, origin_input_ids=[1],
    )  # fmt: skip
    runtime.finish(req)
    assert len(rows) == ledger.counters.steps == runtime.totals.steps == SETTLE_ROWS + 3
    assert ledger.counters.triggers == 1
    assert req.customized_info["margingate"][-1]["steps"] == SETTLE_ROWS + 3
