"""Nothing in an answer is missing, no key of a client reaches other requests' columns, and changed weights claim nothing."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.process import Server, flag_value, serve
from sglang_margingate.demo.paths import model_path
from sglang_margingate.settings.fingerprint import differing

OLD_NAME = "margingate:fast"
"""What the name space of ungated requests was once called, for all clients to read."""

OFF = {"margingate_policy": "off"}
LABELS = {"structural", "verified", "gated", "none"}


@pytest.fixture
def server(canonical_server: Server) -> Server:
    return canonical_server


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.base_url + path, json=body, timeout=300)


def generate(server: Server, tokens: int, custom: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    if custom:
        params["custom_params"] = custom
    answer = post(server, "/generate", {"sampling_params": params, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def label(out: dict[str, Any]) -> dict[str, Any]:
    return out["meta_info"]["margingate"]


def chats(server: Server, count: int, tokens: int, **fields: Any) -> list[list[int]]:
    """Let ``count`` prompts be answered together without a gate; return the tokens of each chat so far."""

    def talk(text: str) -> list[int]:
        out = generate(server, tokens, OFF, text=text, return_prompt_token_ids=True, **fields)
        return [*out["prompt_token_ids"], *out["output_ids"]]

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(talk, [p.text for p in demo_prompts(count)]))


# ---- name spaces --------------------------------------------------------------------------------------------------


def test_a_clients_key_does_not_lead_to_ungated_columns(server: Server) -> None:
    """Eight chats whose first turn asked for no gate; the second is gated, under the name of the ungated name space."""
    server.client.flush_cache()
    histories = chats(server, 8, 120)
    warm = [generate(server, 48, input_ids=h, extra_key=OLD_NAME) for h in histories]
    # What earlier chats of this test began with alike is theirs, gated, and may be shared; of the ungated turn nothing may.
    shared = [max((common(h, other) for other in histories[:i]), default=0) for i, h in enumerate(histories)]
    assert max(shared) < 32 < min(len(h) for h in histories)
    for history, out, most in zip(histories, warm, shared):
        server.client.flush_cache()
        cold = generate(server, 48, input_ids=history)
        assert out["output_ids"] == cold["output_ids"]
        assert label(out)["guarantee"] == label(cold)["guarantee"] != "none"
        assert out["meta_info"]["cached_tokens"] <= most


def common(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_one_key_shares_and_another_does_not(server: Server) -> None:
    server.client.flush_cache()
    ids = chats(server, 1, 150)[0]
    assert generate(server, 4, input_ids=ids, extra_key="a")["meta_info"]["cached_tokens"] == 0
    assert generate(server, 4, input_ids=ids, extra_key="a")["meta_info"]["cached_tokens"] >= 128
    assert generate(server, 4, input_ids=ids, extra_key="b")["meta_info"]["cached_tokens"] == 0
    assert generate(server, 4, input_ids=ids)["meta_info"]["cached_tokens"] == 0
    assert generate(server, 4, OFF, input_ids=ids, extra_key="a")["meta_info"]["cached_tokens"] == 0


def test_a_cache_salt_does_not_either(server: Server) -> None:
    server.client.flush_cache()
    body = {"model": "default", "prompt": "A story. " * 40, "temperature": 0, "max_tokens": 2}
    assert post(server, "/v1/completions", {**body, "custom_params": OFF}).ok
    gated = post(server, "/v1/completions", {**body, "cache_salt": OLD_NAME}).json()
    assert gated["margingate"]["guarantee"] != "none"
    assert gated["margingate"]["cached_tokens"] == 0
    assert post(server, "/v1/completions", {**body, "cache_salt": OLD_NAME}).json()["margingate"]["cached_tokens"] > 0


def test_sessions_take_their_prefix_from_the_tree(server: Server) -> None:
    """A plain session repeats its earlier turns as a prompt, so a gated turn after an ungated one is like a cold one."""
    few = demo_prompts(8)
    for prompt in few:
        server.client.flush_cache()
        session = post(server, "/open_session", {"capacity_of_str_len": 10000}).json()
        first = generate(
            server, 120, OFF, text=prompt.text, session_params={"id": session}, return_prompt_token_ids=True
        )
        here = {"id": session, "rid": first["meta_info"]["id"]}
        more = generate(server, 40, text=few[0].text, session_params=here, return_prompt_token_ids=True)
        assert more["meta_info"]["prompt_tokens"] > len(more["prompt_token_ids"]), "the session's first turn is missing"
        server.client.flush_cache()
        ids = [*first["prompt_token_ids"], *first["output_ids"], *more["prompt_token_ids"]]
        cold = generate(server, 40, input_ids=ids[: more["meta_info"]["prompt_tokens"]])
        assert more["output_ids"] == cold["output_ids"]
        assert label(more)["guarantee"] == label(cold)["guarantee"] != "none"
        assert post(server, "/close_session", {"session_id": session}).ok


def test_streaming_sessions_are_refused(server: Server) -> None:
    answer = post(server, "/open_session", {"capacity_of_str_len": 1000, "streaming": True})
    assert answer.status_code == 400
    assert "treaming session" in answer.text


# ---- every answer has a summary -----------------------------------------------------------------------------------


def complete(summary: dict[str, Any]) -> bool:
    """Return whether a summary has a label and says why it has that one."""
    return summary["guarantee"] in LABELS and len(summary["guarantee_note"].split()) >= 3


def test_answers_without_a_token_have_a_summary(server: Server) -> None:
    """Alone, and beside a decode, where SGLang runs one step of a request that was never sampled."""
    text = demo_prompts(1)[0].text
    assert complete(label(generate(server, 0, text=text)))
    with ThreadPoolExecutor(4) as pool:
        beside = pool.submit(generate, server, 200, text=text)
        empty = list(pool.map(lambda _: generate(server, 0, text=text), range(12)))
        assert complete(label(beside.result()))
    assert all(complete(label(out)) for out in empty)
    assert all(out["output_ids"] == [] for out in empty)


def test_every_sample_of_one_prompt_has_a_summary(server: Server) -> None:
    params = {"temperature": 0, "max_new_tokens": 12, "n": 3}
    out = post(server, "/generate", {"text": demo_prompts(1)[0].text, "sampling_params": params}).json()
    assert len(out) == 3
    assert all(label(o)["steps"] == 12 and complete(label(o)) for o in out)


def test_a_stop_string_has_a_summary(server: Server) -> None:
    params = {"temperature": 0, "max_new_tokens": 60, "stop": [" "]}
    out = post(server, "/generate", {"text": demo_prompts(1)[0].text, "sampling_params": params}).json()
    assert out["meta_info"]["finish_reason"]["type"] == "stop"
    assert complete(label(out))


def in_flight(server: Server) -> int:
    """Return how many requests the scheduler runs or has waiting."""
    loads = server.client.get("/v1/loads?include=core")["loads"]
    return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads)


@pytest.mark.parametrize("stream", [False, True])
def test_aborted_requests_have_a_summary(server: Server, stream: bool) -> None:
    """More requests than may run: of those that are aborted some decode and some wait.

    All are with the scheduler before they are aborted: one that is still being tokenized is refused as SGLang refuses it, and
    one that comes later runs.
    """
    count = int(flag_value(server.flags, "--max-running-requests") or 0) + 6
    decoding = threading.Event()

    def ask(i: int) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}
        body = {"text": f"Prompt {i}", "sampling_params": params, "stream": stream or i == 0}
        with requests.post(server.base_url + "/generate", json=body, stream=body["stream"], timeout=300) as answer:
            if not body["stream"]:
                return answer.json()
            last = {}
            for n, line in enumerate(answer.iter_lines()):
                if line.startswith(b"data: {"):
                    last = json.loads(line[6:])
                if n > 40:
                    decoding.set()
            return last

    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, i) for i in range(count)]
        decoding.wait()
        while in_flight(server) < count:
            time.sleep(0.1)
        assert post(server, "/abort_request", {"rid": "", "abort_all": True}).ok
        outs = [a.result() for a in asked]
    assert {o["meta_info"]["finish_reason"]["type"] for o in outs} == {"abort"}
    assert all(complete(label(o)) for o in outs)
    tokens = [o["meta_info"]["completion_tokens"] for o in outs]
    assert 0 in tokens, "nothing waited"
    assert any(tokens), "nothing ran"


# ---- OpenAI answers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(canonical_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=canonical_server.base_url + "/v1", api_key="none", max_retries=0)


CHAT: dict[str, Any] = {
    "model": "default", "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": "Tell me a story."}],
}  # fmt: skip
TEXT: dict[str, Any] = {"model": "default", "temperature": 0, "max_tokens": 12, "prompt": "Tell me a story."}


def test_the_official_client_keeps_the_summary(client: openai.OpenAI) -> None:
    for answer in (client.chat.completions.create(**CHAT), client.completions.create(**TEXT)):
        assert answer.model_extra is not None
        summary = answer.model_extra["margingate"]
        assert complete(summary)
        assert summary["guarantee"] != "none"
        assert summary["steps"] == 12
        assert answer.margingate == summary  # type: ignore[union-attr]
        assert answer.system_fingerprint == summary["system_fingerprint"]
        assert answer.system_fingerprint.startswith("mg-")


def test_several_choices_have_one_summary_each(client: openai.OpenAI) -> None:
    for answer in (client.chat.completions.create(**CHAT, n=2), client.completions.create(**TEXT, n=2)):
        assert answer.model_extra is not None
        assert len(answer.choices) == 2
        assert [s["steps"] for s in answer.model_extra["margingate"]] == [12, 12]


@pytest.mark.parametrize("n", [1, 2])
def test_the_last_chunk_of_a_stream_has_the_summary(client: openai.OpenAI, n: int) -> None:
    more: dict[str, Any] = {"n": n, "stream": True, "stream_options": {"include_usage": True}}
    for stream in (client.chat.completions.create(**CHAT, **more), client.completions.create(**TEXT, **more)):
        chunks = list(stream)
        last = [c for c in chunks if c.choices and c.choices[0].finish_reason is not None]
        assert sorted(c.choices[0].index for c in last) == list(range(n))
        assert all(c.model_extra["margingate"]["steps"] == 12 for c in last)
        assert all(complete(c.model_extra["margingate"]) for c in last)
        assert all(c.system_fingerprint == c.model_extra["margingate"]["system_fingerprint"] for c in last)
        assert not any("margingate" in (c.model_extra or {}) for c in chunks if c not in last)
        assert chunks[-1].usage.completion_tokens == 12 * n


def test_a_request_that_asked_for_nothing_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, extra_body={"custom_params": OFF})
    assert answer.model_extra is not None
    assert answer.model_extra["margingate"]["guarantee"] == "none"


# ---- wrong requests -----------------------------------------------------------------------------------------------

WRONG = {"custom_params": {"margingate_threshold": -1}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "Hi", "sampling_params": WRONG}),
        ("/generate", {"text": ["Hi", "Ho"], "sampling_params": [{"temperature": 0}, WRONG]}),
        ("/generate", {"text": ["Hi", "Ho"], "sampling_params": WRONG}),
        ("/generate", {"input_ids": [[1, 2], [3]], "sampling_params": [{"temperature": 0}, WRONG]}),
        ("/generate", {"text": "Hi", "sampling_params": {**WRONG, "n": 2}}),
        ("/v1/chat/completions", {**CHAT, **WRONG}),
        ("/v1/chat/completions", {**CHAT, **WRONG, "stream": True}),
        ("/v1/completions", {**TEXT, **WRONG}),
        ("/v1/completions", {**TEXT, **WRONG, "stream": True, "n": 2}),
    ],
)
def test_wrong_parameters_are_400_on_every_route(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text
    assert "margingate_threshold" in answer.text


def test_a_native_stream_says_400_in_its_only_event(server: Server) -> None:
    """SGLang has begun its answer when it looks at the parameters of a native stream, so the HTTP status is 200."""
    answer = post(server, "/generate", {"text": "Hi", "sampling_params": WRONG, "stream": True})
    event, done = answer.text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 400
    assert "margingate_threshold" in event
    assert done == "data: [DONE]"


def test_parameters_of_another_type_are_400(server: Server) -> None:
    answer = post(server, "/generate", {"text": "Hi", "sampling_params": {"custom_params": ["margingate_policy"]}})
    assert answer.status_code == 400
    assert "custom_params" in answer.text


@pytest.mark.parametrize("ids", [[-1, 99999999], [[1, 2], [3, 99999999]]])
def test_tokens_that_do_not_exist_are_400(server: Server, ids: Any) -> None:
    """They end stock SGLang's scheduler."""
    for path, body in (("/generate", {"input_ids": ids}), ("/v1/completions", {"model": "default", "prompt": ids})):
        answer = post(server, path, body)
        assert answer.status_code == 400, answer.text
        assert "is not a token of this model" in answer.text
    assert generate(server, 2, text="Hi")["output_ids"]


