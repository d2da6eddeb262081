"""Progress and messages of the commands: on stderr, so that stdout holds results only."""

from __future__ import annotations

import threading
import time
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


LINE_SECONDS = 10.0
"""Off a terminal, as in a log of CI, progress is a line this often."""


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """Give a progress display: task, bar, n of N, time; off a terminal a line every :data:`LINE_SECONDS`."""
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        if console.is_terminal:
            yield progress
            return
        stop = threading.Event()
        thread = threading.Thread(target=_lines, args=(console, progress, stop), daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            stop.set()
            thread.join()


def _lines(console: Console, progress: Progress, stop: threading.Event) -> None:
    start = time.monotonic()
    while not stop.wait(LINE_SECONDS):
        for task in progress.tasks:
            count = f"{task.completed:,.0f}" if task.total is None else f"{task.completed:,.0f}/{task.total:,.0f}"
            console.print(f"{task.description}: {count} after {time.monotonic() - start:.0f} s", markup=False)


@contextmanager
def starting(console: Console, what: str) -> Iterator[ServerProgress]:
    """Give a callback for :func:`~sglang_margingate.bench.server.serve` that shows what the server does meanwhile."""
    console.print(f"starting {what} ...")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)

        told = 0.0

        def tell(seconds: float, line: str) -> None:
            nonlocal told
            progress.update(task, description=f"{what}: {line[:60]}")
            if not console.is_terminal and seconds - told >= LINE_SECONDS:
                told = seconds
                console.print(f"not serving yet after {seconds:.0f} s: {line[:100]}", markup=False)

        yield tell
