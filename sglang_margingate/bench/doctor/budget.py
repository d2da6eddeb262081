"""Time that ends: a part that still runs when the budget is spent ends as if by Ctrl-C, and keeps what it has."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Budget:
    """A number of seconds; ``with Budget(600) as budget``. Afterwards :attr:`spent` says whether it rang.

    The main thread gets SIGINT, which wakes whatever it waits for; Python's own handler, or the command's, raises
    ``KeyboardInterrupt``.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, False
        self._end = time.monotonic() + seconds
        self._held = self._due = False
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._ring)
        self._timer.daemon = True

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def __enter__(self) -> Budget:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Do not ring meanwhile: a server that is being stopped is stopped whole. What became due is said by :attr:`spent`."""
        with self._lock:
            self._held = True
        try:
            yield
        finally:
            with self._lock:
                self._held, self.spent = False, self.spent or self._due

    def _ring(self) -> None:
        with self._lock:
            if self._held:
                self._due = True
                return
            self.spent = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
