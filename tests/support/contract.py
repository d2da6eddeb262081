"""Reads what margingate stands on from SGLang's source text, without importing it.

A touch point is a function, whose signature and body count, or some names of a class or module. What it is in one version
is a small record; records of the tested versions lie in tests/contract/records. A signature is what a caller would notice:
names, order, defaults, and whether a call gives a generator. Nothing here depends on the Python that reads.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "contract" / "records"

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Touch:
    """One thing of SGLang's that margingate stands on.

    Parameters
    ----------
    target
        Dotted path of a function, class or module.
    names
        Of a class or module: the names that are used. Empty for a function.
    """

    target: str
    names: tuple[str, ...] = ()


class Sources:
    """The Python files of one SGLang.

    Parameters
    ----------
    root
        The folder that holds ``sglang``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = lru_cache(maxsize=None)(self._parse)
        self._text: dict[str, list[str]] = {}
        self._index = lru_cache(maxsize=None)(self._read_index)

    def _parse(self, module: str) -> ast.Module | None:
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                self._text[module] = text.splitlines()
                return ast.parse(text)
        return None

    def read(self, touch: Touch) -> dict[str, Any] | None:
        """Return what a touch point is in this version: plain types, or None where there is no such thing."""
        parts = touch.target.split(".")
        for cut in range(len(parts), 0, -1):
            module = ".".join(parts[:cut])
            if self._tree(module) is None:
                continue
            if cut == len(parts):
                return {"names": _present(touch.names, _names(self._tree(module)))}
            found = self._find(module, parts[cut])
            for name in parts[cut + 1 :]:
                found = None if found is None else self._member(*found, name)
            return None if found is None else self._describe(*found, touch.names)
        return None

    def _describe(self, module: str, node: Node, names: tuple[str, ...]) -> dict[str, Any]:
        if isinstance(node, ast.ClassDef):
            return {"names": _present(names, self._attributes(module, node))}
        return {"signature": signature(node), "body": _digest(node, self._text[module])}

    def _read_index(self, module: str) -> tuple[dict[str, Node], dict[str, tuple[str, str]]]:
        """Return a module's classes and functions, and what it imports from other modules of SGLang."""
        written: dict[str, Node] = {}
        imported: dict[str, tuple[str, str]] = {}
        for node in ast.walk(self._tree(module) or ast.Module([], [])):
            if isinstance(node, Node):
                written.setdefault(node.name, node)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("sglang"):
                for alias in node.names:
                    imported.setdefault(alias.asname or alias.name, (str(node.module), alias.name))
        return written, imported

    def _find(self, module: str, name: str, seen: tuple[str, ...] = ()) -> tuple[str, Node] | None:
        """Return a class or function and where it is written, through imports."""
        written, imported = self._index(module)
        if name in written:
            return module, written[name]
        if name not in imported or module in seen:
            return None
        return self._find(*imported[name], (*seen, module))

    def _bases(self, module: str, node: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
        found = [self._find(module, base.id) for base in node.bases if isinstance(base, ast.Name)]
        return [(where, base) for where, base in filter(None, found) if isinstance(base, ast.ClassDef)]

    def _member(self, module: str, node: Node, name: str) -> tuple[str, Node] | None:
        """Return a method and where it is written, through base classes."""
        for item in node.body:
            if isinstance(item, Node) and item.name == name:
                return module, item
        if isinstance(node, ast.ClassDef):
            for where, base in self._bases(module, node):
                found = self._member(where, base, name)
                if found is not None:
                    return found
        return None

    def _attributes(self, module: str, node: ast.ClassDef) -> set[str]:
        """Return a class's fields, methods, and everything its methods set on ``self``."""
        found = _names(node)
        for item in ast.walk(node):
            stored = isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store)
            if stored and isinstance(item.value, ast.Name) and item.value.id == "self":
                found.add(item.attr)
        for where, base in self._bases(module, node):
            found |= self._attributes(where, base)
        return found


def _names(node: Any) -> set[str]:
    """Return what a class or module defines at its top level, imports too."""
    found: set[str] = set()
    for item in node.body:
        if isinstance(item, Node):
            found.add(item.name)
        elif isinstance(item, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in item.names}
        elif isinstance(item, (ast.Assign, ast.AnnAssign)):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(item, (ast.If, ast.Try)):
            found |= _names(item)
    return found


def _present(names: tuple[str, ...], found: set[str]) -> dict[str, bool]:
    return {name: name in found for name in sorted(names)}


def signature(node: Node) -> str:
    """Return how a function is called and what kind of thing a call gives."""
    assert not isinstance(node, ast.ClassDef)
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    own = list(_own(node))
    generator = "generator " if any(isinstance(n, (ast.Yield, ast.YieldFrom)) for n in own) else ""
    kind = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    marks = [d.id for d in node.decorator_list if isinstance(d, ast.Name)]
    bound = " ".join(f"@{mark}" for mark in marks if mark in ("classmethod", "staticmethod", "property"))
    return f"{bound} {kind}{generator}({ast.unparse(arguments)})".strip()


def _own(node: ast.AST) -> Any:
    """Walk a function without the functions inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _own(child)


def _digest(node: Node, lines: list[str]) -> str:
    """Return a hash of a function's statements as they are written, without docstring, indentation and comment lines."""
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1 else node.body
    text = [line.strip() for line in lines[body[0].lineno - 1 : body[-1].end_lineno]]
    return hashlib.sha256("\n".join(line for line in text if line and line[0] != "#").encode()).hexdigest()[:16]


def record(sources: Sources, touches: list[Touch]) -> dict[str, Any]:
    """Return what every touch point is in one version."""
    return {touch.target: sources.read(touch) for touch in sorted(touches, key=lambda t: t.target)}


def recorded() -> list[str]:
    """Return the versions that have a record, oldest first."""
    return sorted((path.stem for path in RECORDS.glob("*.json")), key=lambda v: [int(n) for n in v.split(".")])


def load(version: str) -> dict[str, Any]:
    """Return the record of a tested version."""
    found: dict[str, Any] = json.loads((RECORDS / f"{version}.json").read_text())
    return found


def save(version: str, found: dict[str, Any]) -> Path:
    """Write a version's record, one touch point a line."""
    path = RECORDS / f"{version}.json"
    lines = [f" {json.dumps(target)}: {json.dumps(what)}" for target, what in found.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


@dataclass(frozen=True)
class Difference:
    """What a version does otherwise than a record."""

    broken: list[str]
    """Calls and names that are no longer the same: an adapter or a hook must follow."""
    to_read: list[str]
    """Functions that are called as before but do something else."""


def compare(known: dict[str, Any], found: dict[str, Any]) -> Difference:
    """Compare a version with a record; each line names the touch point and what changed."""
    broken, to_read = [], []
    for target in sorted(known.keys() | found.keys()):
        before, after = known.get(target), found.get(target)
        if before == after and target in known and target in found:
            continue
        if target not in known or target not in found:
            broken.append(
                f"{target}: not in the {'record' if target not in known else 'table'}; record the version anew"
            )
        elif before is None or after is None:
            broken.append(f"{target}: {'new' if before is None else 'gone'}")
        elif "names" in after:
            lost = [name for name, there in after["names"].items() if before.get("names", {}).get(name) != there]
            broken.append(f"{target}: changed {', '.join(lost)}" if lost else f"{target}: other names are asked for")
        elif before.get("signature") != after["signature"]:
            broken.append(f"{target}: called {after['signature']}, recorded {before.get('signature')}")
        else:
            to_read.append(f"{target}: another body")
    return Difference(broken, to_read)
