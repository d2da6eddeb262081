"""Seeded sampling on real servers: the same tokens alone and in a batch, groups, OpenAI's seed, and wrong input."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from sglang_margingate.bench.evidence.answers.seeded import compare, requests_of
from sglang_margingate.bench.servers.client import Prompt
from sglang_margingate.bench.servers.process import Server
from sglang_margingate.gate.sampling import derived_seed

HOT: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 24}


def ask(server: Server, text: str, **params: Any) -> Any:
    code, out = server.client.post({"text": text, "sampling_params": {**HOT, **params}})
    assert code == 200, out
    return out


def test_answers_depend_on_seed_and_prompt_alone(canonical_server: Server) -> None:
    """The small version of ``margingate evidence seeded``: mixed parameters, among greedy and unseeded requests."""
    found = compare(canonical_server.client, requests_of(14), max_new_tokens=20)
    assert found.same == found.asked == 36, found
    assert found.guarantees == {"structural": 28}
    assert found.max_batch_rows >= 8
    assert found.distinct == 14, "samples are no greedy answers"


def test_a_seed_and_a_temperature_change_the_answer(gate_server: Server, prompts: list[Prompt]) -> None:
    text = prompts[2].text
    answers = [ask(gate_server, text, sampling_seed=s)["output_ids"] for s in (1, 1, 2, -1, 2**63 - 1)]
    assert answers[0] == answers[1]
    assert len({tuple(a) for a in answers}) == 4
    assert ask(gate_server, text, sampling_seed=1, temperature=3.0)["output_ids"] != answers[0]
    wide = ask(gate_server, text, sampling_seed=1, top_k=10**8)
    assert wide["output_ids"] == answers[0], "a top-k beyond the vocabulary filters nothing"


def test_the_summary_tells_seed_and_temperature(gate_server: Server, prompts: list[Prompt]) -> None:
    seeded = ask(gate_server, prompts[0].text, sampling_seed=5, temperature=0.5)["meta_info"]["margingate"]
    assert (seeded["seed"], seeded["temperature"], seeded["guarantee"]) == (5, 0.5, "gated")
    free = ask(gate_server, prompts[0].text)["meta_info"]["margingate"]
    assert (free["seed"], free["temperature"], free["guarantee"]) == (None, 1.0, "none")
    assert "without a seed" in free["guarantee_note"]


def test_temperature_0_with_a_seed_is_greedy(gate_server: Server, prompts: list[Prompt]) -> None:
    seeded = ask(gate_server, prompts[1].text, temperature=0, sampling_seed=5)
    assert seeded["output_ids"] == ask(gate_server, prompts[1].text, temperature=0)["output_ids"]
    assert seeded["meta_info"]["margingate"]["seed"] is None


def test_samples_of_a_group_differ_and_can_be_asked_for_alone(gate_server: Server, prompts: list[Prompt]) -> None:
    text = prompts[2].text
    group = ask(gate_server, text, sampling_seed=7, n=3)
    seeds = [out["meta_info"]["margingate"]["seed"] for out in group]
    assert seeds == [7, derived_seed(7, 1), derived_seed(7, 2)]
    assert len({tuple(out["output_ids"]) for out in group}) == 3
    for seed, out in zip(seeds, group):
        assert ask(gate_server, text, sampling_seed=seed)["output_ids"] == out["output_ids"]


def test_log_probabilities_are_those_of_the_drawn_tokens(gate_server: Server, prompts: list[Prompt]) -> None:
    params = {**HOT, "sampling_seed": 3, "top_p": 0.9}
    code, out = gate_server.client.post({"text": prompts[0].text, "sampling_params": params, "return_logprob": True})
    assert code == 200
    assert [entry[1] for entry in out["meta_info"]["output_token_logprobs"]] == out["output_ids"]
    assert out["output_ids"] == ask(gate_server, prompts[0].text, sampling_seed=3, top_p=0.9)["output_ids"]
    assert all(entry[0] > -12 for entry in out["meta_info"]["output_token_logprobs"]), "of a token within the nucleus"


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_openai_seeds(gate_server: Server, path: str) -> None:
    words = (
        {"messages": [{"role": "user", "content": "Tell me a story."}]} if "chat" in path else {"prompt": "Once upon"}
    )
    body = {"model": "default", "temperature": 0.9, "max_tokens": 16, "n": 2, "seed": 11, **words}

    def texts() -> list[str]:
        answer = requests.post(f"{gate_server.base_url}/v1/{path}", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        out = answer.json()
        assert [m["seed"] for m in out["margingate"]] == [11, derived_seed(11, 1)]
        return [json.dumps(choice.get("message") or choice["text"]) for choice in out["choices"]]

    first = texts()
    assert first == texts()
    assert first[0] != first[1]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"sampling_seed": "7"}, "sampling_seed"), ({"sampling_seed": 2**63}, "sampling_seed"),
        ({"sampling_seed": 1.5}, "sampling_seed"), ({"min_p": 1.5}, "min_p"), ({"min_p": "x"}, "min_p"),
        ({"top_k": 2.5}, "top_k"), ({"top_p": "x"}, "top_p"), ({"temperature": []}, "temperature"),
    ],
)  # fmt: skip
def test_wrong_sampling_parameters_are_answered_with_400(
    gate_server: Server, params: dict[str, Any], field: str
) -> None:
    code, out = gate_server.client.post({"text": "Hello", "sampling_params": {**HOT, **params}})
    assert code == 400, out
    assert field in json.dumps(out)


def test_openai_seeds_out_of_range_are_answered_with_400(gate_server: Server) -> None:
    for seed in (2**70, "many"):
        body = {"model": "default", "prompt": "Hi", "max_tokens": 2, "seed": seed}
        answer = requests.post(f"{gate_server.base_url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 400, answer.text
        assert "seed" in answer.text
