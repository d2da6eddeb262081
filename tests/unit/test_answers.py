"""How a summary travels from the scheduler into answers, and what is refused at the front door."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from sglang_margingate.config import CONFIG_ENV, ConfigError, MarginGateConfig, Policy
from sglang_margingate.serving import launcher_hooks as launcher
from sglang_margingate.serving.answers.summary import PerRequest, last_of

SUMMARY = {"guarantee": "gated", "steps": 3, "system_fingerprint": "mg-1"}

needs_pydantic = pytest.mark.skipif(importlib.util.find_spec("orjson") is None, reason="SGLang is not installed")


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the launcher see a gated server."""

    def start(policy: Policy = Policy.GATE) -> None:
        path = tmp_path / "config.json"
        path.write_text(MarginGateConfig(policy=policy).to_json())
        monkeypatch.setenv(CONFIG_ENV, str(path))
        monkeypatch.setattr(launcher, "_rules", None)
        launcher._config.cache_clear()

    yield start
    launcher._config.cache_clear()


@pytest.mark.parametrize(("sent", "shown"), [(0, 0), (0, 5), (4, 5), (5, 5), (5, 3)])
def test_the_last_message_holds_the_summary_whatever_slice_it_sends(sent: int, shown: int) -> None:
    part = PerRequest([SUMMARY])[sent:shown]
    assert part == [SUMMARY]
    assert type(part) is list, "it travels pickled, to processes without margingate"


def test_the_newest_summary_counts() -> None:
    assert last_of([]) is None
    assert last_of([None, None]) is None
    assert last_of([None, {"steps": 1}, SUMMARY, None]) == SUMMARY


def unpacked(gathered: list[Any], *outputs: Any) -> list[Any]:
    async def original(_manager: Any, _obj: Any) -> AsyncIterator[Any]:
        for out in outputs:
            yield out

    async def collect() -> list[Any]:
        states = {"r": SimpleNamespace(customized_info_accumulated={"margingate": gathered})}
        manager, obj = SimpleNamespace(rid_to_state=states), SimpleNamespace(rid="r")
        return [out async for out in launcher.unpack_summary(original, manager, obj)]

    return asyncio.run(collect())


def message(finish: Any, *values: Any) -> dict[str, Any]:
    return {"meta_info": {"finish_reason": finish, "margingate": list(values)}}


def test_only_the_last_message_shows_the_summary(gate: Any) -> None:
    gate()
    running, done = unpacked([None, SUMMARY], message(None, None), message({"type": "stop"}, None, SUMMARY))
    assert "margingate" not in running["meta_info"]
    assert done["meta_info"]["margingate"] == SUMMARY


def test_a_waiter_that_is_awaited_late_still_finds_its_request(gate: Any) -> None:
    """SGLang makes all waiters of a batch before it awaits one; a request that has ended is listed no more by then."""
    gate()
    states = {"r": SimpleNamespace(customized_info_accumulated={"margingate": [SUMMARY]})}
    looked_up: list[Any] = []

    def original(manager: Any, obj: Any) -> Any:
        looked_up.append(manager.rid_to_state[obj.rid])

        async def outputs() -> AsyncIterator[Any]:
            yield message({"type": "length"}, SUMMARY)

        return outputs()

    async def collect() -> list[Any]:
        waiter = launcher.unpack_summary(original, SimpleNamespace(rid_to_state=states), SimpleNamespace(rid="r"))
        assert looked_up, "SGLang's own look-up waited for the first await"
        del states["r"]
        return [out async for out in waiter]

    [done] = asyncio.run(collect())
    assert done["meta_info"]["margingate"] == SUMMARY


def test_a_chunk_cut_by_its_offset_still_shows_the_summary(gate: Any) -> None:
    """With incremental streaming SGLang cuts the list at the number of tokens shown, where it may be shorter."""
    gate()
    [done] = unpacked([SUMMARY], message({"type": "stop"}))
    assert done["meta_info"]["margingate"] == SUMMARY


def test_an_answer_from_the_queue_says_why_it_claims_nothing(gate: Any) -> None:
    gate()
    [done] = unpacked([], {"meta_info": {"finish_reason": {"type": "abort"}}})
    assert done["meta_info"]["margingate"] == {"guarantee": "none", "guarantee_note": launcher.UNSEEN}
    gate(Policy.OFF)
    [done] = unpacked([], {"meta_info": {"finish_reason": {"type": "abort"}}})
    assert "margingate" not in done["meta_info"]


@pytest.mark.parametrize(
    ("infos", "says"),
    [
        ([{"margingate": {}}, {}], "rank 1 of 2"),
        ([{}, {"margingate": {}}, {"margingate": None}, None], "rank 0, 2, 3 of 4"),
        ([], "no rank reported"),
    ],
)
def test_a_rank_without_the_plugin_is_named(infos: list[Any], says: str) -> None:
    with pytest.raises(launcher.AttestationError, match=says):
        launcher.check_attested(infos)
    launcher.check_attested([{"margingate": {}}])


def validate(params: Any, input_ids: Any = None, preferred: Any = None) -> None:
    manager = SimpleNamespace(preferred_sampling_params=preferred, model_config=SimpleNamespace(vocab_size=100))
    launcher.validate_request(manager, SimpleNamespace(sampling_params=params, input_ids=input_ids), input_ids)


