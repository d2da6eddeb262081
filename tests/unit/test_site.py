"""The documentation builds into a site without a warning, and its reference pages are made from the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_margingate.cli import COMMANDS
from sglang_margingate.serving.frontdoor import build_parser

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    rooms = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "dashboard")]
    env = dict(os.environ, NO_MKDOCS_2_WARNING="1", PYTHONPATH=os.pathsep.join(rooms))
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run = build(folder)
    assert run.returncode == 0, run.stderr
    assert "WARNING" not in run.stderr
    return folder


def text(site: Path, page: str) -> str:
    return re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text("utf-8"))


def test_every_flag_and_command_is_documented(site):
    flags, commands = text(site, "flags"), text(site, "commands")
    for action in build_parser()._actions:
        for option in action.option_strings:
            assert option in flags or option in ("-h", "--help"), option
    for name in COMMANDS:
        assert f'id="{name}"' in (site / "commands" / "index.html").read_text("utf-8"), name
    assert "%(default" not in flags + commands


def test_every_metric_is_documented(site):
    source = (ROOT / "sglang_margingate" / "runtime" / "metrics.py").read_text("utf-8")
    named = {*re.findall(r'counter\("(\w+)"', source), *re.findall(r'"margingate_(\w+)"', source)}
    assert len(named) > 5
    page = text(site, "metrics")
    assert [name for name in named if f"margingate_{name}" not in page] == []


def test_every_environment_variable_is_documented(site):
    rooms = (ROOT / "sglang_margingate", ROOT / "dashboard")
    sources = "".join(p.read_text("utf-8") for room in rooms for p in room.rglob("*.py"))
    named = set(re.findall(r"\bMARGINGATE_[A-Z_]*[A-Z]\b", sources))
    assert len(named) > 10
    page = text(site, "environment")
    assert [name for name in named if name not in page] == []


def test_the_python_api_is_made_from_the_docstrings(site):
    page = text(site, "api")
    for name in ("read_run", "RunFollower", "load_profile", "run_together", "serve", "DecodeAttention", "top2_margin"):
        assert name in page, name
    assert "Each :meth" not in page
    assert not re.findall(r":(?:func|class|meth):", page)


def test_links_between_files_of_the_repository_are_links_between_pages(site):
    guide = (site / "guide" / "index.html").read_text("utf-8")
    assert 'href="../trace-columns/"' in guide  # ../traces/README.md
    assert "traces/README.md" not in guide
    home = (site / "index.html").read_text("utf-8")
    assert 'href="guide/"' in home
    assert 'src="images/idea.svg"' in home


def test_a_dead_link_is_an_error(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](gone.md)")
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nstrict: true\nnav: [index.md]\n")
    assert build(tmp_path / "out", tmp_path / "mkdocs.yml").returncode != 0
