"""A client of any OpenAI-compatible server's ``/v1/completions``, and the choice between the two APIs."""

from __future__ import annotations

import time
from typing import Any

from sglang_margingate.bench.servers.client import (
    FAILED,
    TIMEOUT,
    Client,
    Completion,
    Prompt,
    ServerError,
    brief,
    error_message,
    new_http,
)


class OpenAIClient:
    """Completes prompts through ``/v1/completions``.

    Token ids are asked for with ``return_token_ids`` (SGLang, vLLM); where a server has none, completions carry no
    tokens and only text and finish reason can be compared.

    Parameters
    ----------
    base_url
        ``http://host:port``, with or without ``/v1``.
    model
        Name to ask for; the server's first by default.
    """

    def __init__(self, base_url: str, model: str | None = None, timeout: float = TIMEOUT, api_key: str = "") -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._http = new_http(api_key, timeout)
        self._extra: dict[str, Any] = {"return_token_ids": True}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        try:
            answer = self._http.get(self.base_url + "/v1/models", timeout=30)
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except FAILED as error:
            raise ServerError(f"GET {self.base_url}/v1/models: {brief(error)}") from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise ServerError(f"GET {self.base_url}/v1/models: not an OpenAI-compatible list of models") from None

    def flush_cache(self) -> bool:
        """Return False: the OpenAI API has no such call."""
        return False

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
    ) -> Completion:
        """Complete one prompt at temperature 0 unless ``sampling`` says otherwise; ``custom`` has no place here."""
        params = prompt.sampling(max_new_tokens)
        body = {"model": self.model, "prompt": list(prompt.ids) or prompt.text, **params}
        body["max_tokens"] = body.pop("max_new_tokens")  # OpenAI's word; ignore_eos is SGLang's and vLLM's
        if "sampling_seed" in body:
            body["seed"] = body.pop("sampling_seed")
        best = dict(prompt.asks).get("top_logprobs_num")
        if best is not None:
            body["logprobs"] = best  # of the answer's tokens: OpenAI's way to the prompt's is SGLang's and vLLM's echo
        start = time.perf_counter()
        code, out = self._post({**body, **(sampling or {}), **self._extra})
        if code in (400, 422) and self._extra:
            self._extra = {}  # a strict server: it knows no return_token_ids
            code, out = self._post({**body, **(sampling or {})})
        if code != 200 and prompt.ids:
            raise ServerError(
                f"prompt {prompt.id}: {self.base_url}/v1/completions does not take token ids with ignore_eos "
                f"(HTTP {code}: {error_message(out)}); use a dataset of text, as --dataset arith"
            )
        if code != 200:
            raise ServerError(f"prompt {prompt.id}: HTTP {code}: {error_message(out)}")
        try:
            choice = out["choices"][0]
            usage = out.get("usage") or {}
            tokens = tuple(choice.get("token_ids") or ())
            return Completion(
                prompt.id,
                tokens,
                str(choice.get("finish_reason")),
                choice["text"],
                time.perf_counter() - start,
                {
                    "logprobs": choice.get("logprobs"),
                    "completion_tokens": usage.get("completion_tokens", len(tokens)),
                    "cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
                },
            )
        except (KeyError, IndexError, TypeError):
            raise ServerError(f"prompt {prompt.id}: not an answer of /v1/completions: {str(out)[:120]}") from None

    def _post(self, body: dict[str, Any]) -> tuple[int, Any]:
        try:
            answer = self._http.post(self.base_url + "/v1/completions", json=body)
        except FAILED as error:
            raise ServerError(f"POST {self.base_url}/v1/completions: {brief(error)}") from None
        try:
            return answer.status_code, answer.json()
        except ValueError:
            return answer.status_code, answer.text[:200]


def connect(
    base_url: str, api: str = "auto", model: str | None = None, timeout: float = TIMEOUT, api_key: str = ""
) -> Client | OpenAIClient:
    """Return a client of the server, native where it speaks SGLang's API.

    Raises
    ------
    ServerError
        One line: nothing answers there, or neither API does.
    """
    if "://" not in base_url:
        base_url = "http://" + base_url
    if api == "openai":
        return OpenAIClient(base_url, model, timeout, api_key)
    native = Client(base_url, timeout, api_key=api_key)
    try:
        info = native.get("/model_info")
        if not isinstance(info, dict) or "model_path" not in info:
            raise ServerError(f"GET {native.base_url}/model_info: not SGLang's answer")
    except ServerError as error:
        if api == "sglang" or "refused" in str(error) or "not known" in str(error):
            raise
        try:
            return OpenAIClient(base_url, model, timeout, api_key)
        except ServerError:
            raise ServerError(f"{native.base_url} answers neither SGLang's API nor OpenAI's") from None
    try:
        native.status()
    except ServerError:
        native.tagged = False  # stock SGLang
    return native


def served_model(client: Client | OpenAIClient) -> str:
    """Return the model's name or folder, as the server gives it."""
    return client.model if isinstance(client, OpenAIClient) else str(client.get("/model_info")["model_path"])
