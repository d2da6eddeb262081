"""A small client of SGLang's native ``/generate``: one request, and many at once in a stated arrival pattern."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

TIMEOUT = 600.0


class ServerError(RuntimeError):
    """The server is unreachable, died, or refused a request; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set."""

    id: str
    text: str
    dataset: str


@dataclass(frozen=True)
class Completion:
    """What came back for one prompt. Two completions are identical when tokens and finish reason are."""

    prompt_id: str
    tokens: tuple[int, ...]
    finish_reason: str
    text: str = ""
    seconds: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def margingate(self) -> dict[str, Any]:
        """The server's summary; empty for a server without margingate."""
        return self.meta.get("margingate") or {}

    def same_as(self, other: Completion) -> bool:
        """Return whether tokens and finish reason are equal."""
        return self.tokens == other.tokens and self.finish_reason == other.finish_reason

    def first_difference(self, other: Completion) -> int | None:
        """Return the index of the first differing token, or None."""
        for i, (a, b) in enumerate(zip(self.tokens, other.tokens)):
            if a != b:
                return i
        return None if len(self.tokens) == len(other.tokens) else min(len(self.tokens), len(other.tokens))


class Client:
    """Talks to one server.

    Parameters
    ----------
    base_url
        ``http://host:port``.
    """

    def __init__(self, base_url: str, timeout: float = TIMEOUT) -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self._local = threading.local()

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        return self._local.session

    def get(self, path: str) -> Any:
        """Return the JSON of a GET."""
        try:
            answer = self._session().get(self.base_url + path, timeout=30)
            answer.raise_for_status()
            return answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ServerError(f"GET {self.base_url}{path} failed: {error}") from None

    def status(self) -> dict[str, Any]:
        """Return ``GET /margingate/status``."""
        return self.get("/margingate/status")

    def flush_cache(self) -> None:
        """Empty the server's prefix cache."""
        self._session().post(self.base_url + "/flush_cache", timeout=60)

    def post(self, payload: dict[str, Any]) -> tuple[int, Any]:
        """Send one ``/generate``; return status code and JSON, whatever the code."""
        try:
            answer = self._session().post(self.base_url + "/generate", json=payload, timeout=self.timeout)
            return answer.status_code, answer.json()
        except (requests.RequestException, ValueError) as error:
            raise ServerError(f"POST {self.base_url}/generate failed: {error}") from None

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
    ) -> Completion:
        """Complete one prompt at temperature 0 unless ``sampling`` says otherwise."""
        params: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_new_tokens, **(sampling or {})}
        params["custom_params"] = {"margingate_dataset": prompt.dataset, **(custom or {})}
        start = time.perf_counter()
        code, out = self.post({"text": prompt.text, "sampling_params": params})
        if code != 200:
            message = out.get("error", {}).get("message", out) if isinstance(out, dict) else out
            raise ServerError(f"prompt {prompt.id}: HTTP {code}: {message}")
        meta = out["meta_info"]
        reason = meta["finish_reason"]
        return Completion(
            prompt.id, tuple(out["output_ids"]), reason["type"] if isinstance(reason, dict) else str(reason),
            out.get("text", ""), time.perf_counter() - start, meta,
        )  # fmt: skip


def run_alone(
    client: Client, prompts: Sequence[Prompt], done: Callable[[], None] = lambda: None, **options: Any
) -> list[Completion]:
    """Complete the prompts one after the other, so that each is alone on the server."""
    out = []
    for prompt in prompts:
        out.append(client.generate(prompt, **options))
        done()
    return out


def run_together(
    client: Client,
    prompts: Sequence[Prompt],
    concurrency: int,
    stagger_seconds: float = 0.0,
    background: Sequence[Prompt] = (),
    done: Callable[[], None] = lambda: None,
    seed: int = 0,
    **options: Any,
) -> list[Completion]:
    """Complete the prompts with ``concurrency`` requests in flight; return them in the order of ``prompts``.

    Parameters
    ----------
    stagger_seconds
        Each request waits a random time up to this before it is sent, so that arrivals interleave with decoding.
    background
        Prompts sampled at temperature 1 all the while, as non-greedy neighbours; their output is thrown away.
    """
    rng = random.Random(seed)
    delays = [rng.uniform(0, stagger_seconds) for _ in prompts]
    stop = threading.Event()

    def one(job: tuple[Prompt, float]) -> Completion:
        prompt, delay = job
        if delay:
            time.sleep(delay)
        result = client.generate(prompt, **options)
        done()
        return result

    def noise(prompt: Prompt) -> None:
        while not stop.is_set():
            client.generate(prompt, options.get("max_new_tokens", 256), {"temperature": 1.0, "top_p": 0.9})

    with ThreadPoolExecutor(concurrency + len(background)) as pool:
        noisy = [pool.submit(noise, p) for p in background]
        try:
            return list(pool.map(one, zip(prompts, delays)))
        finally:
            stop.set()
            for n in noisy:
                n.result()
