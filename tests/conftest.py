"""What all tests share: how they are spread over processes, and one process that holds SGLang."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sglang_process import SGLangProcess

TESTS = Path(__file__).parent

GROUPS = {
    "canonical_server": "canonical",
    "log_server": "canonical",  # one test compares the two
    "gate_server": "gate",
    "audit_server": "audit",
    "address": "browser",
}
"""Fixtures that take seconds to make, and the group of the tests that use them: one process runs a group, and makes them once.

Groups stand in the order in which they are begun: the longest first.
"""
LONG = ("unit/test_kernels_compile.py", "unit/test_kernels_interpreter.py")
"""Files of minutes, begun before all that is short: one that began last would have one core wait for the other."""

AFTER_GROUPS = len(GROUPS)

UNMEASURED = ("browser/", "contract/", "server/", "unit/test_dashboard_")
"""Tests that stand for other rooms than those whose coverage is measured: line by line they take half as long again."""


# For `make mutants`, where each mutant runs the tests that reach it: the same examples each time, and few of them.
hypothesis.settings.register_profile("mutants", max_examples=25, deadline=None, derandomize=True, database=None)


def pytest_configure() -> None:
    """Heed SIGINT: a background shell has it ignored, which every process that a test starts would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def place(item: pytest.Item) -> tuple[int, str | None]:
    """Return when a test's turn is, and its group; None for one that runs wherever there is room."""
    for turn, (fixture, group) in enumerate(GROUPS.items()):
        if fixture in getattr(item, "fixturenames", ()):
            return turn, group
    name = item.path.relative_to(TESTS).as_posix()
    if name in LONG:
        return AFTER_GROUPS, name
    return (AFTER_GROUPS + 1, None) if name.startswith("server/") else (AFTER_GROUPS + 2, name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what starts servers first: it takes longest, and the many short tests fill what is left of the processes' time."""
    places = {item: place(item) for item in items}
    for item, (_, group) in places.items():
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
        if item.path.relative_to(TESTS).as_posix().startswith(UNMEASURED):
            item.add_marker(pytest.mark.no_cover)
    items.sort(key=lambda item: places[item][0])


@pytest.fixture(scope="session")
def sglang() -> Iterator[SGLangProcess]:
    """A process that has imported SGLang: code that needs it, and most servers, run in a fork of it."""
    process = SGLangProcess()
    yield process
    process.close()
