"""The truth sweep as a test: no answer of mixed traffic says more than was checked, and a broken server says nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_margingate.bench.evidence.truth_sweep import Result, report, sweep_started


def swept(folder: Path, part: str, mode: str, requests: int, knobs: dict[str, str] | None = None) -> Result | None:
    flags = ["--margingate-map-dir", str(folder / "maps")]
    found = sweep_started(folder, part, mode, requests, knobs=knobs, flags=flags)
    if found is not None:
        report(found)
    return found


@pytest.mark.parametrize(("mode", "part", "requests"), [("canonical", "mixed", 48)])
def test_no_label_says_more_than_was_checked(tmp_path: Path, mode: str, part: str, requests: int) -> None:
    found = swept(tmp_path, part, mode, requests)
    assert found is not None
    assert found.verdict() == []
    labels = {f.label for f in found.findings if f.same is not None}
    assert labels >= ({"structural", "none"} if mode == "canonical" else {"gated", "none"})
    assert found.cached > 0, "no answer used the prefix cache"
    assert found.traced > 0
