"""The command line: help at once, one-line errors, and commands that need no server."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_process import SGLangProcess

from sglang_margingate import __version__, cli
from sglang_margingate.cli import COMMANDS, main


def test_help_shows_each_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        line = next(line for line in lines if line.strip().startswith(name + " "))
        assert line.endswith(command.help)
        assert len(line) <= 80


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"serve", "dashboard", "evidence"}))
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: margingate {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sglang_margingate.cli import main; main([]); "
        "assert not {'numpy', 'pandas', 'rich', 'httpx', 'torch', 'sglang'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sglang-margingate {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["check", "--concurrency", "1"], "'1' is not a whole number of at least 2"),
        (["check", "--moon"], "unrecognized arguments: --moon"),
        (["calibrate", "--target-miss", "2"], "'2' is not a number from 0 to 1"),
        (["bench", "--share", "0"], "'0' is not a number from 0.01 to 100"),
        (["export", "x"], "one of the arguments --csv --chrome -o/--out is required"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs", "/nowhere"], "margingate runs: error: /nowhere: no such folder"),
        (["export", "/nowhere", "--csv", "/tmp/x"], "margingate export: error: /nowhere: no such folder"),
        (["check", "--dataset", "moon"], "margingate check: error: unknown dataset 'moon'"),
        (
            ["bench", "--modes", "fast"],
            "margingate bench: error: --modes: 'fast' is unknown; use stock, stock-flashinfer",
        ),
        (["calibrate", "--data", "/nowhere"], "margingate calibrate: error: dataset nowhere: no file /nowhere"),
    ],
)
def test_wrong_values_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_serve_becomes_the_front_door(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda _path, argv: seen.append(argv))
    main(["serve", "--margingate-policy", "log", "--port", "1"])
    main(["dashboard", "traces"])
    assert seen == [
        [sys.executable, "-m", "sglang_margingate.launch_server", "--margingate-policy", "log", "--port", "1"],
        [sys.executable, "-m", "sglang_margingate.dashboard", "traces"],
    ]


def test_runs_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_margingate.trace import TraceWriter

    assert main(["runs", str(tmp_path)]) == 0
    TraceWriter(tmp_path, {"model": "tiny", "policy": "gate"}).close()
    run = next(p for p in tmp_path.iterdir() if p.is_dir())
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["export", str(run), "--csv", str(tmp_path / "csv")]) == 0
    assert main(["export", str(run), "--chrome", str(tmp_path / "trace.json")]) == 0
    # The option of `report`: the ending says which of the two.
    assert main(["export", str(run), "-o", str(tmp_path / "again")]) == 0
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == ["requests.csv", "steps.csv"]
    assert main(["export", str(run), "-o", str(tmp_path / "again.json")]) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "trace.json").read_bytes()
    assert main(["export", str(run), "-o", str(tmp_path / "steps.csv")]) == 2
    out = capsys.readouterr().out
    assert "no runs in" in out
    assert "tiny" in out
    assert (tmp_path / "csv" / "steps.csv").exists()
    json.loads((tmp_path / "trace.json").read_text())


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_margingate.bench import cmd_runs

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cmd_runs, "runs", interrupted)
    assert main(["runs"]) == 130
    assert capsys.readouterr().err == "margingate runs: interrupted\n"


def test_evidence_lists_its_scripts_and_runs_one(capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_margingate.bench.evidence.command import SCRIPTS

    folder = Path(cli.__file__).parent / "bench" / "evidence"
    files = {f.stem.replace("_", "-") for f in folder.rglob("*.py") if "def main(argv: list[str]" in f.read_text()}
    assert files == set(SCRIPTS), "every script is in the list"
    assert main(["evidence"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in SCRIPTS)
    assert main(["evidence", "moon"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("margingate evidence: error: 'moon' is unknown; use alone-vs-batch, ")
    assert len(error.splitlines()) == 1
    with pytest.raises(SystemExit) as end:
        main(["evidence", "soak", "--help"])
    assert end.value.code == 0
    assert "usage: margingate evidence soak" in capsys.readouterr().out


def test_every_room_is_packed_and_no_test_double() -> None:
    from setuptools import find_packages

    root = Path(cli.__file__).parents[1]
    found = re.search(r"include = (\[.*?\])", (root / "pyproject.toml").read_text(), re.DOTALL)
    include = ast.literal_eval(found[1])
    packed = {p for where in (".", "kernels", "dashboard") for p in find_packages(str(root / where), include=include)}
    rooms = {
        ".".join(f.parent.relative_to(root / where).parts)
        for where in (".", "kernels", "dashboard")
        for top in include
        for f in (root / where / top.removesuffix(".*")).rglob("*.py")
        if (root / where / top.removesuffix(".*")).is_dir()
    }
    assert packed == rooms, "a folder with code lacks its __init__.py, or a pattern is missing"
    assert not [p for p in packed if p.split(".")[0] in ("tests", "kernels", "dashboard", "traces")]


def test_stock_tools_say_how_they_are_called(sglang: SGLangProcess, capsys: pytest.CaptureFixture[str]) -> None:
    from sglang_margingate import stock

    assert stock.main([]) == 2
    assert stock.main(["--help"]) == 0
    assert "usage: python -m sglang_margingate.stock TOOL" in capsys.readouterr().out
    if importlib.util.find_spec("sglang") is not None:
        done = sglang.run("import sys; from sglang_margingate.stock import main; sys.exit(main(['moon']))")
        assert done.returncode == 2
        assert "moon is no module" in done.stderr
