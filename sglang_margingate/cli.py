"""The command ``margingate``. Each command's code is imported when it is called, so that help comes at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

USAGE, INTERRUPTED = 2, 130

EXTRAS = {
    "pandas": "analysis", "plotly": "dashboard", "streamlit": "dashboard", "sglang": "serve", "torch": "serve",
    "prometheus_client": "serve",
}  # fmt: skip
"""Modules that some commands need, and the extra that brings them."""


class Command(NamedTuple):
    """One command: its line in the help, and where its code lies."""

    help: str
    module: str
    options: str = "add_arguments"
    function: str = "run"


COMMANDS = {
    "serve": Command("serve a model: stock SGLang with margingate's policy", ""),
    "calibrate": Command("choose thresholds for a model, server and datasets", "calibrate.command"),
    "check": Command("does a server give the same tokens whatever the batch?", "check.command"),
    "doctor": Command("examine this machine with a model; one report for an issue", "doctor.command"),
    "probe": Command("at which shapes does a model give a row the same bits here?", "cmd_probe"),
    "tune-experts": Command("the fastest configurations of fused experts that share bits", "cmd_tune"),
    "bench": Command("compare policies side by side: speed, identity, cost", "side_by_side.command"),
    "dashboard": Command("open the dashboard on a folder of runs", ""),
    "report": Command("write a run as one HTML file", "cmd_runs", "add_report", "report"),
    "export": Command("write a run as CSV or as a Chrome trace", "cmd_runs", "add_export", "export"),
    "runs": Command("list the recorded runs", "cmd_runs", "add_runs", "runs"),
    "evidence": Command("run a script behind the numbers in the documentation", ""),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(USAGE)


class _OneLine(argparse.HelpFormatter):
    """Each command's name and help on one line; argparse forgets the indentation when it measures the names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=20, width=80)
        self._action_max_length = 16


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser, with the options of the one command that was called."""
    p = _Parser(
        prog="margingate",
        description="Batch-independent temperature-0 decoding for SGLang.",
        allow_abbrev=False,
        formatter_class=_OneLine,
    )
    p.add_argument("--version", action="store_true", help="print the version")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name, entry in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=entry.help,
            description=entry.help[0].upper() + entry.help[1:] + ("" if entry.help.endswith("?") else "."),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command and entry.module:
            module = import_module(f"sglang_margingate.bench.{entry.module}")
            getattr(module, entry.options)(sub)
            sub.set_defaults(call=getattr(module, entry.function), parser=sub)
    return p


def _exec(module: str, argv: list[str]) -> int:
    """Become ``python -m module``: SGLang spawns processes that import the main module again, so it must be that one."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *argv])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    if command == "serve":
        return _exec("sglang_margingate.launch_server", words[1:])
    if command == "dashboard":
        return _exec("sglang_margingate.dashboard", words[1:])
    if command == "evidence":
        return _guarded(lambda: _evidence(words[1:]), command)
    # Flags after `--` belong to a server that the command starts.
    cut = words.index("--") if "--" in words else len(words)
    parser = _parser(command)
    args = parser.parse_args(words[:cut])
    args.server_flags = words[cut + 1 :]
    if args.version:
        from sglang_margingate import __version__

        print(f"sglang-margingate {__version__}")
        return 0
    if not args.command:
        parser.print_help()
        return 0
    return _guarded(lambda: args.call(args, args.parser), command)


def _evidence(words: list[str]) -> int:
    from sglang_margingate.bench.evidence.command import main as evidence

    return evidence(words)


def _guarded(call: Callable[[], int], command: str) -> int:
    """Run the command; what a user can do something about is one line, not a traceback."""
    import signal
    import threading

    if threading.current_thread() is threading.main_thread():
        # A started server is stopped, and what was measured is kept. SIGINT too: a background shell has it ignored.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    try:
        return int(call())
    except KeyboardInterrupt:
        print(f"margingate {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # This project's own errors are one line for the user; of others, the kinds that bad input and machines cause.
        ours = type(error).__module__.startswith("sglang_margingate")
        if not (ours or isinstance(error, (OSError, ImportError))) or os.environ.get("MARGINGATE_DEBUG"):
            raise
        text = " ".join(str(error).split()) or "no reason given"
        extra = EXTRAS.get(getattr(error, "name", None) or "")
        if extra:
            text += f": pip install 'sglang-margingate[{extra}]'"
        print(f"margingate {command}: error: {'' if ours else type(error).__name__ + ': '}{text}", file=sys.stderr)
        return USAGE


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
