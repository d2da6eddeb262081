"""SGLang versions beside the installed one: overlays to serve from, and the sources that contract tests read.

An overlay is one folder with SGLang and the packages that it pins otherwise (requirements/overlay-VERSION.txt). First on
PYTHONPATH, it makes the one CPU environment serve that version. Sources are the wheel's Python files and nothing else:
they are read, never imported, so any Python can read those of any version.

::

    python tests/support/overlays.py                    every overlay, in .compat/VERSION
    python tests/support/overlays.py --sources 0.5.23   the sources of one version, in .compat/wheels/VERSION
"""

from __future__ import annotations

import argparse
import compileall
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPAT = ROOT / ".compat"
STAMP = "overlay.txt"

PLATFORMS = ("manylinux_2_34_x86_64", "manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux_2_17_x86_64")
"""Wheels whose sources are read, whatever machine reads them."""


class OverlayError(RuntimeError):
    """A version cannot be had here; one line says which and why."""


def requirement(version: str) -> Path:
    """Return the file that lists an overlay's packages."""
    return ROOT / "requirements" / f"overlay-{version}.txt"


def versions() -> list[str]:
    """Return the versions that have an overlay."""
    return sorted(path.stem.removeprefix("overlay-") for path in (ROOT / "requirements").glob("overlay-*.txt"))


def overlay(version: str) -> Path:
    """Return the folder that, first on PYTHONPATH, makes this Python serve ``version``; make it where it is missing."""
    folder, wanted = COMPAT / version, _stamp(version)
    if folder.joinpath(STAMP).is_file() and folder.joinpath(STAMP).read_text() == wanted:
        return folder
    COMPAT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=COMPAT, prefix=f"{version}-") as made:
        target = Path(made, "overlay")
        _pip("install", "--no-deps", "--no-warn-conflicts", "--target", str(target), "-r", str(requirement(version)),
             version=version)  # fmt: skip
        # Without .pyc files every server start takes twice as long.
        compileall.compile_dir(str(target), quiet=2)
        target.joinpath(STAMP).write_text(wanted)
        shutil.rmtree(folder, ignore_errors=True)
        target.rename(folder)
    return folder


def _stamp(version: str) -> str:
    try:
        text = requirement(version).read_text()
    except FileNotFoundError:
        raise OverlayError(f"SGLang {version}: no requirements/overlay-{version}.txt lists its packages") from None
    return f"# Python {sys.version_info.major}.{sys.version_info.minor}\n{text}"


def sources(version: str) -> Path:
    """Return a folder that holds ``sglang/**/*.py`` of ``version``: the installed one's where it is that version."""
    installed = installed_sources()
    if installed is not None and installed[0] == version:
        return installed[1]
    folder = COMPAT / "wheels" / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{version}-") as made:
        platforms = [argument for name in PLATFORMS for argument in ("--platform", name)]
        _pip("download", "--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11",
             *platforms, "--dest", made, f"sglang=={version}", version=version)  # fmt: skip
        unpacked = Path(made, "unpacked")
        with zipfile.ZipFile(next(Path(made).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if _is_source(name)])
        unpacked.rename(folder)
    return folder


def _is_source(name: str) -> bool:
    return bool(re.match(r"sglang/(srt/.*|[^/]*)\.py$", name))


def installed_sources() -> tuple[str, Path] | None:
    """Return the installed SGLang's version and the folder that holds it."""
    try:
        found: Distribution = distribution("sglang")
    except PackageNotFoundError:
        return None
    return found.version, Path(str(found.locate_file("")))


def _pip(*arguments: str, version: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["no word"]
        )
        raise OverlayError(f"SGLang {version}: pip {arguments[0]} failed: {lines[-1].strip()}")


def main(argv: list[str] | None = None) -> int:
    """Make overlays or fetch sources; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="those with an overlay by default")
    parser.add_argument("--sources", action="store_true", help="fetch the Python files only")
    args = parser.parse_args(argv)
    try:
        for version in args.versions or versions():
            print(f"SGLang {version}: {(sources if args.sources else overlay)(version)}", flush=True)
    except OverlayError as error:
        print(f"overlays: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
