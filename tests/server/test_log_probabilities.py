"""Log-probabilities: the same bits alone and in a batch, beside neighbours that ask for other ones."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_margingate.bench.evidence.log_probabilities import Outcome, compare, requests_of
from sglang_margingate.bench.servers.client import Prompt
from sglang_margingate.bench.servers.process import Server
from sglang_margingate.cli import main

KIND = 9
"""Greedy requests, and as many scored ones: every way of asking is among them."""


def counts(outcome: Outcome) -> list[tuple[int, int]]:
    return [tuple(map(int, share.split("/"))) for share in outcome.identical.values()]  # type: ignore[misc]


@pytest.fixture(scope="module")
def wanted() -> list[Prompt]:
    return requests_of(KIND)


def test_all_of_them_are_exact_on_the_canonical_server(canonical_server: Server, wanted: list[Prompt]) -> None:
    found = compare(canonical_server.client, wanted, 16)
    assert found.max_batch_rows >= 4, "no batch formed"
    assert found.neighbours > 0, "nobody had a long prompt scored meanwhile"
    assert counts(found) == [(KIND, KIND)] * 4
    assert found.labels == {"structural exact": 4 * KIND}


def test_the_ungated_server_fails_the_same_comparison(log_server: Server, wanted: list[Prompt]) -> None:
    found = compare(log_server.client, wanted, 16)
    assert found.max_batch_rows >= 4
    assert min(same for same, _ in counts(found)) < KIND
    assert found.labels == {"none batch": 4 * KIND}


def test_verified_ones_are_exact_and_gated_ones_are_called_the_batchs(
    gate_server: Server, wanted: list[Prompt]
) -> None:
    client, some = gate_server.client, wanted[:3]
    for policy, expected in (("always", "verified exact"), ("gate", "gated batch")):
        answers = [client.generate(p, 8, custom={"margingate_policy": policy}).margingate for p in some]
        assert {f"{a['guarantee']} {a['logprobs']}" for a in answers} == {expected}
    assert client.generate(wanted[0], 1).margingate["logprobs"] == "batch", "one token, on a server without a class"
    plain = Prompt("p", wanted[0].text, "story")
    assert client.generate(plain, 4).margingate["logprobs"] is None, "none were asked for"


def test_a_scoring_request_has_a_label_and_one_answer(canonical_server: Server, wanted: list[Prompt]) -> None:
    """Sampled or greedy makes no difference to it: no token is drawn."""
    client = canonical_server.client
    body: dict[str, Any] = {
        "text": wanted[0].text, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.8},
    }  # fmt: skip
    code, out = client.post(body)
    assert code == 200, out
    meta = out["meta_info"]
    assert (meta["margingate"]["guarantee"], meta["margingate"]["logprobs"]) == ("structural", "exact")
    assert "no token was asked for" in meta["margingate"]["guarantee_note"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert not meta["output_token_logprobs"]
    body["sampling_params"]["temperature"] = 0
    assert client.post(body)[1]["meta_info"]["input_top_logprobs"] == meta["input_top_logprobs"]


def test_check_compares_them_and_finds_the_ungated_server_out(canonical_server: Server, log_server: Server) -> None:
    # So long that all of them are under way at once, on a machine with other work too.
    words = ["--dataset", "story", "--limit", "6", "--max-tokens", "48", "--phases", "alone,together", "--repeats", "1"]
    for server, more in ((canonical_server, []), (log_server, ["--expect-fail"])):
        assert main(["check", "--base-url", server.base_url, "--logprobs", "3", *words, *more]) == 0
