"""A small client of SGLang's native ``/generate``: one request, and many at once in a stated arrival pattern."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

TIMEOUT = 600.0
FLUSH_SECONDS = 10.0
FAILED = (httpx.HTTPError, httpx.InvalidURL)
"""What httpx raises for a request that got no answer."""


class ServerError(RuntimeError):
    """The server is unreachable, died, or refused a request; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set."""

    id: str
    text: str
    dataset: str
    ids: tuple[int, ...] = ()
    """Token ids that are sent instead of the text."""
    max_tokens: int | None = None
    """Tokens to generate, whatever the model would end with; None: at most what the command says."""
    asks: tuple[tuple[str, Any], ...] = ()
    """Log-probabilities that it asks for, as fields of ``/generate``: ``(("return_logprob", True), ...)``."""
    draw: tuple[tuple[str, Any], ...] = ()
    """How it is sampled, as SGLang's sampling parameters: ``(("temperature", 0.7), ("sampling_seed", 5), ...)``; empty: greedily."""

    def sampling(self, max_new_tokens: int) -> dict[str, Any]:
        """Return the sampling parameters of this prompt, in SGLang's words."""
        drawn = {"temperature": 0, **dict(self.draw)}
        if self.max_tokens is None:
            return {**drawn, "max_new_tokens": max_new_tokens}
        return {**drawn, "max_new_tokens": self.max_tokens, "ignore_eos": True}


LOGPROBS = (
    "input_token_logprobs", "output_token_logprobs", "input_top_logprobs", "output_top_logprobs",
    "input_token_ids_logprobs", "output_token_ids_logprobs", "logprobs",
)  # fmt: skip
"""Where SGLang's ``meta_info`` has log-probabilities, and an OpenAI choice."""


def first_difference(a: Sequence[object], b: Sequence[object]) -> int | None:
    """Return the first index at which two token sequences differ, or None; the end of the shorter one counts."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))


@dataclass(frozen=True)
class Completion:
    """What came back for one prompt. Two completions are identical when tokens and finish reason are."""

    prompt_id: str
    tokens: tuple[int, ...]
    finish_reason: str
    text: str = ""
    seconds: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    kept: str = field(default="", compare=False)
    """What :attr:`logprobs` was, of an answer that was read from a file."""

    @property
    def logprobs(self) -> str:
        """Every log-probability of the answer with its token, in one text; empty where there is none.

        JSON gives a float in the digits that read back as the same bits, so equal texts are equal bits.
        """
        found = {name: self.meta[name] for name in LOGPROBS if self.meta.get(name)}
        return json.dumps(found, sort_keys=True) if found else self.kept

    @property
    def margingate(self) -> dict[str, Any]:
        """The server's summary; empty for a server without margingate."""
        return self.meta.get("margingate") or {}

    def same_as(self, other: Completion) -> bool:
        """Return whether tokens and finish reason are equal."""
        return self.tokens == other.tokens and self.finish_reason == other.finish_reason

    def first_difference(self, other: Completion) -> int | None:
        """Return the index of the first differing token, or None."""
        return first_difference(self.tokens, other.tokens)


def new_http(api_key: str, timeout: float) -> httpx.Client:
    """Return a client for any number of threads: as many connections as requests in flight, kept open for a second."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # A server closes a connection that was idle for 5 s, as httpx would by default: a request sent at that moment is lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1.0)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits)


def brief(error: Exception) -> str:
    """Return the reason inside one of httpx's errors, in a few words."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    if isinstance(error, httpx.RemoteProtocolError):
        return "remote end closed connection"
    if isinstance(error, httpx.NetworkError):
        text = str(error)
        known = ("Connection refused", "Name or service not known", "Connection reset")
        return next((k.lower() for k in known if k in text), "connection failed")
    return " ".join(str(error).split())[:200]


class Completer(Protocol):
    """What the traffic functions need of a client: SGLang's native API or OpenAI's."""

    base_url: str

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
    ) -> Completion:
        """Complete one prompt, greedily unless ``sampling`` says otherwise."""
        ...

    def flush_cache(self) -> bool:
        """Empty the server's prefix cache; False where it cannot."""
        ...


