"""From a command's options to the requests of each load, as they are sent."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sglang_margingate.bench.options import UsageError
from sglang_margingate.bench.prompts.chosen import OVERRIDES, SKIP_TOKENIZER, rendered, server_info
from sglang_margingate.bench.prompts.datasets import files_of
from sglang_margingate.bench.prompts.datasets import load as load_prompts
from sglang_margingate.bench.prompts.random_ids import check_context, model_facts
from sglang_margingate.bench.prompts.template import is_embedded
from sglang_margingate.bench.servers.client import Client, Prompt
from sglang_margingate.bench.servers.process import flag_value
from sglang_margingate.bench.workload.loads import Load
from sglang_margingate.bench.workload.requests import (
    Chain,
    as_ids,
    blank_prefixes,
    chains,
    replayed,
    sharegpt,
    text_prefixes,
)

SHAREGPT = "sharegpt"


def raw_prompts(args: argparse.Namespace, count: int) -> list[Prompt]:
    """Return prompts of ``--dataset`` and ``--data``, at most ``count`` of each, as plain text or blank ids."""
    files = files_of(args.dataset, args.data)
    talk = files.pop(SHAREGPT, None)
    names = [n for n in args.dataset if n != SHAREGPT or talk is None]
    out: list[Prompt] = []
    if names or files:
        data = [f"{name}={file}" for name, file in files.items()]
        out += load_prompts(names, data, count, args.only, args.seed, args.field)
    return out + (sharegpt(talk, count) if talk is not None else [])


def read_files(loads: Sequence[Load], count: int) -> dict[Load, list[Chain]]:
    """Return the requests of the loads that replay a file, before any server is started."""
    return {load: replayed(load.file, count) for load in loads if load.file is not None}


def closing_of(model: str) -> str:
    """Return what stands behind an answer in a model's chat format, before the next message; nothing if not known."""
    if not is_embedded(model):
        return ""
    from sglang_margingate.demo.chat import EOS

    return EOS


def build(
    args: argparse.Namespace,
    loads: Sequence[Load],
    prompts: Sequence[Prompt],
    files: Mapping[Load, list[Chain]],
    count: int,
    model: str,
    client: Client | None = None,
) -> dict[Load, tuple[Chain, ...]]:
    """Return the requests of every load: text in the model's template, ids drawn below its vocabulary.

    Raises
    ------
    UsageError, RandomError
        The requests do not fit the model or the server, or conversations of text and of ids are mixed.
    """
    info = server_info(client)
    if SKIP_TOKENIZER in args.server_flags or info.get("skip_tokenizer_init"):
        # The lengths of a known file are all that a server without a tokenizer can be asked for.
        prompts = [q for p in prompts for q in (as_ids([p]) if p.dataset == SHAREGPT else [p])]
    facts = model_facts(model, info.get("json_model_override_args") or flag_value(args.server_flags, OVERRIDES))
    found: dict[Load, tuple[Chain, ...]] = {}
    for load in loads:
        made = files[load] if load in files else _made(args, load, list(prompts), count, model, client)
        flat, _ = rendered(args, [t for c in made for t in c.turns], model, client)
        turns = iter(flat)
        found[load] = tuple(replace(c, turns=tuple(next(turns) for _ in c.turns)) for c in made)
        found[load] = _share(args, load, found[load], count, model, client)
        whole = [replace(c.turns[0], ids=(0,) * c.most_tokens(), max_tokens=0) for c in found[load] if c.turns[0].ids]
        check_context(whole, facts.context)
    return found


def _made(
    args: argparse.Namespace, load: Load, prompts: list[Prompt], count: int, model: str, client: Client | None
) -> list[Chain]:
    if not prompts:
        raise UsageError("no dataset named; use --dataset, as random:64-1024:32-256")
    if load.kind == "sessions" and len({bool(p.ids) for p in prompts}) > 1:
        raise UsageError(
            f"--workload {load.name}: conversations are of text or of token ids; name datasets of one kind"
        )
    prefixes = [] if prompts[0].ids else text_prefixes(load, count, prompts)
    return chains(load, prompts, count, prefixes)


def _share(
    args: argparse.Namespace, load: Load, made: tuple[Chain, ...], count: int, model: str, client: Client | None
) -> tuple[Chain, ...]:
    """Put drawn prefixes before conversations of token ids."""
    blank = blank_prefixes(load, count)
    if not blank or not made[0].turns[0].ids:
        return made
    drawn, _ = rendered(args, blank, model, client)
    return tuple(c.after(drawn, i) for i, c in enumerate(made))
