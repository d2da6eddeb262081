"""Hook functions that run in SGLang's launcher process: attestation, status page, request checks, response summary."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import orjson
from pydantic import BaseModel, create_model

from sglang_margingate.config import ConfigError, MarginGateConfig, Policy, forget_handed_over
from sglang_margingate.gate.request import RequestRules
from sglang_margingate.gate.sampling import check_sampling
from sglang_margingate.machine import versions
from sglang_margingate.serving.answers.summary import FIELD, FINGERPRINT, last_of
from sglang_margingate.serving.hooks import spare_collector
from sglang_margingate.serving.several import schedulers
from sglang_margingate.words import Guarantee

log = logging.getLogger(__name__)

_rules: RequestRules | None = None

UNPLUGGED = (
    "runs without margingate: its plugin did not load. "
    "Check SGLANG_PLUGINS, and that sglang-margingate is installed where the scheduler runs"
)

UNSEEN = "the request ended before it was decoded, so nothing was observed"


class AttestationError(RuntimeError):
    """A scheduler started without margingate in it."""


def before_http_server(
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    *_: Any,
    **__: Any,
) -> None:
    """Refuse to serve unless every scheduler attested its hooks and self-test; add the status page."""
    config = _config()
    if config.policy is not Policy.OFF:
        check_schedulers(server_args.dp_size, server_args.tp_size, scheduler_infos)
    _add_routes(tokenizer_manager, config)
    spare_collector()


def before_killing(parent_pid: int | None, include_parent: bool = True, *_: Any, **__: Any) -> None:
    """Remove the folder that the configuration was handed over in, when this process is about to be killed by itself."""
    if include_parent and parent_pid == os.getpid():
        forget_handed_over()


def check_schedulers(dp_size: int, tp_size: int, scheduler_infos: Sequence[Any]) -> None:
    """Refuse to serve unless every rank of every scheduler attested; watch over several schedulers from then on.

    Raises
    ------
    AttestationError
        Names every one that did not.
    """
    if dp_size == 1:
        check_attested(scheduler_infos)
        return
    found = schedulers.attested()  # SGLang's controller does not pass on what they report
    silent = schedulers.missing(dp_size, tp_size, found)
    if silent:
        raise AttestationError(f"scheduler {', '.join(silent)} of {dp_size} {UNPLUGGED}")
    other = schedulers.different(found)
    if other is not None:
        raise AttestationError(
            f"scheduler {other} of {dp_size} has chosen other sizes, kernels or thresholds than scheduler 0, so an answer would "
            "depend on which of them gives it. Use GPUs of one kind, and remove the kept maps (--margingate-map-dir)"
        )
    schedulers.watch(found)


def check_attested(scheduler_infos: Sequence[Any]) -> None:
    """Refuse to serve unless every rank reported that its plugin is in place.

    Raises
    ------
    AttestationError
        Names every rank that did not.
    """
    silent = [str(i) for i, info in enumerate(scheduler_infos) if not _attests(info)]
    if silent or not scheduler_infos:
        ranks = f"rank {', '.join(silent)} of {len(scheduler_infos)}" if silent else "no rank reported, so the server"
        raise AttestationError(f"{ranks} {UNPLUGGED}")


def _attests(info: Any) -> bool:
    return isinstance(info, Mapping) and isinstance(info.get("margingate"), Mapping)


@lru_cache
def _config() -> MarginGateConfig:
    config = MarginGateConfig.from_env()
    if config is None:
        raise AttestationError(
            "the configuration is gone from the environment; start with sglang_margingate.launch_server"
        )
    return config


def _add_routes(tokenizer_manager: Any, config: MarginGateConfig) -> None:
    from sglang.srt.entrypoints.http_server import app

    async def status() -> dict[str, Any]:
        """Policy, thresholds, self-test, counters and versions of the running gate."""
        states = [] if config.policy is Policy.OFF else await tokenizer_manager.get_internal_state()
        found = sorted((s["margingate"] for s in states if "margingate" in s), key=lambda s: s["scheduler"]["dp_rank"])
        head: dict[str, Any] = schedulers.merged(found) if found else {"policy": config.policy.value}
        return {**head, "versions": versions()}

    app.add_api_route("/margingate/status", status, methods=["GET"])


def validate_request(manager: Any, obj: Any, input_ids: Any) -> None:
    """Check one request before it reaches a batch; SGLang answers a ValueError with HTTP 400."""
    global _rules
    config = _config()
    if _rules is None:
        _rules = RequestRules(config)
    params = getattr(obj, "sampling_params", None)
    # What SGLang makes of them: a server's preferred parameters hold where a request says nothing.
    merged = {**(manager.preferred_sampling_params or {}), **(params if isinstance(params, dict) else {})}
    custom = merged.get("custom_params")
    if custom is not None and not isinstance(custom, dict):
        raise ConfigError(f"custom_params: {custom!r:.80} is not an object of names and values")
    _rules.parse(custom)
    check_sampling(merged)
    if config.policy is not Policy.OFF and getattr(obj, "input_ids", None):
        check_tokens(input_ids, manager.model_config.vocab_size)


def check_tokens(input_ids: Any, vocab_size: int) -> None:
    """Refuse token ids that the model does not have: SGLang's scheduler would end, and every request with it."""
    wrong = next((t for t in (min(input_ids), max(input_ids)) if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise ConfigError(f"input_ids: {wrong} is not a token of this model; give ids from 0 to {vocab_size - 1}")


def unpack_summary(original: Any, manager: Any, obj: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """Turn ``meta_info.margingate`` from SGLang's list per token into the request's one summary.

    What belongs to the request is looked up now and not when the first message is awaited: a batch makes all its waiters
    before it awaits one, and a request that has ended by then is no longer listed.
    """
    gathered = manager.rid_to_state[obj.rid].customized_info_accumulated
    return _unpacked(original(manager, obj, *args, **kwargs), gathered)


async def _unpacked(outputs: AsyncGenerator[Any, None], gathered: Mapping[str, Any]) -> AsyncIterator[Any]:
    """Put the summary into the last message; until then streamed chunks carry no such field.

    The list is read where SGLang gathers it: what a chunk shows of it may be cut by the number of tokens shown before.
    """
    async with aclosing(outputs):
        async for out in outputs:
            meta = out.get("meta_info") if isinstance(out, dict) else None
            if meta is not None:
                meta.pop(FIELD, None)
                if meta.get("finish_reason") is not None and "embedding" not in out:
                    summary = last_of(gathered.get(FIELD, ())) or _unseen()
                    if summary is not None:
                        meta[FIELD] = summary
            yield out


def _unseen() -> dict[str, Any] | None:
    """Return the summary of a request that ended where nobody watched, such as in the queue."""
    if _config().policy is Policy.OFF:
        return None
    return {"guarantee": Guarantee.NONE.value, "guarantee_note": UNSEEN}


DATA, FINISHED = "data: ", '"finish_reason":"'
"""How a chunk begins, and what only a choice's last one holds: inside a JSON text the quotes would be escaped."""


class _View:
    """An object of SGLang's with some attributes replaced, for the length of one request."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        vars(self).update(_target=target, **replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_target"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_target"], name, value)


@lru_cache
def _with_field(model: type[BaseModel]) -> type[BaseModel]:
    fields = {FIELD: (Any, ...), FINGERPRINT: (str | None, None)}
    return create_model(model.__name__, __base__=model, **fields)  # type: ignore[call-overload]


def add_summaries(response: Any, _serving: Any, _request: Any, answers: list[dict[str, Any]], _created: int) -> Any:
    """Add the field to a response; called after SGLang has built one of its answers."""
    summaries = [answer["meta_info"].get(FIELD) for answer in answers]
    if not isinstance(response, BaseModel) or not any(summaries):
        return response  # an error, or a server without a gate
    values: dict[str, Any] = {**dict(response), FIELD: summaries[0] if len(summaries) == 1 else summaries}
    values[FINGERPRINT] = fingerprint_of(summaries)
    return _with_field(type(response)).model_construct(**values)


def fingerprint_of(summaries: Sequence[dict[str, Any] | None]) -> str | None:
    """Return OpenAI's ``system_fingerprint`` of an answer: its choices', or None where none was seen to its end."""
    return next((s[FINGERPRINT] for s in summaries if s and s.get(FINGERPRINT)), None)


async def add_to_stream(
    original: Any, serving: Any, adapted: Any, request: Any, raw_request: Any
) -> AsyncIterator[str]:
    """Add the field to the last chunk of every choice; called around SGLang's generator of a stream."""
    summaries: dict[int, Any] = {}
    manager = serving.tokenizer_manager

    async def generate_request(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with aclosing(manager.generate_request(*args, **kwargs)) as contents:
            async for content in contents:
                summary = content["meta_info"].get(FIELD)
                if summary is not None:
                    summaries[content.get("index", 0)] = summary
                yield content

    view = _View(serving, tokenizer_manager=_View(manager, generate_request=generate_request))
    async with aclosing(original(view, adapted, request, raw_request)) as chunks:
        async for chunk in chunks:
            yield _with_summary(chunk, summaries) if summaries and FINISHED in chunk else chunk


def _with_summary(chunk: str, summaries: dict[int, Any]) -> str:
    data = orjson.loads(chunk.removeprefix(DATA))
    found = [summaries.get(choice["index"]) for choice in data["choices"] if choice["finish_reason"] is not None]
    if not any(found):
        return chunk
    data[FIELD] = found[0] if len(found) == 1 else found
    data[FINGERPRINT] = fingerprint_of(found)
    return f"{DATA}{orjson.dumps(data).decode()}\n\n"
