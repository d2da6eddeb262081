"""A device's clock, on events whose times a test chooses: looking late shifts nothing, and running away ends in a second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_margingate.runtime import clock
from sglang_margingate.runtime.clock import DeviceClock, HostClock


class World:
    """The wall clock, and a device whose own clock runs faster by a share."""

    def __init__(self) -> None:
        self.now, self.drift = 1000.0, 0.0


class Event:
    """An event that comes ``after`` seconds from when it was recorded."""

    def __init__(self, world: World, after: float = 0.0) -> None:
        self.world, self.at = world, world.now + after

    def query(self) -> bool:
        return self.world.now >= self.at

    def synchronize(self) -> None:
        self.world.now = max(self.world.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * (1 + self.world.drift) * 1e3


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    def event(enable_timing: bool) -> Any:
        made = Event(world)
        made.record = lambda: None  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(clock.time, "time", lambda: world.now)
    return world


def test_looking_late_shifts_nothing(world: World) -> None:
    device: Any = DeviceClock()
    mark = Event(world, 0.25)
    world.now += 5.0
    assert device.wall(mark) == pytest.approx(1000.25)
    assert device.span_ms(mark, Event(world)) == pytest.approx(4750)


def test_a_moment_is_never_later_than_now(world: World) -> None:
    device: Any = DeviceClock()
    world.drift = 0.5
    world.now += 10.0
    assert device.wall(Event(world, -0.001)) == 1010.0


def test_what_was_waited_for_ties_the_clock_again(world: World) -> None:
    """A device that runs away by a thousandth is a second off after a quarter of an hour, and right after one wait."""
    device: Any = DeviceClock()
    world.drift = -0.001
    world.now += 1000.0
    passed = Event(world)
    device.wait(passed)
    assert device.wall(passed) == pytest.approx(1999.0), "nobody waited: by the device's clock"
    assert device.wants_wait()
    running = Event(world, 0.004)
    device.wait(running)
    assert not device.wants_wait()
    assert device.wall(running) == pytest.approx(2000.004)
    world.now += 0.5
    assert device.wall(Event(world)) == pytest.approx(2000.504, abs=0.001)
    assert not device.wants_wait()
    world.now += 0.6
    assert device.wants_wait()


def test_a_host_has_nothing_to_tie() -> None:
    assert not HostClock().wants_wait()
