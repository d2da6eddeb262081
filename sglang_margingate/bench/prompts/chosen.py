"""The prompts that a command's options choose, as they are sent: text in its template, or token ids."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sglang_margingate.bench import options
from sglang_margingate.bench.prompts.datasets import load
from sglang_margingate.bench.prompts.random_ids import check_context, draw, model_facts, vocabulary_of
from sglang_margingate.bench.prompts.sampled import seeded
from sglang_margingate.bench.prompts.template import NO_TEXT, PLAIN, find_template
from sglang_margingate.bench.servers.client import Client, Prompt, ServerError
from sglang_margingate.bench.servers.openai_client import OpenAIClient
from sglang_margingate.bench.servers.process import flag_value

SKIP_TOKENIZER = "--skip-tokenizer-init"
OVERRIDES = "--json-model-override-args"


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """Return the chosen prompts as plain text; before any server is started, so that a wrong name fails at once."""
    prompts = load(args.dataset, args.data, args.limit, args.only, args.seed, args.field)
    if SKIP_TOKENIZER in args.server_flags:
        _need_ids(prompts, "the flag after --", "leave the flag out")
    return prompts


def _need_ids(prompts: Sequence[Prompt], source: str, or_else: str) -> None:
    text = next((p.dataset for p in prompts if not p.ids), None)
    if text is not None:
        raise options.UsageError(
            f"--dataset {text} is text, but {SKIP_TOKENIZER} ({source}) leaves the server without a tokenizer; "
            f"use --dataset random:512:128, or {or_else}"
        )


def rendered(
    args: argparse.Namespace, prompts: Sequence[Prompt], model: str, client: Client | OpenAIClient | None = None
) -> tuple[list[Prompt], str]:
    """Return the prompts as they are sent, and the name of the chat template.

    Text is put into the model's chat template; random prompts get ids below the model's vocabulary.

    Parameters
    ----------
    client
        Of the running server, to be asked whether it has a tokenizer; None where it is not started yet.
    """
    info = server_info(client)
    if info.get("skip_tokenizer_init"):
        _need_api(client)
        _need_ids(prompts, "as /server_info says", "start the server without the flag")
    if any(p.ids for p in prompts):
        overrides = info.get("json_model_override_args") or flag_value(args.server_flags, OVERRIDES)
        facts = model_facts(model, overrides)
        check_context(prompts, _context(args, info) or facts.context)
        prompts = draw(prompts, vocabulary_of(model, facts, args.vocab), args.seed)
    if all(p.ids for p in prompts):
        return list(prompts), NO_TEXT.name
    template = PLAIN if args.no_template else find_template(model, args.tokenizer)
    return template.apply(prompts), template.name


def drawn(args: argparse.Namespace, prompts: Sequence[Prompt], client: object = None) -> list[Prompt]:
    """Return the prompts with seeds and mixed sampling parameters where ``--sampled`` asks for them, else as they are."""
    if not args.sampled:
        return list(prompts)
    return seeded(prompts, args.seed, common=isinstance(client, OpenAIClient))


def _context(args: argparse.Namespace, info: dict[str, Any]) -> int | None:
    given = str(flag_value(args.server_flags, "--context-length") or info.get("context_length"))
    return int(given) if given.isdigit() else None


def server_info(client: Client | OpenAIClient | None) -> dict[str, Any]:
    """Return SGLang's ``/server_info``; empty for other servers."""
    if client is None:
        return {}
    native = client if isinstance(client, Client) else Client(client.base_url, timeout=30)
    try:
        info = native.get("/server_info")
    except ServerError:
        return {}
    return info if isinstance(info, dict) else {}


def _need_api(client: Client | OpenAIClient | None) -> None:
    if isinstance(client, OpenAIClient):
        raise options.UsageError(
            f"{client.base_url} was started with {SKIP_TOKENIZER}, so its OpenAI API cannot answer; use --api sglang"
        )
