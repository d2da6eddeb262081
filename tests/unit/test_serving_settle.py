"""The way of a step's record: pending, committed, settled."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch

from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.serving.metrics import Metrics
from sglang_margingate.serving.runtime import SETTLE_ROWS, Runtime
from sglang_margingate.serving.state import RequestState, StepRow
from sglang_margingate.serving.step import StepHook, _Late
from sglang_margingate.trace.schema import STEP_COLUMNS


def a_hook(policy: Policy = Policy.LOG) -> tuple[StepHook, list[tuple]]:
    """Return a step hook without a model, and the trace rows that its runtime hands out."""
    rows: list[tuple] = []
    writer: Any = SimpleNamespace(add_steps=rows.extend, add_request=lambda row: None)
    scheduler: Any = SimpleNamespace(tokenizer=None)
    return StepHook(Runtime(MarginGateConfig(policy=policy), scheduler, None, None, writer, Metrics(False, "m"))), rows


def a_state(hook: StepHook, policy: Policy = Policy.LOG) -> RequestState:
    return RequestState(
        RequestLedger("r", RequestParams(policy, 0.5, "arith", False), hook.runtime.config.repair, True)
    )


def on_its_way(state: RequestState, token: int, margin: float, waited: list[str]) -> _Late:
    """Return a prefill step whose numbers are still on the GPU; reading them is noted in ``waited``."""
    bits = torch.tensor([margin]).view(torch.int32).long()
    host = torch.stack([torch.tensor([token]), torch.tensor([token + 1]), bits, torch.tensor([token])])
    batch = SimpleNamespace(
        margingate_start=time.perf_counter(), margingate_reqs=[SimpleNamespace(margingate_state=state)],
        forward_mode=SimpleNamespace(is_decode=lambda: False),
    )  # fmt: skip
    arrived: Any = SimpleNamespace(synchronize=lambda: waited.append("arrived"))
    return _Late([StepRow(0, 0, state, 9, False, 0.5)], host, arrived, batch)


def test_a_prefill_is_read_late_and_waits_only_for_requests_that_come_back() -> None:
    """A wait after each prefill would stop the overlap; a retracted request's last step is recorded before it starts over."""
    hook, _ = a_hook()
    first, second = a_state(hook), a_state(hook)
    waited: list[str] = []
    hook._late.append(on_its_way(first, 7, 0.25, waited))

    def open_prefill(state: RequestState, done: list[int]) -> None:
        req = SimpleNamespace(
            margingate_state=state, origin_input_ids=[1, 2, 3], output_ids=done, req_pool_idx=0, rid="r"
        )
        batch = SimpleNamespace(
            seq_lens_cpu=torch.tensor([3 + len(done)]), extend_seq_lens_cpu=[3], extend_prefix_lens_cpu=[0]
        )
        hook._open_prefill([req], batch)

    open_prefill(second, [])
    assert waited == [], "another request's prefill waits for nothing"
    open_prefill(first, [7])
    assert waited == ["arrived"]
    assert first.prefill_ms > 0
    assert (first.pending, first.next_step) == (None, 1), "its step was output already: committed, not dropped"
    assert hook.runtime.totals.steps + len(hook.runtime._committed) == 1


def test_only_a_resumed_prefill_waits_for_its_margin() -> None:
    hook, _ = a_hook()
    gated, free = a_state(hook, Policy.GATE), a_state(hook, Policy.LOG)
    assert hook._waits(StepRow(0, 0, gated, 9, True, 0.5), decode=False)
    assert not hook._waits(StepRow(0, 0, gated, 9, False, 0.5), decode=False)
    assert not hook._waits(StepRow(0, 0, free, 9, True, 0.5), decode=False)
    assert hook._waits(StepRow(0, 0, gated, 9, False, 0.5), decode=True), "outside the class the margin decides"


def test_committed_steps_are_settled_together() -> None:
    """Counting and tracing wait for many steps, but not for long, and never beyond the end of a request."""
    hook, rows = a_hook()
    runtime, state = hook.runtime, a_state(hook)
    ledger = state.ledger

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
