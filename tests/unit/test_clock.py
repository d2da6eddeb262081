"""A device's clock, on events whose times a test chooses: looking late shifts nothing, and running away ends in a second."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from sglang_margingate.runtime import clock
from sglang_margingate.runtime.clock import DeviceClock, HostClock, HostTime


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


def test_what_is_waited_is_known(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.time, "perf_counter", lambda: world.now)
    device: Any = DeviceClock()
    device.wait(Event(world, 0.25))
    device.wait(Event(world))
    assert device.waited_s == pytest.approx(0.25)


# ---- the host's share ----------------------------------------------------------------------------------------------------


def test_before_any_forward_nothing_is_claimed() -> None:
    found = HostTime().to_dict()
    assert found["decode"] == found["prefill"] == {
        "forwards": 0, "waited": 0, "mean_us": None, "most_us": None, "step_us": None, "share": None,
    }  # fmt: skip


def test_the_share_is_of_the_time_from_one_forward_to_the_next() -> None:
    host = HostTime()
    host.forward(False, 0.002, False, 100.0)  # the first after a pause: its own time is all that is known
    host.forward(True, 0.001, False, 100.010)
    host.forward(True, 0.003, False, 100.020)
    host.forward(True, 0.004, True, 100.060)  # a verify: the device's time
    host.forward(True, 0.002, False, 100.070)
    host.forward(True, 0.002, False, 200.0)  # nobody was there for a while
    found = host.to_dict()
    assert found["prefill"] == {
        "forwards": 1, "waited": 0, "mean_us": 2000, "most_us": 2000, "step_us": 2000, "share": 1.0,
    }  # fmt: skip
    decode = found["decode"]
    assert (decode["forwards"], decode["waited"], decode["mean_us"], decode["most_us"]) == (4, 1, 2000, 3000)
    assert decode["share"] == pytest.approx(0.008 / 0.032)


def test_what_the_collector_takes_is_counted() -> None:
    pauses = HostTime().pauses
    gc.callbacks.append(pauses)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(pauses)
    found = pauses.to_dict()
    assert found["pauses"] >= 1
    assert 0 < found["most_ms"] <= found["ms"]

    assert HostTime().to_dict()["collector"] == {"pauses": 0, "ms": 0.0, "most_ms": 0.0}
