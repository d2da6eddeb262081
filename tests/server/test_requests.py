"""Per-request parameters, features that change logits, wrong input, and requests that go away."""

from __future__ import annotations

import json
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_margingate.bench.servers.client import Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server

BAD = [
    ({"margingate_policy": "sometimes"}, "margingate_policy"),
    ({"margingate_policy": "off", "margingate_threshold": "low"}, "margingate_threshold"),
    ({"margingate_threshold": -1}, "margingate_threshold"),
    ({"margingate_threshold": True}, "margingate_threshold"),
    ({"margingate_dataset": 7}, "margingate_dataset"),
    ({"margingate_return_steps": "yes"}, "margingate_return_steps"),
    ({"margingate_treshold": 0.5}, "margingate_treshold"),
]


@pytest.mark.parametrize(("custom", "field"), BAD)
def test_wrong_parameters_are_answered_with_400(gate_server: Server, custom: dict[str, Any], field: str) -> None:
    code, out = gate_server.client.post(
        {"text": "Hello", "sampling_params": {"temperature": 0, "custom_params": custom}}
    )
    assert code == 400
    assert field in json.dumps(out)


def test_the_readmes_request_is_answered(gate_server: Server) -> None:
    """What curl sends without a header is a form, which the server does not read as JSON."""
    lines = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ").splitlines()
    (words,) = [shlex.split(line) for line in lines if line.strip().startswith("curl ")]
    given = {flag: words[words.index(flag) + 1] for flag in ("-H", "-d")}
    name, value = given["-H"].split(": ")
    path = words[1].partition("/")[2]
    answer = requests.post(f"{gate_server.base_url}/{path}", data=given["-d"], headers={name: value}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["meta_info"]["margingate"]["guarantee"] == "gated"


def test_wrong_requests_do_not_disturb_others(gate_server: Server, prompts: list[Prompt]) -> None:
    few = prompts[:6]
    alone = run_alone(gate_server.client, few, max_new_tokens=48)
    bad = {"text": "Hello", "sampling_params": {"custom_params": {"margingate_policy": 1}}}
    with ThreadPoolExecutor(8) as pool:
        wrong = [pool.submit(gate_server.client.post, bad) for _ in range(20)]
        together = run_together(gate_server.client, few, 6, max_new_tokens=48)
        assert {w.result()[0] for w in wrong} == {400}
    assert all(a.same_as(b) for a, b in zip(alone, together))


def test_gating_needs_a_gating_server(log_server: Server) -> None:
    custom = {"margingate_policy": "gate"}
    code, out = log_server.client.post({"text": "Hi", "sampling_params": {"temperature": 0, "custom_params": custom}})
    assert code == 400
    assert "--margingate-policy gate" in json.dumps(out)


def test_return_steps_gives_one_entry_a_token(gate_server: Server, prompts: list[Prompt]) -> None:
    done = gate_server.client.generate(prompts[2], max_new_tokens=40, custom={"margingate_return_steps": True})
    per_token = done.margingate["per_token"]
    assert {len(v) for v in per_token.values()} == {len(done.tokens)}
    tau = done.margingate["threshold"]
    assert [m <= tau for m in per_token["margin"][1:]] == per_token["verified"][1:]
    assert per_token["verified"][0] is False  # the prefill's token is canonical by itself


def test_non_greedy_requests_pass_untouched(gate_server: Server, prompts: list[Prompt]) -> None:
    done = gate_server.client.generate(prompts[0], max_new_tokens=20, sampling={"temperature": 1.0})
    assert done.margingate["guarantee"] == "none"
    assert done.margingate["verified"] == 0


FEATURES: dict[str, dict[str, Any]] = {
    "frequency penalty": {"frequency_penalty": 0.7},
    "repetition penalty": {"repetition_penalty": 1.3},
    "min new tokens": {"min_new_tokens": 40},
    "logit bias": {"logit_bias": {"300": 2.0, "301": -3.0}},
    "regex": {"regex": r"[a-z ]{30,60}"},
    "stop string": {"stop": ["."]},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_stay_consistent_in_a_batch(gate_server: Server, prompts: list[Prompt], feature: str) -> None:
    few, sampling = prompts[:8], FEATURES[feature]
    options: dict[str, Any] = {"max_new_tokens": 48, "sampling": sampling, "custom": {"margingate_threshold": 1.0}}
    alone = run_alone(gate_server.client, few, **options)
    together = run_together(gate_server.client, few, 8, background=few[:2], **options)
    assert [a.tokens for a in alone] == [b.tokens for b in together]
    assert sum(b.margingate["verified"] for b in together) > 0
    if feature == "regex":
        assert all(set(b.text) <= set("abcdefghijklmnopqrstuvwxyz ") for b in together)


def test_logprobs_belong_to_the_committed_tokens(gate_server: Server, prompts: list[Prompt]) -> None:
    params = {"temperature": 0, "max_new_tokens": 24, "custom_params": {"margingate_policy": "always"}}
    code, out = gate_server.client.post({"text": prompts[0].text, "sampling_params": params, "return_logprob": True})
    assert code == 200
    assert [entry[1] for entry in out["meta_info"]["output_token_logprobs"]] == out["output_ids"]


def test_openai_requests_are_gated(gate_server: Server) -> None:
    body = {
        "model": "default", "temperature": 0, "max_tokens": 16,
        "messages": [{"role": "user", "content": "Tell me a story."}], "custom_params": {"margingate_dataset": "openai"},
    }  # fmt: skip
    before = gate_server.client.status()["totals"]["steps"]
    answer = requests.post(gate_server.base_url + "/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200
    assert gate_server.client.status()["totals"]["steps"] > before


def test_parallel_samples(gate_server: Server, prompts: list[Prompt]) -> None:
    code, out = gate_server.client.post(
        {"text": prompts[1].text, "sampling_params": {"temperature": 0, "max_new_tokens": 32, "n": 3}}
    )
    assert code == 200
    assert len({tuple(o["output_ids"]) for o in out}) == 1
    assert out[0]["output_ids"] == list(gate_server.client.generate(prompts[1], max_new_tokens=32).tokens)


def test_disconnects_leave_nothing_behind(gate_server: Server, prompts: list[Prompt]) -> None:
    """Clients that go away in the middle of decoding free their slots: SGLang's own idle check would stop the server."""

    def hang_up(i: int) -> None:
        body = {"text": prompts[i % len(prompts)].text, "stream": True,
                "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}}  # fmt: skip
        with requests.post(gate_server.base_url + "/generate", json=body, stream=True, timeout=300) as answer:
            for n, _ in enumerate(answer.iter_lines()):
                if n > 2 + i % 5:
                    break

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hang_up, range(24)))
    while not gate_server.client.flush_cache():
        time.sleep(0.5)
    time.sleep(2)  # the leak check runs when the scheduler is idle
    assert gate_server.alive()
    assert gate_server.client.generate(prompts[0], max_new_tokens=8).tokens
    assert "leak" not in gate_server.log_path.read_text()


def test_streaming_carries_the_summary_at_the_end(gate_server: Server, prompts: list[Prompt]) -> None:
    body = {"text": prompts[0].text, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 12}}
    with requests.post(gate_server.base_url + "/generate", json=body, stream=True, timeout=300) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith(b"data: {")]
    assert all("margingate" not in c["meta_info"] for c in chunks[:-1])
    assert chunks[-1]["meta_info"]["margingate"]["steps"] == 12