class Client:
    """Talks to one server through SGLang's native API.

    Parameters
    ----------
    base_url
        ``http://host:port``.
    tagged
        Send ``custom_params`` with each request: dataset and margingate's parameters. Stock SGLang ignores them.
    """

    def __init__(self, base_url: str, timeout: float = TIMEOUT, tagged: bool = True, api_key: str = "") -> None:
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.api_key = api_key
        self.tagged = tagged
        self.post_mortem: Callable[[], str] = lambda: ""
        """Says why the server died, where that is known; added to errors."""
        self._http = new_http(api_key, timeout)

    def get(self, path: str) -> Any:
        """Return the JSON of a GET."""
        return self._get(path, lambda answer: answer.json())

    def text(self, path: str) -> str:
        """Return the text of a GET."""
        return self._get(path, lambda answer: answer.text)

    def _get(self, path: str, read: Callable[[httpx.Response], Any]) -> Any:
        try:
            answer = self._http.get(self.base_url + path, timeout=min(30, self.timeout))
            answer.raise_for_status()
            return read(answer)
        except (*FAILED, ValueError) as error:
            raise ServerError(f"GET {self.base_url}{path}: {brief(error)}") from None

    def status(self) -> dict[str, Any]:
        """Return ``GET /margingate/status``."""
        return self.get("/margingate/status")

    def flush_cache(self) -> bool:
        """Empty the server's prefix cache; it refuses while requests run, so this tries for some seconds."""
        end, pause = time.monotonic() + FLUSH_SECONDS, 0.01
        while True:
            try:
                answer = self._http.post(self.base_url + "/flush_cache", timeout=60)
            except FAILED as error:
                raise ServerError(f"POST {self.base_url}/flush_cache: {brief(error)}") from None
            if answer.is_success or answer.status_code in (404, 405) or time.monotonic() > end:
                return answer.is_success
            time.sleep(pause)  # a scheduler forgets a finished request within a step: the first look comes soon
            pause = min(0.2, 2 * pause)

    def post(self, payload: dict[str, Any]) -> tuple[int, Any]:
        """Send one ``/generate``; return status code and JSON, whatever the code."""
        try:
            answer = self._http.post(self.base_url + "/generate", json=payload)
            return answer.status_code, answer.json()
        except (*FAILED, ValueError) as error:
            raise ServerError(f"POST {self.base_url}/generate: {brief(error)}{self.post_mortem()}") from None

    def stream(self, payload: dict[str, Any], what: str = "the request") -> Generator[bytes, None, None]:
        """Send one ``/generate`` and yield the JSON of each chunk as it arrives, not parsed: that would cost time.

        Closing the iterator hangs up. ``what`` names the request in errors.
        """
        url, rest = self.base_url + "/generate", b""
        try:
            # As it came over the wire: decompressing or decoding every chunk would slow a server on the same machine.
            raw = {"Accept-Encoding": "identity"}
            with self._http.stream("POST", url, json={**payload, "stream": True}, headers=raw) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise ServerError(f"{what}: HTTP {answer.status_code}: {_reason(answer)}")
                for piece in answer.iter_raw():
                    *events, rest = (rest + piece).split(b"\n\n")
                    for event in events:
                        if event.startswith(b"data:") and not event.endswith(b"[DONE]"):
                            yield event[5:]
        except FAILED as error:
            raise ServerError(f"POST {url}: {brief(error)}{self.post_mortem()}") from None

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
        rid: str | None = None,
    ) -> Completion:
        """Complete one prompt as it says, at temperature 0 where it says nothing, unless ``sampling`` says otherwise.

        A prompt with a ``max_tokens`` of its own generates that many instead of ``max_new_tokens``.
        """
        payload = self.payload(prompt, max_new_tokens, sampling, custom, rid)
        start = time.perf_counter()
        code, out = self.post(payload)
        if code != 200:
            raise ServerError(f"prompt {prompt.id}: HTTP {code}: {error_message(out)}")
        return completion(prompt, out, time.perf_counter() - start)

    def payload(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
        rid: str | None = None,
    ) -> dict[str, Any]:
        """Return the JSON of one ``/generate``; ``rid`` names the request in the trace and must be unique in flight."""
        params: dict[str, Any] = {**prompt.sampling(max_new_tokens), **(sampling or {})}
        if self.tagged:
            params["custom_params"] = {"margingate_dataset": prompt.dataset, **(custom or {})}
        words: dict[str, Any] = {"input_ids": list(prompt.ids)} if prompt.ids else {"text": prompt.text}
        return {**words, "sampling_params": params, **dict(prompt.asks), **({"rid": rid} if rid else {})}


