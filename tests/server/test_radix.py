"""Prefix hits, eviction and retraction never change the output; stock's cache does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_request import run_as_one

from sglang_margingate.bench.evidence.prefix import run_cold, talk
from sglang_margingate.bench.prompts.embedded import shared_prompts
from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server, serve


def same(a: list[Completion], b: list[Completion]) -> list[bool]:
    return [x.same_as(y) for x, y in zip(a, b)]


def hits(runs: list[Completion]) -> int:
    return sum(r.meta["cached_tokens"] for r in runs)


def test_prefix_hits_keep_every_sequence(gate_server: Server) -> None:
    client, prompts = gate_server.client, shared_prompts(50)[::2][5:]  # groups that share 30% to 90%
    cold = run_cold(client, prompts, max_new_tokens=40)
    client.flush_cache()
    partly = run_alone(client, prompts, max_new_tokens=40)
    warm = run_together(client, prompts, 16, max_new_tokens=40)
    assert hits(cold) == 0
    assert 0 < hits(partly) < hits(warm)
    assert all(r.meta["cached_tokens"] % 64 == 0 for r in (*partly, *warm))
    assert all(same(cold, partly))
    assert all(same(cold, warm))
    assert {r.margingate["guarantee"] for r in warm} == {"gated"}
    assert any(r.margingate["floored_tokens"] > 0 for r in partly)


def test_stock_cache_fails_the_same_test(tmp_path: Path) -> None:
    """Conversations, because stock's tree shares generated columns: decode-shaped, where a cold prompt is prefill-shaped."""
    messages = ["Tell me a story about a lighthouse.", "And one about a fox.", "A short one.", "One more, please."]
    flags = ["--margingate-policy", "gate", "--margingate-threshold", "0.0625", "--margingate-radix", "stock",
             "--margingate-trace", "off"]  # fmt: skip
    with serve(flags, log=tmp_path / "server.log") as server:
        for i in range(4):
            warm, cold = (talk(server.client, i, messages[i:] + messages[:i], 96, cold=cold) for cold in (False, True))
            if not all(same(cold, warm)):
                break  # one conversation is enough
    assert hits(warm) > 0
    assert not all(same(cold, warm))
    assert {r.margingate["guarantee"] for r in warm} == {"none"}
    assert "stock" in warm[0].margingate["guarantee_note"]


def test_a_conversation_through_the_cache_equals_the_cold_one(gate_server: Server) -> None:
    messages = ["Tell me a story about a lighthouse.", "And one about a fox.", "A short one.", "One more, please."]
    warm = talk(gate_server.client, 0, messages, 48, cold=False)
    cold = talk(gate_server.client, 0, messages, 48, cold=True)
    assert hits(warm[1:]) > 0
    assert hits(cold) == 0
    assert all(same(warm, cold))


def test_ungated_requests_never_feed_gated_ones(gate_server: Server) -> None:
    """The same prompt cached by a request without a gate must not be found by one with it."""
    client, prompt = gate_server.client, shared_prompts(1)[0]
    client.flush_cache()
    off = {"margingate_policy": "off"}
    client.generate(prompt, max_new_tokens=8, custom=off)
    again = client.generate(prompt, max_new_tokens=8, custom=off)
    gated = client.generate(prompt, max_new_tokens=8)
    assert again.meta["cached_tokens"] > 0
    assert gated.meta["cached_tokens"] == 0


def test_retracted_requests_continue_with_the_same_tokens(
    gate_server: Server, prompts: list[Prompt], tmp_path: Path
) -> None:
    """A pool too small for the batch forces SGLang to retract and re-prefill in the middle of decoding."""
    few = prompts[2::3]
    options: dict[str, Any] = {"max_new_tokens": 160, "sampling": {"ignore_eos": True}}
    alone = run_alone(gate_server.client, few, **options)
    flags = ["--margingate-policy", "gate", "--margingate-threshold", "0.0625", "--max-total-tokens", "900",
             "--schedule-conservativeness", "0.01", "--margingate-trace", "off"]  # fmt: skip
    with serve(flags, log=tmp_path / "server.log") as small:
        tight = run_as_one(small.client, few, **options)
        assert small.alive()
    assert sum(t.margingate["retractions"] for t in tight) > 0, "nothing was retracted, so the test proves nothing"
    assert all(same(alone, tight))