# ---- changed weights ----------------------------------------------------------------------------------------------


def test_changed_weights_claim_nothing_and_change_the_fingerprint(tmp_path: Path, gate_server: Server) -> None:
    """Not even for a request in flight, and later ones do not read columns of the old weights."""
    flags = ["--margingate-policy", "gate", "--margingate-threshold", "0.0625", "--margingate-trace", "off"]
    text = demo_prompts(1)[0].text * 3
    with serve(flags, log=tmp_path / "server.log") as server, ThreadPoolExecutor(1) as pool:
        generate(server, 8, text=text)
        before = generate(server, 8, text=text)
        assert label(before)["guarantee"] == "gated"
        assert before["meta_info"]["cached_tokens"] > 0
        status = server.client.status()
        assert status["notes"] == []
        other = gate_server.client.status()["fingerprint"]
        assert differing(other["parts"], status["fingerprint"]["parts"]) == [], (
            "another port, another log, one fingerprint"
        )
        fingerprint = status["fingerprint"]["system_fingerprint"]
        assert label(before)["system_fingerprint"] == fingerprint == other["system_fingerprint"]
        assert generate(gate_server, 8, text=text)["output_ids"] == before["output_ids"]

        in_flight = pool.submit(generate, server, 600, text="A long story")
        while not server.client.status()["batch_rows"]["now"]:
            pass
        assert post(server, "/pause_generation", {"mode": "in_place"}).ok
        update = {"model_path": str(model_path()), "flush_cache": False}
        answer = post(server, "/update_weights_from_disk", update)
        assert answer.json()["success"], answer.text
        assert post(server, "/continue_generation", {}).ok

        during, after = in_flight.result(), generate(server, 8, text=text)
        assert after["meta_info"]["cached_tokens"] == 0
        assert after["output_ids"] == before["output_ids"]
        for out in (during, after):
            assert label(out)["guarantee"] == "none"
            assert "an update from disk" in label(out)["guarantee_note"]
        status = server.client.status()
        assert status["model"].endswith("(weights changed since the start)")
        assert status["weight_changes"] == 1
        assert "an update from disk" in status["notes"][0]
        (line,) = differing(other["parts"], status["fingerprint"]["parts"])
        assert line.startswith("changes: nothing, here ['the weights may not be"), "the same bits were loaded"
        assert label(after)["system_fingerprint"] == status["fingerprint"]["system_fingerprint"] != fingerprint


def test_another_setting_has_another_fingerprint(canonical_server: Server, log_server: Server) -> None:
    found = [server.client.status()["fingerprint"] for server in (canonical_server, log_server)]
    lines = differing(*(each["parts"] for each in found))
    assert "margingate.fast_path: canonical, here stock" in lines
    assert not any(line.startswith(("weights", "machine", "versions", "model")) for line in lines), lines
    assert found[0]["system_fingerprint"] != found[1]["system_fingerprint"]
    assert (
        generate(log_server, 2, text="Hi")["meta_info"]["margingate"]["system_fingerprint"]
        == found[1]["system_fingerprint"]
    )
