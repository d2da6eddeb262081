"""When things happened: on a GPU by events of the device, since the host looks one forward late or more."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments without waiting; reads them once they have passed."""

    late: bool
    """Whether marks pass later than they are made."""

    def mark(self) -> Any:
        """Mark this moment of the device's work."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until the moment has come."""
        ...

    def wall(self, mark: Any) -> float:
        """Return the moment in seconds since the epoch; waits until it has come."""
        ...

    def span_ms(self, begin: Any, end: Any) -> float:
        """Return the milliseconds between two moments that have come."""
        ...

    def wants_wait(self) -> bool:
        """Return whether it would keep better time if the next moment were waited for."""
        ...


class HostClock:
    """A CPU does its work when asked: a mark is the time."""

    late = False

    def mark(self) -> float:
        """Return the time."""
        return time.time()

    def wait(self, mark: float) -> None:
        """Do nothing."""

    def wall(self, mark: float) -> float:
        """Return the mark."""
        return mark

    def span_ms(self, begin: float, end: float) -> float:
        """Return the milliseconds between two marks."""
        return (end - begin) * 1e3

    def wants_wait(self) -> bool:
        """Return that it does not."""
        return False


ANCHOR_SECONDS = 1.0
"""How long a device's clock is trusted: by then it may have run away by some 50 microseconds."""


class DeviceClock:
    """CUDA events on the current stream, tied to the wall clock.

    An event that the host had to wait for has just passed, so the wall clock is read then. Others are placed by their
    distance from the event before, which the device measures: looking late does not shift them.
    """

    late = True

    def __init__(self) -> None:
        self._anchor = self.mark()
        self._anchor.synchronize()
        self._anchor_time = self._tied = time.time()

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """Wait for the event; one that had not come yet ties the clock."""
        if not mark.query():
            mark.synchronize()
            self._anchor, self._anchor_time = mark, time.time()
            self._tied = self._anchor_time

    def wall(self, mark: torch.cuda.Event) -> float:
        """Place the event on the wall clock."""
        self.wait(mark)
        if mark is not self._anchor:
            at = self._anchor_time + self._anchor.elapsed_time(mark) / 1e3
            self._anchor, self._anchor_time = mark, min(time.time(), at)
        return self._anchor_time

    def span_ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the device's milliseconds between two events."""
        return float(begin.elapsed_time(end))

    def wants_wait(self) -> bool:
        """Return whether the device's clock was not tied to the wall clock for a while."""
        return time.time() - self._tied > ANCHOR_SECONDS


def clock_of(device: Any) -> Clock:
    """Return the clock that fits a device."""
    return HostClock() if torch.device(device).type == "cpu" else DeviceClock()
