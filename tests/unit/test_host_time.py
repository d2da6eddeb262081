"""What our hooks do for each token of a server: how many calls, how many tensors, and that the command measures it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sglang_margingate.bench.evidence import host_time
from sglang_margingate.bench.evidence.host_time import Host
from sglang_margingate.trace import read_run

STEPS = 12


@pytest.fixture(autouse=True)
def _without_the_kernel() -> Any:
    with mock.patch("sglang_margingate.runtime.step.top2_margin", host_time.logits_read):
        yield


def run(host: Host, steps: range) -> None:
    for step in steps:
        host.forward(host.reqs, step, {})


def started(rows: int, folder: Path) -> Host:
    host = Host(rows, folder)
    host.open()
    for req in host.reqs:
        host.forward([req], 0, {})
    run(host, range(1, 5))
    return host


def calls(rows: int, folder: Path) -> int:
    """Count the calls of Python functions in twelve decode steps; the trace's thread is not counted."""
    host, found = started(rows, folder), 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(note)
    try:
        run(host, range(5, 5 + STEPS))
    finally:
        sys.setprofile(None)
    host.writer.close()
    return found


def test_a_row_of_a_decode_costs_few_calls(tmp_path: Path) -> None:
    """The budget of a step: calls are what Python time is made of, and unlike it they can be counted."""
    few, many = calls(8, tmp_path / "few"), calls(48, tmp_path / "many")
    assert (many - few) / (40 * STEPS) <= 5
    assert few / STEPS <= 150


def test_a_decode_makes_one_tensor_on_the_device_and_none_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, made = started(8, tmp_path), []
    for name in ("empty", "tensor", "stack", "zeros", "cat"):
        original = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, name=name, original=original, **k: made.append((name, k)) or original(*a, **k)
        )
    run(host, range(5, 5 + STEPS))
    host.writer.close()
    assert [name for name, _ in made] == ["empty"] * STEPS
    assert not any(k.get("pin_memory") for _, k in made)


def test_what_was_measured_is_what_a_server_does(tmp_path: Path) -> None:
    """The command's stand-ins must lead where a server's requests lead: to rows of the trace, structural ones."""
    host = started(3, tmp_path)
    run(host, range(5, 10))
    host.close(10, {})
    host.writer.close()
    assert host.recorder.totals.steps == 30
    assert host.recorder.totals.structural == 27
    steps = read_run(host.writer.path).steps
    assert len(steps) == 30
    assert set(steps["second_token"]) == {6}


def test_the_command_prints_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert host_time.main(["--rows", "3", "--steps", "4", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "a decode of 3" in out
    assert "a prefill of 1" in out
