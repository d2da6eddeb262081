"""When things happened: on a GPU by events of the device, since the host looks one forward late or more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Marks moments without waiting; reads them once they have passed."""

    late: bool
    """Whether marks pass later than they are made."""
    waited_s: float
    """Seconds that the host spent in waits so far."""

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
    waited_s = 0.0

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
        self.waited_s = 0.0

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        """Wait for the event; one that had not come yet ties the clock."""
        if not mark.query():
            start = time.perf_counter()
            mark.synchronize()
            self.waited_s += time.perf_counter() - start
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


BUDGET_SHARE = 0.05
"""Most that our hooks may take of the scheduler's time from one forward to the next."""
IDLE_SECONDS = 0.5
"""After a longer pause the scheduler had nothing to do; the pause is nobody's step."""


@dataclass
class _Spent:
    forwards: int = 0
    waited: int = 0
    seconds: float = 0.0
    most: float = 0.0
    of_seconds: float = 0.0


class Pauses:
    """How long Python's garbage collector stopped this process; one of ``gc.callbacks``."""

    def __init__(self) -> None:
        self.pauses, self.seconds, self.most = 0, 0.0, 0.0
        self._began: float | None = None

    def __call__(self, phase: str, _info: dict[str, Any]) -> None:
        """Note that a collection begins or ends."""
        now = time.perf_counter()
        if phase == "start":
            self._began = now
        elif self._began is not None:
            self.pauses += 1
            self.seconds += now - self._began
            self.most = max(self.most, now - self._began)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return {"pauses": self.pauses, "ms": round(self.seconds * 1e3, 3), "most_ms": round(self.most * 1e3, 3)}


class HostTime:
    """What our hooks take of the scheduler's thread, beside the time from one forward to the next.

    Forwards at which the host waited for a verdict (verifies, audits) are counted apart: their time is the device's.
    """

    def __init__(self) -> None:
        self._spent = {"decode": _Spent(), "prefill": _Spent()}
        self._last = 0.0
        self.pauses = Pauses()
        """Of the garbage collector, once it is one of its callbacks."""

    def forward(self, decode: bool, seconds: float, waited: bool, now: float) -> None:
        """Note a forward whose tokens are chosen.

        Parameters
        ----------
        decode
            It decodes; False: it prefills.
        seconds
            What our hooks took of it.
        waited
            The host waited for a verdict meanwhile.
        now
            ``time.perf_counter()`` when its tokens were chosen.
        """
        spent, since = self._spent["decode" if decode else "prefill"], now - self._last
        self._last = now
        if waited:
            spent.waited += 1
            return
        spent.forwards += 1
        spent.seconds += seconds
        spent.most = max(spent.most, seconds)
        # What our own hooks took is part of it, so the share of a forward after a pause is not above 1.
        spent.of_seconds += since if since < IDLE_SECONDS else seconds

    def to_dict(self) -> dict[str, Any]:
        """Return plain types: microseconds of a forward, and the share of the scheduler's time; None before any."""
        out: dict[str, Any] = {"budget_share": BUDGET_SHARE, "collector": self.pauses.to_dict()}
        for name, spent in self._spent.items():
            n = spent.forwards
            out[name] = {
                "forwards": n,
                "waited": spent.waited,
                "mean_us": round(spent.seconds / n * 1e6, 1) if n else None,
                "most_us": round(spent.most * 1e6, 1) if n else None,
                "step_us": round(spent.of_seconds / n * 1e6, 1) if n else None,
                "share": round(spent.seconds / spent.of_seconds, 4) if spent.of_seconds else None,
            }
        return out