def _reason(answer: httpx.Response) -> str:
    try:
        return error_message(answer.json())
    except ValueError:
        return answer.text[:200]


def error_message(body: Any) -> str:
    """Return the message in a server's error answer, whatever its form, in one line."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def completion(prompt: Prompt, out: dict[str, Any], seconds: float) -> Completion:
    """Return the completion in one JSON answer of ``/generate``."""
    try:
        meta = out["meta_info"]
        reason = meta["finish_reason"]
        kind = reason["type"] if isinstance(reason, dict) else str(reason)
        tokens = tuple(out["output_ids"])
    except (KeyError, TypeError) as error:
        raise ServerError(f"prompt {prompt.id}: the answer has no {error}; is this SGLang's /generate?") from None
    return Completion(prompt.id, tokens, kind, out.get("text", ""), seconds, meta)


def run_alone(
    client: Completer,
    prompts: Sequence[Prompt],
    done: Callable[[], None] = lambda: None,
    on_result: Callable[[Completion], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Complete the prompts one after the other, so that each is alone on the server."""
    out = []
    for prompt in prompts:
        out.append(client.generate(prompt, **options))
        if on_result is not None:
            on_result(out[-1])
        done()
    return out


def run_together(
    client: Completer,
    prompts: Sequence[Prompt],
    concurrency: int,
    stagger_seconds: float = 0.0,
    background: Sequence[Prompt] = (),
    done: Callable[[], None] = lambda: None,
    seed: int = 0,
    on_result: Callable[[Completion], None] | None = None,
    **options: Any,
) -> list[Completion]:
    """Complete the prompts with ``concurrency`` requests in flight; return them in the order of ``prompts``.

    Ctrl-C and the first error drop what has not been sent yet; results so far went to ``on_result``.

    Parameters
    ----------
    stagger_seconds
        Each request waits a random time up to this before it is sent, so that arrivals interleave with decoding.
    background
        Prompts sampled at temperature 1 all the while, as non-greedy neighbours; their output is thrown away.
    on_result
        Called with each completion as it arrives, from several threads, one at a time.
    """
    rng = random.Random(seed)
    delays = [rng.uniform(0, stagger_seconds) for _ in prompts]
    stop = threading.Event()
    lock = threading.Lock()

    def one(prompt: Prompt, delay: float) -> Completion:
        if delay:
            stop.wait(delay)
        if stop.is_set():
            raise ServerError(f"prompt {prompt.id}: stopped before it was sent")
        result = client.generate(prompt, **options)
        with lock:
            if on_result is not None:
                on_result(result)
            done()
        return result

    def noise(prompt: Prompt) -> None:
        while not stop.is_set():
            client.generate(prompt, options.get("max_new_tokens", 256), {"temperature": 1.0, "top_p": 0.9})

    with ThreadPoolExecutor(concurrency + len(background)) as pool:
        noisy = [pool.submit(noise, p) for p in background]
        futures = [pool.submit(one, p, d) for p, d in zip(prompts, delays)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for failed in (f for f in futures if f.done() and f.exception()):
                failed.result()
            out = [f.result() for f in futures]
        finally:
            stop.set()
            for future in futures:
                future.cancel()
        for n in noisy:
            n.result()
        return out
