"""The table of a mutation run says what the run found, and fails below its goal."""

from __future__ import annotations

import json
from pathlib import Path

import mutation_table
import pytest

CODE = """
def x_f__mutmut_orig(a):
    return a + 1
def x_f__mutmut_1(a):
    return a - 1
def x_f__mutmut_2(a):
    return a + 2
"""


@pytest.mark.parametrize(
    ("codes", "killed", "share", "status"),
    [
        ([1, 1, -11, 24, 0], "4", "80.0%", 1),
        ([1, 1, 3, 36, 1, 1, 1, 33], "7", "87.5%", 0),
        ([1, None, 2, -9], "1", "100.0%", 0),
    ],
)
def test_what_counts_as_killed(
    codes: list[int | None], killed: str, share: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(mutation_table, "FOLDER", tmp_path)
    (tmp_path / "gate").mkdir()
    tried = {f"gate.a.x_f__mutmut_{number}": code for number, code in enumerate(codes, 1)}
    (tmp_path / "gate" / "a.py.meta").write_text(json.dumps({"exit_code_by_key": tried}))
    assert mutation_table.main([]) == status
    file, room = capsys.readouterr().out.splitlines()[1:]
    assert file.split()[2:] == room.split()[2:] == [killed, share]


def test_survivors_are_shown_as_what_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutation_table, "FOLDER", tmp_path)
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "a.py").write_text(CODE)
    tried = {"gate.a.x_f__mutmut_1": 1, "gate.a.x_f__mutmut_2": 0}
    (tmp_path / "gate" / "a.py.meta").write_text(json.dumps({"exit_code_by_key": tried}))
    mutation_table.main(["gate/*"])
    shown = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert shown == ["gate/a x_f__mutmut_2 (survived)", "    -    return a + 1", "    +    return a + 2"]
    mutation_table.main(["trace/*"])
    assert "survived" not in capsys.readouterr().out


def test_a_run_that_tried_nothing_shows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutation_table, "FOLDER", tmp_path)
    assert mutation_table.main([]) == 1
