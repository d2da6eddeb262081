"""Asks what a truth plan says: many requests at once, then every repeatable one again alone.

Its own small asynchronous client, as the sweep needs what no other command does: streams cut in the middle, aborts by id,
both APIs, answers of any status.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from sglang_margingate.bench.evidence.truth_plan import NATIVE, Case, Chain
from sglang_margingate.bench.servers.client import brief

IDLE_SECONDS = 60.0
POLL_SECONDS = 0.02


class SweepError(RuntimeError):
    """The sweep cannot go on; one line."""


@dataclass(frozen=True)
class Reply:
    """One answer to a case, of ``n``."""

    tokens: tuple[int, ...]
    """Empty for the OpenAI API, which gives none: texts are compared there."""
    text: str
    finish: str
    summary: dict[str, Any] | None
    """What the server says of the answer; None: nothing."""

    @property
    def identity(self) -> tuple[object, str]:
        """What must be equal."""
        return (self.tokens or self.text, self.finish)


@dataclass
class Answer:
    """What came back for one case."""

    case: Case
    sent: dict[str, Any]
    """The body as it was sent, follow-ups filled in."""
    status: int = 0
    """HTTP status; 0 where the client went away by itself."""
    replies: list[Reply] = field(default_factory=list)
    error: str = ""


def native_reply(out: dict[str, Any]) -> Reply:
    """Return the reply in one JSON answer of ``/generate``."""
    meta = out["meta_info"]
    reason = meta["finish_reason"]
    kind = reason["type"] if isinstance(reason, dict) else str(reason)
    return Reply(tuple(out.get("output_ids") or ()), out.get("text") or "", kind, meta.get("margingate"))


def openai_replies(out: dict[str, Any]) -> list[Reply]:
    """Return the replies in one JSON answer of the OpenAI API: one summary for each choice, a lone one as it is."""
    summaries = out.get("margingate")
    each = summaries if isinstance(summaries, list) else [summaries] * len(out["choices"])
    found = []
    for choice, summary in zip(out["choices"], each):
        message = choice.get("message") or {}
        text = message.get("content") if message else choice.get("text")
        found.append(Reply((), text or "", str(choice["finish_reason"]), summary))
    return found


def alone(body: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the body of a request's run alone: one answer, whole, under no id of its own."""
    out = {k: v for k, v in body.items() if k not in ("rid", "stream", "n")}
    if path == NATIVE:
        out["sampling_params"] = {k: v for k, v in body["sampling_params"].items() if k != "n"}
    return out


class Asker:
    """Talks to one server.

    Parameters
    ----------
    base_url
        The server's.
    http
        httpx's client.
    """

    def __init__(self, base_url: str, http: httpx.AsyncClient) -> None:
        self.base_url, self._http = base_url.rstrip("/"), http

    async def status(self) -> dict[str, Any]:
        """Return ``GET /margingate/status``."""
        try:
            answer = await self._http.get(self.base_url + "/margingate/status")
        except httpx.HTTPError as error:
            raise SweepError(f"GET {self.base_url}/margingate/status: {brief(error)}") from None
        if answer.status_code != 200:
            raise SweepError(
                f"{self.base_url}/margingate/status: HTTP {answer.status_code}; is this a margingate server?"
            )
        return answer.json()

    async def steps_by_rows(self) -> Counter[int]:
        """Return the server's count of decode steps by the rows of their batch."""
        rows = (await self.status())["batch_rows"]["steps_by_rows"]
        return Counter({int(k): v for k, v in rows.items()})

    async def flush(self) -> None:
        """Empty the prefix cache, which SGLang refuses while anything runs: afterwards the server is idle, too."""
        end = time.monotonic() + IDLE_SECONDS
        while True:
            answer = await self._http.post(self.base_url + "/flush_cache")
            if answer.status_code == 200:
                return
            if time.monotonic() > end:
                raise SweepError(f"/flush_cache was refused for {IDLE_SECONDS:.0f} s: {answer.text[:200]}")
            await asyncio.sleep(POLL_SECONDS)

    async def ask(self, case: Case, body: dict[str, Any]) -> Answer:
        """Send one request; its answer, its error, or the point where the client left."""
        out = Answer(case, body)
        try:
            async with self._http.stream("POST", self.base_url + case.path, json=body) as answer:
                out.status = answer.status_code
                if answer.status_code == 200 and body.get("stream"):
                    await self._stream(case, body, answer, out)
                    return out
                await answer.aread()
            if answer.status_code != 200:
                out.error = " ".join(answer.text.split())[:300]
            elif case.path == NATIVE:
                found = answer.json()
                out.replies = [native_reply(part) for part in (found if isinstance(found, list) else [found])]
            else:
                out.replies = openai_replies(answer.json())
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            out.status, out.error = -1, f"{type(error).__name__}: {error}"[:300]
        return out

    async def _stream(self, case: Case, body: dict[str, Any], answer: httpx.Response, out: Answer) -> None:
        last, chunks = "", 0
        async for line in answer.aiter_lines():
            if not line.startswith("data:") or "[DONE]" in line:
                continue
            last, chunks = line, chunks + 1
            if case.action and chunks == case.cut:
                if case.action == "disconnect":
                    out.status = 0
                    return  # leaving the stream closes its connection
                await self._http.post(self.base_url + "/abort_request", json={"rid": body["rid"]})
        found = json.loads(last[5:])
        if "error" in found:
            out.error = str(found["error"])[:300]
        else:
            out.replies = [native_reply(found)]


@asynccontextmanager
async def asker(base_url: str) -> AsyncIterator[Asker]:
    """Give an :class:`Asker` with a connection for every request in flight."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=600, limits=limits) as http:
        yield Asker(base_url, http)


async def run_chains(
    to: Asker, chains: Sequence[Chain], concurrency: int, done: Callable[[], None] = lambda: None
) -> list[Answer]:
    """Run the chains with ``concurrency`` of them in flight; return all answers in the order of the plan."""
    waiting = iter(list(enumerate(chains)))
    found: dict[int, list[Answer]] = {}

    async def chain(cases: Chain) -> list[Answer]:
        if cases.at_once:
            return list(await asyncio.gather(*(to.ask(c, c.body) for c in cases.cases)))
        answers: list[Answer] = []
        for case in cases.cases:
            body = case.body
            if case.follows:
                before = answers[-1]
                said = before.replies[0].tokens if before.replies else ()
                body = body | {"input_ids": [*before.sent["input_ids"], *said, *body["input_ids"]]}
            answers.append(await to.ask(case, body))
            done()
        return answers

    async def worker() -> None:
        for number, cases in waiting:
            found[number] = await chain(cases)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return [answer for number in sorted(found) for answer in found[number]]


async def run_alone(to: Asker, answers: Sequence[Answer], done: Callable[[], None] = lambda: None) -> dict[str, Reply]:
    """Ask every repeatable request that was answered once more on an idle server with an empty cache; return by :func:`key`."""
    out: dict[str, Reply] = {}
    for answer in answers:
        name = key(answer)
        if not answer.case.repeatable or not answer.replies or name in out:
            continue
        await to.flush()
        again = await to.ask(answer.case, alone(answer.sent, answer.case.path))
        if not again.replies:
            raise SweepError(f"request {answer.case.id}, alone: HTTP {again.status}: {again.error}")
        out[name] = again.replies[0]
        done()
    return out


def key(answer: Answer) -> str:
    """Return what makes two answers' runs alone the same request."""
    return answer.case.path + json.dumps(alone(answer.sent, answer.case.path), sort_keys=True)
