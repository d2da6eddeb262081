"""Wheel and sdist: built from a clean tree, installed in an environment of their own, complete and with nothing that is not meant to be there."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from sglang_margingate import __version__

ROOT = Path(__file__).resolve().parents[2]
PACKED = ("sglang_margingate", "kernels/margingate_kernels", "dashboard/margingate_dashboard", "packages")
FILES = ("pyproject.toml", "README.md", "LICENSE")
MODEL = "sglang_margingate/demo/model/"


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    demo: Path
    folder: Path


def run(*words: object, cwd: Path | None = None, path: str = "") -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel(project: Path, to: Path) -> Path:
    words = (
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        to,
        project,
    )
    run(sys.executable, "-m", *words, cwd=project)
    (made,) = to.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    tree.mkdir()
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in PACKED:
        shutil.copytree(ROOT / name, tree / name, ignore=leave)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    # The wheel is made of the sdist, so what the sdist lacks is missing there, too.
    return Built(wheel(source, folder / "main"), sdist, wheel(tree / "packages" / "demo", folder / "demo"), folder)


def names(archive: Path) -> list[str]:
    return [n for n in zipfile.ZipFile(archive).namelist() if not n.endswith("/")]


def test_the_wheel_holds_every_module_and_nothing_else(built: Built) -> None:
    found = {n for n in names(built.wheel) if ".dist-info/" not in n}
    rooms = {
        "sglang_margingate": ROOT,
        "margingate_kernels": ROOT / "kernels",
        "margingate_dashboard": ROOT / "dashboard",
    }
    modules = {str(p.relative_to(at)) for room, at in rooms.items() for p in (at / room).rglob("*.py")}
    data = {f"{room}/py.typed" for room in rooms} | {
        f"sglang_margingate/demo/prompts/{p.name}" for p in (ROOT / "sglang_margingate/demo/prompts").iterdir()
    }
    assert found == modules | data
    assert built.wheel.stat().st_size < 2_000_000
    with tarfile.open(built.sdist) as archive:
        inside = [name.partition("/")[2] for name in archive.getnames()]
    assert not [
        n for n in inside if n.startswith(("tests", "docs", "evidence", "traces")) or n.endswith(".safetensors")
    ]


def test_the_model_is_a_distribution_of_its_own(built: Built) -> None:
    found = {n for n in names(built.demo) if ".dist-info/" not in n}
    assert found == {MODEL + p.name for p in (ROOT / MODEL).iterdir()}


def metadata(archive: Path) -> str:
    (name,) = [n for n in names(archive) if n.endswith(".dist-info/METADATA")]
    return zipfile.ZipFile(archive).read(name).decode()


def test_metadata(built: Built) -> None:
    text = metadata(built.wheel)
    assert f"\nVersion: {__version__}\n" in text
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert set(re.findall(r"Provides-Extra: (\S+)", text)) >= {"serve", "analysis", "dashboard", "gpu", "demo"}
    assert 'Requires-Dist: sglang-margingate-demo>=0.1; extra == "demo"' in text
    assert "Name: sglang-margingate-demo" in metadata(built.demo)
    plain = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not [line for line in plain if "torch" in line or "sglang" in line]


@pytest.fixture(scope="module")
def clean(built: Built) -> Path:
    """An environment with the wheel alone; the dependencies are lent by PYTHONPATH where a test needs them."""
    folder = built.folder / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    install(folder, built.wheel)
    return folder


def install(environment: Path, archive: Path) -> None:
    words = (
        "pip",
        "--disable-pip-version-check",
        "--python",
        environment / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
    )
    run(sys.executable, "-m", *words, archive)


def test_installed_in_a_clean_environment(built: Built, clean: Path, tmp_path: Path) -> None:
    command, python = clean / "bin" / "margingate", clean / "bin" / "python"
    assert run(command, "--version", cwd=tmp_path) == f"sglang-margingate {__version__}\n"
    assert "doctor" in run(command, "--help", cwd=tmp_path)
    # The dependencies of this environment, without its own sglang_margingate: that stands in a .pth file, which is not read.
    lent = os.pathsep.join(site.getsitepackages())
    where = "import {0}; assert {0}.__file__.startswith({1!r}), {0}.__file__"
    for package in ("sglang_margingate", "margingate_kernels", "margingate_dashboard"):
        run(python, "-c", where.format(package, str(clean)), cwd=tmp_path, path=lent)
    code = (
        "from importlib.metadata import entry_points\n"
        "found = entry_points(group='sglang.srt.plugins')\n"
        "assert 'sglang_margingate.serving.plugin:load' in {e.value for e in found}, found\n"
        "from sglang_margingate.bench.prompts.embedded import demo_prompts\n"
        "assert len(demo_prompts(6)) == 6\n"
        "from sglang_margingate.demo.paths import ModelFilesError, check_model_dir, model_path\n"
        "try:\n    check_model_dir(model_path())\nexcept ModelFilesError as error:\n    print(error)\nelse:\n    print('whole')\n"
    )
    assert "sglang-margingate[demo]" in run(python, "-c", code, cwd=tmp_path, path=lent)
    install(clean, built.demo)
    assert run(python, "-c", code, cwd=tmp_path, path=lent).strip() == "whole"
