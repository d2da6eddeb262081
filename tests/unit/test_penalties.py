"""Which token a penalty counts is a matter of the request alone, not of who arrived while it decoded."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.runtime.state import ATTRIBUTE, RequestState

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")


def a_request(policy: Policy, decodes: int, known: int, resumed_at: int = 0) -> Any:
    """Return a request before its decode number ``decodes``, with ``known`` tokens of output processed."""
    state = RequestState(RequestLedger("r", RequestParams(policy, 0.5, "", False), Repair.WINDOW))
    state.resumed_at = resumed_at
    output = list(range(100, 100 + known))
    req = SimpleNamespace(output_ids=output, origin_input_ids=[7, 8], decode_batch_idx=decodes)
    setattr(req, ATTRIBUTE, state)
    return req


@pytest.mark.parametrize(
    ("decodes", "known", "resumed_at", "token"),
    [(0, 0, 0, 8), (0, 1, 0, 8), (1, 1, 0, 100), (1, 2, 0, 100), (5, 6, 0, 104), (0, 4, 4, 103), (2, 7, 4, 105)],
)
def test_a_gated_request_counts_what_it_would_alone(decodes: int, known: int, resumed_at: int, token: int) -> None:
    from sglang_margingate.serving.scheduler_hooks import penalised_token

    assert penalised_token(a_request(Policy.GATE, decodes, known, resumed_at)) == token


def test_others_count_as_stock_does() -> None:
    from sglang_margingate.serving.scheduler_hooks import penalised_token

    assert penalised_token(a_request(Policy.OFF, 1, 3)) == 102
    assert penalised_token(a_request(Policy.OFF, 0, 0)) == 8


@pytest.mark.parametrize(
    ("asked", "penalised"),
    [
        ({}, False), ({"frequency_penalty": 0.5}, True), ({"presence_penalty": 0.5}, True),
        ({"repetition_penalty": 1.2}, True), ({"min_new_tokens": 8}, True),
    ],
)  # fmt: skip
def test_what_sglang_counts_anew_after_a_retraction_is_known(asked: dict[str, Any], penalised: bool) -> None:
    from sglang_margingate.serving.batches import opened

    nothing = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    params = SimpleNamespace(
        custom_params=None, top_k=1, temperature=1.0, sampling_seed=None, top_p=1.0, min_p=0.0, max_new_tokens=16,
        **{**nothing, **asked},
    )  # fmt: skip
    req = SimpleNamespace(rid="r", sampling_params=params, custom_logit_processor=None)
    assert opened(req).penalised is penalised
