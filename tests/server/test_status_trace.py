"""Status page, metrics, and the run that the server leaves on disk."""

from __future__ import annotations

import time

import requests

from sglang_margingate.bench.servers.client import Prompt
from sglang_margingate.bench.servers.process import Server
from sglang_margingate.trace import read_run


def test_status_names_policy_self_test_and_versions(gate_server: Server) -> None:
    status = gate_server.client.status()
    assert status["policy"] == "gate"
    assert status["self_test"]["passed"] is True
    assert status["threshold"] == 0.0625
    assert {"sglang", "torch", "sglang-margingate"} <= set(status["versions"])


def test_metrics_carry_our_prefix(gate_server: Server, prompts: list[Prompt]) -> None:
    gate_server.client.generate(prompts[2], max_new_tokens=64)
    text = requests.get(gate_server.base_url + "/metrics", timeout=300).text
    for name in ("steps", "triggers", "flips", "missed", "verify_passes", "verify_rows", "verify_seconds"):
        assert f"margingate_{name}_total" in text, name
    assert 'margingate_host_seconds_total{forward="decode"' in text
    host = gate_server.client.status()["host"]
    for kind in ("decode", "prefill"):
        assert 0 < host[kind]["mean_us"] <= host[kind]["most_us"]
        assert 0 < host[kind]["share"] < 1
    assert host["decode"]["forwards"] > host["prefill"]["forwards"]


def test_the_trace_tells_what_the_response_told(gate_server: Server, prompts: list[Prompt]) -> None:
    done = gate_server.client.generate(prompts[5], max_new_tokens=80, custom={"margingate_dataset": "traced"})
    rid = done.meta["id"]
    path = gate_server.client.status()["trace"]["path"]
    while True:
        run = read_run(path)
        requests_seen = run.requests[run.requests.request_id == rid]
        steps = run.steps[run.steps.request_id == rid].sort_values("step")
        if len(requests_seen) and len(steps) >= len(done.tokens):
            break
        time.sleep(1)
    assert steps.token.tolist() == list(done.tokens)
    assert steps.step.tolist() == list(range(len(done.tokens)))
    row, summary = requests_seen.iloc[0], done.margingate
    for key in ("triggers", "verified", "flips", "missed", "guarantee", "dataset"):
        assert row[key] == summary[key], key
    assert row.output_tokens == len(done.tokens)
    assert int((steps.margin <= summary["threshold"]).iloc[1:].sum()) == summary["triggers"]
    assert row.prompt_text == prompts[5].text
    assert "".join(steps.token_text.iloc[:5])
    assert steps[steps.reason == "margin"].kv_delta_last.notna().all()