def test_wrong_requests_are_refused_at_the_door(gate: Any) -> None:
    gate()
    validate({"custom_params": {"margingate_policy": "off"}}, [0, 99])
    validate(None)
    with pytest.raises(ConfigError, match="custom_params: 'gate' is not an object"):
        validate({"custom_params": "gate"})
    with pytest.raises(ConfigError, match="margingate_policy"):
        validate({}, preferred={"custom_params": {"margingate_policy": "perhaps"}})
    for wrong in (-1, 100, 99999999):
        with pytest.raises(
            ConfigError, match=f"input_ids: {wrong} is not a token of this model; give ids from 0 to 99"
        ):
            validate({}, [1, wrong, 2])
    gate(Policy.OFF)
    validate({}, [-1])  # stock SGLang is left as it is


class Response(BaseModel):
    """A stand-in for SGLang's answers, which refuse fields that they do not know."""

    id: str
    choices: list[int] = []


@needs_pydantic
def test_a_response_carries_one_summary_a_choice() -> None:
    from sglang_margingate.serving.launcher_hooks import add_summaries

    def answer(*summaries: Any) -> dict[str, Any]:
        ret = [{"meta_info": {} if s is None else {"margingate": s}} for s in summaries]
        out = add_summaries(Response(id="x", choices=[1]), None, None, ret, 0)
        assert isinstance(out, Response)
        return json.loads(out.model_dump_json())

    assert answer(SUMMARY) == {"id": "x", "choices": [1], "margingate": SUMMARY, "system_fingerprint": "mg-1"}
    two = answer({"steps": 1}, SUMMARY)
    assert two["margingate"] == [{"steps": 1}, SUMMARY]
    assert two["system_fingerprint"] == "mg-1", "of a choice that was seen to its end"
    assert answer({"steps": 1})["system_fingerprint"] is None
    assert "margingate" not in answer(None)
    error = object()
    assert add_summaries(error, None, None, [{"meta_info": {"margingate": SUMMARY}}], 0) is error


@needs_pydantic
def test_a_stream_carries_the_summary_in_each_choices_last_chunk() -> None:
    from sglang_margingate.serving.launcher_hooks import add_to_stream

    def sse(index: int, text: str, finish: str | None) -> str:
        choice = {"index": index, "text": text, "finish_reason": finish}
        return f"data: {json.dumps({'id': 'x', 'choices': [choice]}, separators=(',', ':'))}\n\n"

    tricky = '"finish_reason":"stop"'
    contents = [
        {"index": 0, "meta_info": {}},
        {"index": 1, "meta_info": {"margingate": {"steps": 1}}},
        {"index": 0, "meta_info": {"margingate": SUMMARY}},
    ]

    class Serving:
        class Manager:
            async def generate_request(self, *_: Any) -> AsyncIterator[Any]:
                for content in contents:
                    yield content

        tokenizer_manager = Manager()
        seen = 0

        async def stream(self, adapted: Any, request: Any, raw: Any) -> AsyncIterator[str]:
            async for content in self.tokenizer_manager.generate_request(adapted, raw):
                self.seen += 1
                yield sse(content["index"], tricky, None)
            for index in (0, 1):
                yield sse(index, tricky, "stop")
            yield "data: [DONE]\n\n"

    serving = Serving()

    async def collect() -> list[str]:
        return [chunk async for chunk in add_to_stream(Serving.stream, serving, None, None, None)]

    *running, first, second, done = asyncio.run(collect())
    assert serving.seen == 3, "what SGLang sets on its own object stays there"
    assert running == [sse(i, tricky, None) for i in (0, 1, 0)]
    assert json.loads(first[6:])["margingate"] == SUMMARY
    assert json.loads(second[6:])["margingate"] == {"steps": 1}
    assert json.loads(first[6:])["system_fingerprint"] == "mg-1"
    assert json.loads(first[6:])["choices"][0]["text"] == tricky
    assert first.endswith("\n\n")
    assert done == "data: [DONE]\n\n"


@pytest.mark.parametrize("success", [True, False])
def test_changed_weights_lower_the_guarantee(monkeypatch: pytest.MonkeyPatch, success: bool) -> None:
    pytest.importorskip("sglang_margingate.serving.scheduler_hooks")
    from sglang_margingate.serving import scheduler_hooks

    lowered: list[str] = []
    readable: list[bool] = []

    def changed(reason: str, whether: bool = True) -> None:
        lowered.append(reason)
        readable.append(whether)

    runtime = SimpleNamespace(weights_changed=changed)
    monkeypatch.setattr(scheduler_hooks, "_runtime", runtime)
    result = SimpleNamespace(success=success)
    scheduler_hooks.after_update(result, None, type("UpdateWeightFromDiskReqInput", (), {})())
    assert "an update from disk" in lowered[0]
    assert ("failed" in lowered[0]) is not success
    scheduler_hooks.after_adapter(result, None, SimpleNamespace(lora_name="poet"))
    assert len(lowered) == 1 + success
    scheduler_hooks.after_update(SimpleNamespace(), None, type("ReleaseMemoryOccupationReqInput", (), {})())
    assert "a release of memory" in lowered[-1]
    assert readable == [*[True] * (1 + success), False], "given back, weights cannot be read"
