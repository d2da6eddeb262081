"""Prompts in one request, for a test that needs a batch: the server has them all before the first answer ends.

Requests from as many threads reach a busy machine one by one, and a tiny model has ended the first before the last is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang_margingate.bench.servers.client import Client, Completion, Prompt, completion


def run_as_one(
    client: Client, prompts: Sequence[Prompt], max_new_tokens: int,
    sampling: dict[str, Any] | None = None, custom: dict[str, Any] | None = None,
) -> list[Completion]:  # fmt: skip
    """Complete the prompts with one ``/generate`` that lists them; return them in the order of ``prompts``."""
    each = [client.payload(prompt, max_new_tokens, sampling, custom) for prompt in prompts]
    code, out = client.post({name: [body[name] for body in each] for name in ("text", "sampling_params")})
    assert code == 200, out
    return [completion(prompt, answer, 0.0) for prompt, answer in zip(prompts, out, strict=True)]
