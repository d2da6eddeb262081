"""Options that several commands share: which server, which prompts; and how to reach or start the server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_margingate.bench.servers.client import Client
    from sglang_margingate.bench.servers.openai_client import OpenAIClient

API_KEY_ENV = "MARGINGATE_API_KEY"


class UsageError(ValueError):
    """A wrong option; one line that names it, the value and the fix."""


def whole(least: int) -> Any:
    """Return an argparse type: a whole number of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def number(least: float, most: float = float("inf")) -> Any:
    """Return an argparse type: a number from ``least`` to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            top = "" if most == float("inf") else f" to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g}{top or ' up'}")
        return value

    return parse


def names(text: str) -> list[str]:
    """Return the names of a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def add_server(p: argparse.ArgumentParser) -> None:
    """Add the options that choose a server."""
    add = p.add_argument_group("server (without --base-url one is started; flags after -- are its own)").add_argument
    add("--base-url", metavar="URL", help=f"a running server; its API key comes from {API_KEY_ENV}")
    add("--port", type=whole(1), help="port of a started server (a free one)")
    add("--server-log", type=Path, metavar="FILE", help="log of a started server (a temporary file)")
    add(
        "--start-timeout",
        type=number(1),
        default=600.0,
        metavar="S",
        help="seconds until a started server must serve (%(default)g)",
    )


def add_prompts(p: argparse.ArgumentParser, dataset: str | None, limit: int | None) -> None:
    """Add the options that choose prompts."""
    add = p.add_argument_group("prompts").add_argument
    add("--dataset", type=names, default=names(dataset or ""), metavar="NAME[,NAME]",
        help="arith, code, story (embedded); random:INPUT:OUTPUT (token ids, no tokenizer needed; lengths in tokens, "
        "also ranges as 100-900; random alone is random:512:128); gsm8k, math500, humaneval, sharegpt; "
        "or a name given in --data"
        + (f" ({dataset})" if dataset else ""))  # fmt: skip
    add(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help="file of a dataset: .jsonl with a field `prompt`, or the known one's own format; may be repeated",
    )
    add(
        "--field", metavar="NAME", help="field of the user text in the files of --data (prompt, or the known one's own)"
    )
    add("--limit", type=whole(1), default=limit, metavar="N", help=f"prompts of each dataset ({limit or 'all'})")
    add("--only", type=names, default=[], metavar="ID[,ID]", help="these prompts only")
    add("--max-tokens", type=whole(1), default=64, metavar="N",
        help="tokens to generate for each prompt of text (%(default)s)")  # fmt: skip
    add("--vocab", type=whole(2), metavar="N", help="token ids to draw random prompts from (the model's config.json)")
    add("--no-template", action="store_true", help="send the text as it is, without the model's chat template")
    add("--tokenizer", metavar="PATH", help="tokenizer with the chat template, where it is not the served model's")


SAMPLED = "--sampled"


@contextmanager
def server(args: argparse.Namespace, console: Console, flags: Sequence[str] = ()) -> Iterator[Client | OpenAIClient]:
    """Give a client of ``--base-url``, or of a server started with ``flags`` and the flags after ``--``."""
    from sglang_margingate.bench.servers.openai_client import connect

    api, model = getattr(args, "api", "auto"), getattr(args, "model", None)
    if args.base_url:
        if args.server_flags:
            raise UsageError(
                f"-- {args.server_flags[0]}: flags of a server to start, but --base-url names a running one"
            )
        yield connect(args.base_url, api, model, api_key=os.environ.get(API_KEY_ENV, ""))
        return
    from sglang_margingate.bench.console import starting
    from sglang_margingate.bench.servers.process import serve

    every = [*flags, *args.server_flags]
    with starting(console, "a server: python -m sglang_margingate.launch_server " + " ".join(every)) as tell:
        context = serve(every, log=args.server_log, port=args.port, timeout=args.start_timeout, progress=tell)
        running = context.__enter__()
    try:
        yield running.client if api != "openai" else connect(running.base_url, api, model)
    finally:
        context.__exit__(*sys.exc_info())


def server_facts(client: Client | OpenAIClient) -> dict[str, str]:
    """Return what the server says of itself, for the head of a report."""
    from sglang_margingate.bench.prompts.template import EMBEDDED_MODEL, is_embedded
    from sglang_margingate.bench.servers.client import Client, ServerError
    from sglang_margingate.bench.servers.openai_client import served_model

    model = served_model(client)
    facts = {"model": EMBEDDED_MODEL if is_embedded(model) else model, "url": client.base_url}
    if not isinstance(client, Client):
        return {**facts, "api": "OpenAI API"}
    try:
        status = client.status()
        facts["policy"] = f"policy {status.get('policy')}"
        if status.get("policy") == "gate":
            facts["threshold"] = f"threshold {status.get('threshold'):g}"
        if status.get("test_knobs"):
            facts["knobs"] = f"TEST KNOBS: {', '.join(status['test_knobs'])}"
        facts["sglang"] = f"SGLang {(status.get('versions') or {}).get('sglang', '')}"
    except (ServerError, TypeError):
        facts["policy"] = "stock SGLang"
    return facts


def given(args: argparse.Namespace, parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> list[str]:
    """Return the options that differ from their defaults, as words of a command line that repeats this one."""
    words: list[str] = []
    for action in parser._actions:
        name = action.dest
        if not action.option_strings or name in ("help", *leave_out):
            continue
        value = getattr(args, name)
        if value == action.default:
            continue
        flag = action.option_strings[-1]
        if isinstance(value, bool):
            words.append(flag)
        elif isinstance(action, argparse._AppendAction):
            words += [w for v in value for w in (flag, str(v))]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return words + (["--", *args.server_flags] if args.server_flags else [])


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all; making its folder, and with a one-line error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def started(args: argparse.Namespace, flags: Sequence[str], label: str, module: str) -> Iterator[Client]:
    """Give a client of a server started for one mode; its log is kept beside the results where it fails."""
    from sglang_margingate.bench.servers.process import serve

    log = args.out.with_name(f"{args.out.stem}-{label.replace(' ', '')}.log")
    with serve(flags, log=log, port=args.port, timeout=args.start_timeout, module=module) as running:
        yield running.client
    log.unlink(missing_ok=True)
