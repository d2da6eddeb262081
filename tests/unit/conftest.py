"""What holds for every unit test."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_writer_is_left() -> Iterator[None]:
    """A writer that a test left open goes on writing its manifest while others run, with whatever they have patched."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "margingate-trace"]
