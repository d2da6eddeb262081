"""Hook functions that put a request's summary into OpenAI answers: field ``margingate`` of a response or of a chunk.

A response carries as many summaries as it has choices: with one choice the object, with more a list in their order. In a
stream every choice has its own last chunk (the one with a ``finish_reason``), which carries that choice's object. The
official client keeps the field: ``response.margingate``, or ``response.model_extra["margingate"]``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import orjson
from pydantic import BaseModel, create_model

from sglang_margingate.runtime.summary import FIELD

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
    return create_model(model.__name__, __base__=model, **{FIELD: (Any, ...)})  # type: ignore[call-overload]


def add_summaries(response: Any, _serving: Any, _request: Any, answers: list[dict[str, Any]], _created: int) -> Any:
    """Add the field to a response; called after SGLang has built one of its answers."""
    summaries = [answer["meta_info"].get(FIELD) for answer in answers]
    if not isinstance(response, BaseModel) or not any(summaries):
        return response  # an error, or a server without a gate
    values: dict[str, Any] = {**dict(response), FIELD: summaries[0] if len(summaries) == 1 else summaries}
    return _with_field(type(response)).model_construct(**values)


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
    return f"{DATA}{orjson.dumps(data).decode()}\n\n"
