"""Answers kept in a file, to compare another server or another day with: ``margingate check --record`` and ``--against``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.check.identity import Runs
from sglang_margingate.bench.options import UsageError, write
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError
from sglang_margingate.settings.fingerprint import differing
from sglang_margingate.strict_json import JsonError, read_json

SCHEMA = "margingate-answers/1"
RUN = "recorded"
"""Name of the run that recorded answers are."""

NO_FINGERPRINT: dict[str, Any] = {"system_fingerprint": None, "parts": {}}


class Recorded(NamedTuple):
    """What a file holds."""

    path: Path
    fingerprint: dict[str, Any]
    answers: dict[str, dict[str, Any]]
    """By the digest of the request."""


def request_digest(prompt: Prompt, max_new_tokens: int) -> str:
    """Return a digest of all that a request asks for: prompt, sampling parameters and log-probabilities."""
    words = list(prompt.ids) or prompt.text
    asked = [words, prompt.sampling(max_new_tokens), dict(prompt.asks)]
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint_of(client: Any) -> dict[str, Any]:
    """Return a server's fingerprint with its parts; empty of a server that has none."""
    if not isinstance(client, Client):
        return NO_FINGERPRINT
    try:
        return client.status().get("fingerprint") or NO_FINGERPRINT
    except (ServerError, AttributeError):
        return NO_FINGERPRINT


def record(path: Path, fingerprint: dict[str, Any], prompts: Sequence[Prompt], runs: Runs, max_new_tokens: int) -> int:
    """Write the first answer of every prompt; return how many."""
    answers = {}
    for prompt in prompts:
        seen = [o.completion for o in runs.by_prompt.get(prompt.id, []) if o.run != RUN]
        if seen:
            a = seen[0]
            answers[request_digest(prompt, max_new_tokens)] = {
                "prompt": prompt.id, "tokens": list(a.tokens), "text": a.text, "finish_reason": a.finish_reason,
                "logprobs": a.logprobs,
            }  # fmt: skip
    write(path, json.dumps({"schema": SCHEMA, "fingerprint": fingerprint, "answers": answers}, indent=1) + "\n")
    return len(answers)


def load(path: Path) -> Recorded:
    """Read such a file.

    Raises
    ------
    UsageError
        One line: it cannot be read, or is something else.
    """
    try:
        data = read_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise UsageError(f"--against: {path} is no file of `margingate check --record` ({SCHEMA})")
        answers = data["answers"]
        for answer in answers.values():
            list(answer["tokens"]), str(answer["text"]), str(answer["finish_reason"]), str(answer["logprobs"])
        return Recorded(path, data["fingerprint"], answers)
    except OSError as error:
        raise UsageError(f"--against: cannot read {path}: {error.strerror or error}") from None
    except (JsonError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--against: {path}: not whole ({error}); make it with `margingate check --record`") from None


def put_first(recorded: Recorded, prompts: Sequence[Prompt], runs: Runs, max_new_tokens: int) -> int:
    """Let the recorded answers be the first run of their prompts; return how many prompts have one.

    Raises
    ------
    UsageError
        No request of this check is in the file.
    """
    known = 0
    for prompt in prompts:
        answer = recorded.answers.get(request_digest(prompt, max_new_tokens))
        if answer is not None:
            known += 1
            tokens = tuple(answer["tokens"])
            runs.add(
                RUN, Completion(prompt.id, tokens, answer["finish_reason"], answer["text"], kept=answer["logprobs"])
            )
    if not known:
        raise UsageError(
            f"--against: none of these {len(prompts)} requests is in {recorded.path}; ask for the same prompts, --max-tokens "
            "and --logprobs"
        )
    return known


def compare(recorded: Recorded, here: dict[str, Any]) -> list[str]:
    """Return what the fingerprints say, a line each; the first one says whether they are equal."""
    then, now = recorded.fingerprint.get("system_fingerprint"), here.get("system_fingerprint")
    if then is None or now is None:
        who = "the recorded answers have" if then is None else "this server has"
        return [f"fingerprint: {who} none, so nothing says whether the answers should be equal"]
    if then == now:
        return [f"fingerprint: {now}, as recorded: the answers must be equal"]
    lines = differing(recorded.fingerprint.get("parts", {}), here.get("parts", {}))
    return [f"fingerprint: recorded {then}, here {now}; what differs:", *(f"  {line}" for line in lines)]
