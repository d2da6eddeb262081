"""What each room may import: read from the source, imports inside functions and for types too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sglang_margingate"
OURS = PACKAGE.name

ROOMS: dict[str, tuple[str, ...]] = {
    # A room's own files, and these of ours.
    "gate": ("config", "strict_json", "words"),
    "trace": ("columns", "words"),
    "canonical": ("config", "words"),
    "runtime": ("canonical", "columns", "config", "gate", "words"),
    "settings": ("canonical", "config", "machine", "runtime"),
    "demo": (),
}
NO_SGLANG = ("gate", "trace", "canonical", "runtime", "settings")


def imports(path: Path) -> set[str]:
    """Return every module that a file imports, as absolute dotted names; `from a import b` gives `a` and `a.b`."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def files(room: str) -> list[Path]:
    found = sorted((PACKAGE / room).rglob("*.py"))
    assert found, f"there is no room {room}"
    return found


@pytest.mark.parametrize("room", NO_SGLANG)
def test_rooms_without_sglang(room: str) -> None:
    guilty = {path.name for path in files(room) if any(name.split(".")[0] == "sglang" for name in imports(path))}
    assert not guilty


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_nothing_above_them(room: str) -> None:
    allowed = (room, *ROOMS[room])
    wrong = {
        (path.name, name)
        for path in files(room)
        for name in imports(path)
        if name.startswith(f"{OURS}.") and name.split(".")[1] not in allowed
    }
    assert not wrong


def circles(rooms: tuple[str, ...]) -> list[list[str]]:
    """Return the circles of files in the given rooms: each file there that reaches itself, with its way."""
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for room in rooms for p in files(room)}
    arrows = {name: sorted((imports(path) & set(paths)) - {name}) for name, path in paths.items()}

    def way(start: str) -> list[str]:
        seen, todo = {start}, [[start]]
        while todo:
            so_far = todo.pop()
            for after in arrows[so_far[-1]]:
                if after == start:
                    return [*so_far, start]
                if after not in seen:
                    seen.add(after)
                    todo.append([*so_far, after])
        return []

    return [found for name in paths if (found := way(name))]


def test_no_circle_of_files() -> None:
    rooms = tuple(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    assert {"serving", "settings", "runtime"} <= set(rooms)
    assert not circles(rooms)


def test_sglang_is_named_in_serving_alone() -> None:
    named = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith("sglang.srt") for name in imports(path))
    }
    assert {name.split("/")[0] for name in named} == {"serving"}


def test_rooms_stay_small() -> None:
    """A room is read in one look: 16 files at one level, 400 lines a file."""
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if (path / "__init__.py").exists())]:
        assert len(list(folder.glob("*.py"))) <= 16, folder.name
    long = {path.name for path in PACKAGE.rglob("*.py") if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert not long


def test_circles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / OURS)
    room = tmp_path / OURS / "gate"
    room.mkdir(parents=True)
    (room / "a.py").write_text("from . import b\n")
    (room / "b.py").write_text(f"def f():\n    from {OURS}.gate.c import x\n")
    (room / "c.py").write_text(f"import {OURS}.gate.b\n")
    names = [f"{OURS}.gate.{n}" for n in "bcb"]
    assert circles(("gate",)) == [names, [names[1], names[0], names[1]]]


def test_the_reader_of_imports_sees_lazy_and_relative_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / OURS)
    room = tmp_path / OURS / "gate"
    room.mkdir(parents=True)
    (room / "x.py").write_text(
        "def f():\n    from sglang.srt import x\n    import torch.nn\n    from ..serving import hooks\n    from . import y\n"
    )
    assert imports(room / "x.py") >= {
        "sglang.srt.x", "torch.nn", f"{OURS}.serving.hooks", f"{OURS}.gate.y",
    }  # fmt: skip
