"""Progress and messages of the commands: on stderr, so that stdout holds results only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from sglang_margingate.bench.servers.process import Progress as ServerProgress


def make_console(quiet: bool = False) -> Console:
    """Return the console of messages; ``quiet`` says nothing at all."""
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """Give a progress display: task, bar, n of N, time. Off a terminal it prints nothing but its last state."""
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress


@contextmanager
def starting(console: Console, what: str) -> Iterator[ServerProgress]:
    """Give a callback for :func:`~sglang_margingate.bench.server.serve` that shows what the server does meanwhile."""
    console.print(f"starting {what} ...")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        def tell(_seconds: float, line: str) -> None:
            progress.update(task, description=f"{what}: {line[:60]}")

        yield tell
