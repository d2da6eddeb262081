"""Chaotic sequences beside neighbours that disturb: one that scores a long prompt, one that is retracted."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

SEQUENCES, SIZES = 24, (2, 8, 33)


@dataclass(frozen=True)
class Shape:
    """Lengths in tokens."""

    vocab: int
    lengths: tuple[int, int] = (60, 240)
    new: int = 64
    scored: int = 1500
    """Prompt of the scoring neighbour."""
    pool: int = 24_000
    """The server's K/V slots: what is left of them decides when a neighbour is retracted."""


class Chaos:
    """Asks one server.

    Parameters
    ----------
    url
        The server's.
    shape
        Lengths.
    gated
        Whether its policy is a gate.
    """

    def __init__(self, url: str, shape: Shape, gated: bool = True) -> None:
        self.url, self.shape, self.gated = url, shape, gated

    def ids(self, seed: int, length: int) -> list[int]:
        """Return a prompt of its own."""
        return random.Random(seed).choices(range(2, self.shape.vocab), k=length)

    def sequence(self, k: int) -> list[int]:
        """Return the k-th of the sequences that are compared."""
        least, most = self.shape.lengths
        return self.ids(k, least + (most - least) * k // (SEQUENCES - 1))

    async def run(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Return what each test found."""
        async with self._http() as http:
            alone = []
            for k in range(SEQUENCES):
                await self._flush(http)
                alone.append(await self._ask(http, self.sequence(k), self.shape.new))
            say(f"{SEQUENCES} sequences alone")
            scoring = {str(size): await self._scoring(http, size, alone) for size in SIZES}
            say("beside a scoring neighbour: " + ", ".join(f"{s}: {f['same']}/{f['of']}" for s, f in scoring.items()))
            if not self.gated:
                return {"scoring": scoring}
            retracted = await self._retracted(http)
            say(f"beside a retracted neighbour: {retracted['same']}/{retracted['of']}")
        return {"scoring": scoring, "retracted": retracted}

    async def lone(self, name: str, count: int, new: int) -> None:
        """Ask some requests one after another, with ids that begin with ``name``."""
        async with self._http() as http:
            for k in range(-1, count):  # the first one warms up
                rid = f"{name}-{k}" if k >= 0 else "warm-up"
                await self._ask(http, self.ids(9000 + k, self.shape.lengths[0]), new, rid=rid)

    async def labels(self, count: int) -> list[str]:
        """Return the labels of a few requests that run together."""
        async with self._http() as http:
            jobs = [self._ask(http, self.ids(7000 + k, 40), 24) for k in range(count)]
            return [label(out) for out in await asyncio.gather(*jobs)]

    async def _scoring(self, http: httpx.AsyncClient, size: int, alone: list[dict[str, Any]]) -> dict[str, Any]:
        """Run the sequences in batches of ``size``, fillers making it up, each beside a neighbour that scores."""
        group = min(size, SEQUENCES)
        outs = []
        for at in range(0, SEQUENCES, group):
            await self._flush(http)
            mine = [self.sequence(k) for k in range(at, min(at + group, SEQUENCES))]
            fill = [self.ids(5000 + k, self.shape.lengths[0] + 9 * k) for k in range(size - len(mine))]
            scored = {"return_logprob": True, "logprob_start_len": 0}
            jobs = [self._ask(http, self.ids(6000 + at, self.shape.scored), 1, **scored)]
            jobs += [self._ask(http, prompt, self.shape.new) for prompt in [*mine, *fill]]
            outs += (await asyncio.gather(*jobs))[1 : 1 + len(mine)]
        return compared(alone, outs)

    async def _retracted(self, http: httpx.AsyncClient) -> dict[str, Any]:
        """Eight sequences decode; one long neighbour takes nearly all that is left of the pool and is retracted."""
        new = 2 * self.shape.new
        alone = []
        for k in range(8):
            await self._flush(http)
            alone.append(await self._ask(http, self.sequence(k), new))
        await self._flush(http)
        started = [asyncio.Event() for _ in range(8)]
        jobs = [asyncio.create_task(self._stream(http, self.sequence(k), new, started[k])) for k in range(8)]
        for event in started:
            await event.wait()
        taken = sum(len(self.sequence(k)) for k in range(8))
        # Eight rows and the neighbour then take nine slots a step: it is retracted before the sequences end.
        left = 6 * new
        neighbour = await self._ask(http, self.ids(8000, self.shape.pool - taken - left), new)
        found = compared(alone, list(await asyncio.gather(*jobs)))
        found["neighbour_retractions"] = int((summary(neighbour) or {}).get("retractions", 0))
        return found

    # ---- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(timeout=300, limits=limits) as http:
            yield http

    def _body(self, ids: list[int], new: int, **more: Any) -> dict[str, Any]:
        params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": params, **more}

    async def _ask(self, http: httpx.AsyncClient, ids: list[int], new: int, **more: Any) -> dict[str, Any]:
        answer = await http.post(self.url + "/generate", json=self._body(ids, new, **more))
        answer.raise_for_status()
        return answer.json()

    async def _stream(
        self, http: httpx.AsyncClient, ids: list[int], new: int, started: asyncio.Event
    ) -> dict[str, Any]:
        last = ""
        body = self._body(ids, new, stream=True)
        try:
            async with http.stream("POST", self.url + "/generate", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and "[DONE]" not in line:
                        last = line
                        started.set()
        finally:
            started.set()  # an error is raised where the answer is awaited
        return json.loads(last[5:])

    async def _flush(self, http: httpx.AsyncClient) -> None:
        for _ in range(600):
            if (await http.post(self.url + "/flush_cache")).status_code == 200:
                return
            await asyncio.sleep(0.05)
        raise RuntimeError("the server did not become idle in 30 s")


def summary(out: dict[str, Any]) -> dict[str, Any] | None:
    """Return what the server says of an answer."""
    return out["meta_info"].get("margingate")


def label(out: dict[str, Any]) -> str:
    """Return an answer's label."""
    return str((summary(out) or {}).get("guarantee", "no summary"))


def compared(alone: list[dict[str, Any]], outs: list[dict[str, Any]]) -> dict[str, Any]:
    """Count sequences with the same tokens, the labels, and the largest batch that the server says they were in."""
    pairs = list(zip(alone, outs, strict=True))
    first = [
        next((i for i, (x, y) in enumerate(zip(a["output_ids"], b["output_ids"])) if x != y), None) for a, b in pairs
    ]
    return {
        "same": sum(a["output_ids"] == b["output_ids"] for a, b in pairs),
        "of": len(pairs),
        "first_differences": [at for at in first if at is not None],
        "labels": sorted({label(b) for b in outs}),
        "distinct_tokens": len({token for a in alone for token in a["output_ids"]}),
        "largest_batch": max((summary(b) or {}).get("max_batch_rows", 0) for b in outs),
        "retractions": sum((summary(b) or {}).get("retractions", 0) for b in outs),
    }


def claims(found: dict[str, Any], name: str) -> list[str]:
    """Return why a comparison does not hold: all the same, all structural, and the text chaotic."""
    out = []
    if found["same"] != found["of"]:
        out.append(
            f"{name}: {found['same']}/{found['of']} identical, first differing at {found['first_differences'][:5]}"
        )
    if found["labels"] != ["structural"]:
        out.append(f"{name}: labels {found['labels']}")
    if found["distinct_tokens"] < 8 * found["of"]:
        out.append(f"{name}: only {found['distinct_tokens']} distinct tokens: identity says nothing")
    return out


def scoring_problems(found: dict[str, Any]) -> list[str]:
    """Judge the batches beside a scoring neighbour."""
    out = [text for size, of in found.items() for text in claims(of, f"batch {size}")]
    return out + [
        f"batch {size}: largest {of['largest_batch']}"
        for size, of in found.items()
        if of["largest_batch"] < int(size) // 2 + 1
    ]


def retracted_problems(found: dict[str, Any]) -> list[str]:
    """Judge the sequences beside a retracted neighbour."""
    out = claims(found, "beside a retracted neighbour")
    if not found["neighbour_retractions"]:
        out.append("the neighbour was not retracted")
    return out + (
        [f"{found['retractions']} of the sequences were retracted themselves"] if found["retractions"] else []
    )


NEIGHBOURS = {"scoring": scoring_problems, "retracted": retracted_problems}
"""What judges each test."""
