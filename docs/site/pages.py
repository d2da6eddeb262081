"""Hooks of mkdocs: pages that are made from the code or lie elsewhere in the repository, and the links between all of them.

Flags, commands and metrics are read from the parsers and the registry themselves, so that no page can name one that is gone or leave
one out. A link to a file of the repository that is no page becomes its path.
"""

from __future__ import annotations

import argparse
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "traces/README.md": "trace-columns.md",
    "examples/README.md": "examples.md",
    "kernels/benchmarks/RESULTS.md": "kernels.md",
}
"""Pages that lie elsewhere in the repository, and their names on the site."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that do not lie in docs/."""
    pages = {page: (ROOT / source).read_text("utf-8") for source, page in ELSEWHERE.items()}
    pages |= {"flags.md": flags(), "commands.md": commands(), "metrics.md": metrics(), "environment.md": environment()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links between files of the repository be links between pages; a file that is no page stays as its path."""
    page_name = page.file.src_uri
    source = next((source for source, name in ELSEWHERE.items() if name == page_name), f"docs/{page_name}")

    def rewritten(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / place).exists():
            return match[0]  # mkdocs says that it leads nowhere
        if place.startswith("docs/") and not (ROOT / place).is_dir():
            name = place.removeprefix("docs/")
        elif place in ELSEWHERE:
            name = ELSEWHERE[place]
        else:
            return f"{text} (`{place}`)" if text.strip("`") != place else f"`{place}`"
        to = posixpath.relpath(name, posixpath.dirname(page_name) or ".")
        return f"{image}[{text}]({to}{'#' + anchor if anchor else ''})"

    return LINK.sub(rewritten, markdown)


ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>[~.!]*([^<]*)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Show what docstrings refer to by its last name: mkdocstrings leaves Sphinx's roles as they are."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def flags() -> str:
    """Return the page of the server's own flags."""
    from sglang_margingate.serving.frontdoor import build_parser

    return (
        "# Flags\n\nOf `python -m sglang_margingate.launch_server`, beside all of SGLang's. Made from the parser.\n\n"
        + _options(build_parser())
    )


def commands() -> str:
    """Return the page of the commands and their options."""
    from sglang_margingate.cli import COMMANDS, _parser

    parts = ["# Commands\n\nOf `margingate`. Made from the parsers.\n"]
    for name, command in COMMANDS.items():
        parts.append(
            f"## {name}\n\n{command.help[0].upper()}{command.help[1:]}{'' if command.help.endswith('?') else '.'}\n"
        )
        if command.module:
            subparsers = next(a for a in _parser(name)._actions if isinstance(a, argparse._SubParsersAction))
            parts.append(_options(subparsers.choices[name]))
    return "\n".join(parts)


def _options(parser: argparse.ArgumentParser) -> str:
    rows = ["| option | default | what it does |", "| --- | --- | --- |"]
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or "-h" in action.option_strings:
            continue
        rows.append(_row(action))
    return "\n".join(rows) + "\n"


def _row(action: argparse.Action) -> str:
    name = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
    takes = action.metavar if isinstance(action.metavar, str) else None
    if action.choices:
        takes = " or ".join(f"`{c}`" for c in action.choices)
    if takes and action.option_strings:
        name += f" {takes}" if takes.startswith("`") else f" `{takes}`"
    shown = action.default not in (None, False, argparse.SUPPRESS) and action.option_strings
    default = f"`{_place(action.default)}`" if shown else ""
    text = argparse.HelpFormatter("")._expand_help(action).replace("|", "\\|") if action.help else ""
    return f"| {name} | {default} | {text} |"


def _place(value: object) -> str:
    """Return a default as text; a folder of whoever builds the site stands as ``~``."""
    return str(value).replace(str(Path.home()), "~")


OURS = {
    "MARGINGATE_API_KEY": "key of the server that a command asks (`check`, `doctor`, `calibrate`)",
    "MARGINGATE_DEBUG": "set: a command's own errors come with their traceback",
    "MARGINGATE_KV_DIGEST": "1: each summary holds `kv_digest`, the SHA-256 of the request's generated K/V columns",
    "MARGINGATE_TRACE_DIR": "folder of runs of a dashboard that Streamlit starts by itself; `margingate dashboard` sets it",
    "XDG_CACHE_HOME": "`margingate/maps` below it keeps the maps of probed layers",
    "MARGINGATE_CONFIG": "set by the front door for its processes: the configuration's file",
    "MARGINGATE_LAUNCHER_PID": "set by the front door for its processes: which of them is the launcher",
    "MARGINGATE_RUN": "set by the front door for its processes: the name of the run that several schedulers write",
}


def environment() -> str:
    """Return the page of environment variables: ours, faults for tests, and those that are refused or noted."""
    from sglang_margingate.machine import KERNEL_SETTINGS_CPU, KERNEL_SETTINGS_GPU
    from sglang_margingate.runtime import faults
    from sglang_margingate.settings.rules import ENVIRONMENT

    rule = "=" * 30
    knobs = (faults.__doc__ or "").partition(rule)[2].rpartition(rule)[0].strip("= \n")
    kinds = {"CPU": KERNEL_SETTINGS_CPU, "GPU": KERNEL_SETTINGS_GPU}
    return "\n".join(
        [
            "# Environment\n\nVariables that are read. SGLang's refused ones and the libraries' are made from the code.\n",
            "| variable | what it does |",
            "| --- | --- |",
            *(f"| `{name}` | {text} |" for name, text in OURS.items()),
            "\n## Refused\nWith the gate, unless `--margingate-allow-untested` serves them at guarantee `none`.\n",
            "| variable of SGLang | why |",
            "| --- | --- |",
            *(
                f"| {', '.join(f'`{n}`' for n in r.names)} | {r.why}{' (always)' if r.absolute else ''} |"
                for r in ENVIRONMENT
            ),
            "\n## Part of what a map and a fingerprint are bound to\nThey make a library choose other kernels.\n",
            *(f"- On a {kind}: {', '.join(f'`{n}`' for n in names)}" for kind, names in kinds.items()),
            "\n## Faults, for tests\nA server with one of them claims nothing.\n",
            *(f"    {line}".rstrip().replace("``", "") for line in knobs.splitlines()),
            "",
        ]
    )


def metrics() -> str:
    """Return the page of the server's counters."""
    from prometheus_client import REGISTRY

    from sglang_margingate.runtime.metrics import Metrics

    known = {family.name for family in REGISTRY.collect()}
    Metrics(enabled=True, model="m")
    found = [family for family in REGISTRY.collect() if family.name not in known]
    rows = [
        f"| `{_shown(f)}` | {f.type} | {', '.join(f'`{n}`' for n in _labels(f.samples))} | {f.documentation} |"
        for f in found
    ]
    return "\n".join(
        [
            "# Metrics\n\nOn `/metrics` beside SGLang's own, with `--enable-metrics`. `dp_rank` is a further label where a server has "
            "several schedulers. Made from the registry.\n",
            "| name | kind | labels | what it counts |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def _shown(family: Any) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


def _labels(samples: Iterable[Any]) -> list[str]:
    return sorted({name for sample in samples for name in sample.labels})
