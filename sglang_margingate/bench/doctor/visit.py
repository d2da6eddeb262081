"""What the parts of one examination share: options, the model, the time that is left, and the server that runs now."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_margingate.bench.doctor.budget import Budget
from sglang_margingate.bench.doctor.findings import Finding
from sglang_margingate.bench.doctor.machine import Gpu
from sglang_margingate.bench.doctor.subject import Subject
from sglang_margingate.bench.servers.client import Client


@dataclass
class Visit:
    """One examination."""

    args: argparse.Namespace
    subject: Subject
    budget: Budget
    cards: list[Gpu]
    on_gpu: bool | None
    """Whether servers run on a GPU; None: nothing here could run one."""
    tell: Callable[[str, float | None], None] = lambda what, total: None
    """Shows what is being done, and how many steps it has."""
    done: Callable[[], None] = lambda: None
    """Shows that one of them is done."""
    client: Client | None = None
    """Of the server that runs now."""
    why_none: str = "no server was started"
    """Why there is none."""
    costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Milliseconds of a decode step of each repeat, by server and batch."""
    findings: list[Finding] = field(default_factory=list)
    folder: Path = field(init=False)
    """Logs, traces and written weights; gone at the end."""

    def __post_init__(self) -> None:
        self._all, self._server = ExitStack(), ExitStack()
        made = tempfile.TemporaryDirectory(
            prefix="margingate-doctor-", dir=self.args.scratch, ignore_cleanup_errors=True
        )
        self.folder = Path(self._all.enter_context(made))

    @property
    def cpu(self) -> bool:
        """Whether servers run on a CPU."""
        return not self.on_gpu

    def serve(self, context: Any) -> Any:
        """Enter a server's context; it ends with :meth:`stop`."""
        return self._server.enter_context(context)

    def stop(self) -> None:
        """Stop the server that runs, if any."""
        self.client = None
        with self.budget.hold():
            self._server.close()

    def close(self) -> None:
        """Stop what runs and remove what was written."""
        self.stop()
        self._all.close()
