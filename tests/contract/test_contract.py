"""What margingate stands on in each tested SGLang is what was recorded, read from its sources without importing it."""

from __future__ import annotations

import ast
import inspect
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import contract
import overlays
import pytest
from contract import Sources, Touch, compare, load, record, recorded
from touch_points import EITHER, EITHER_NAME, touch_points

from sglang_margingate.serving import hook_table as hooks
from sglang_margingate.settings.neutral import neutral_fields
from sglang_margingate.settings.rules import ruled_fields
from sglang_margingate.settings.support import TESTED

versions = pytest.mark.parametrize("version", recorded())


@lru_cache
def found(version: str) -> dict[str, Any]:
    return record(Sources(overlays.sources(version)), touch_points())


@versions
def test_a_tested_version_is_what_was_recorded(version: str) -> None:
    """Red: follow the change in serving/, serve the version, then ``python tests/contract/record.py VERSION --write``."""
    difference = compare(load(version), found(version))
    assert difference.broken == []
    for line in difference.to_read:
        warnings.warn(f"SGLang {version}: {line}", stacklevel=1)


def all_hooks() -> list[hooks.Hook]:
    tables = [v for name, v in vars(hooks).items() if name.endswith("_HOOKS") and isinstance(v, tuple)]
    return [hook for table in tables for hook in table]


EXTRA = {"before": 0, "replace": 0, "after": 1, "around": 1}
"""What SGLang's registry puts in front of the target's own arguments: the result, or the original."""


def target_arguments(signature: str) -> ast.arguments:
    text = signature[signature.index("(") :]
    function = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


@versions
@pytest.mark.parametrize("hook", all_hooks(), ids=lambda hook: f"{hook.kind}-{hook.target.split('.', 2)[-1]}")
def test_a_hook_can_be_called_as_its_target_is(version: str, hook: hooks.Hook) -> None:
    there = load(version)[hook.target]
    assert there is not None, f"SGLang {version} has no {hook.target}"
    wanted = target_arguments(there["signature"])
    positional = [*wanted.posonlyargs, *wanted.args]
    required = len(positional) - len(wanted.defaults)
    named = {argument.arg: None for argument in wanted.kwonlyargs}
    ours = inspect.signature(hook.function)
    extra = [None] * EXTRA[hook.kind]
    for count in {required, len(positional)}:
        ours.bind(*extra, *[None] * count, **named)


@versions
def test_of_what_moved_one_name_is_there(version: str) -> None:
    known = load(version)
    for group in EITHER:
        assert sum(known[target] is not None for target in group) == 1, group
    for pair in EITHER_NAME:
        assert sum(bool((known[target] or {"names": {}})["names"].get(name)) for target, name in pair) == 1, pair


def settings(version: str) -> set[str]:
    """Return the names of SGLang's settings: fields of ``ServerArgs``, later of the classes that it is assembled from."""
    folder = overlays.sources(version) / "sglang" / "srt"
    files = [*folder.glob("arg_groups/fields/*.py")] or [folder / "server_args.py"]
    classes = [n for file in files for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    fields = [item.target for node in classes for item in node.body if isinstance(item, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)}


def test_a_setting_that_is_listed_is_one_of_some_tested_version() -> None:
    """One of none is misspelt, or gone from all versions."""
    there = set().union(*map(settings, recorded()))
    assert len(there) > 500
    assert sorted(neutral_fields().union(ruled_fields()) - there) == []


def test_what_is_tested_is_recorded() -> None:
    assert list(TESTED) == recorded()


# ---- the reader itself ------------------------------------------------------------------------------------------------

BEFORE = '''
from sglang.base import Base

class Thing(Base):
    """A thing."""
    size: int = 0

    def run(self, batch: int, *, fast=False) -> int:
        """Run it."""
        # how
        self.ran = batch
        return batch

async def answers(rid):
    yield rid
'''

BASE = """
class Base:
    def inherited(self, a):
        return a
"""


def sources(folder: Path, text: str) -> Sources:
    folder.joinpath("sglang").mkdir(parents=True, exist_ok=True)
    folder.joinpath("sglang", "base.py").write_text(BASE)
    folder.joinpath("sglang", "thing.py").write_text(text)
    return Sources(folder)


TOUCHES = [
    Touch("sglang.thing.Thing.run"),
    Touch("sglang.thing.Thing.inherited"),
    Touch("sglang.thing.answers"),
    Touch("sglang.thing.Thing", ("size", "ran", "gone")),
    Touch("sglang.thing", ("Base", "missing")),
    Touch("sglang.nowhere.at_all"),
]


def test_what_a_touch_point_is(tmp_path: Path) -> None:
    read = record(sources(tmp_path, BEFORE), TOUCHES)
    assert read["sglang.thing.Thing.run"]["signature"] == "(self, batch, *, fast=False)"
    assert read["sglang.thing.Thing.inherited"]["signature"] == "(self, a)"
    assert read["sglang.thing.answers"]["signature"] == "async generator (rid)"
    assert read["sglang.thing.Thing"] == {"names": {"gone": False, "ran": True, "size": True}}
    assert read["sglang.thing"] == {"names": {"Base": True, "missing": False}}
    assert read["sglang.nowhere.at_all"] is None


CHANGES = [
    ("a comment and a docstring", ("# how", "# how it is done"), ("Run it.", "Run."), 0, 0),
    ("an annotation of an argument", ("batch: int", "batch: str"), None, 0, 0),
    ("a body", ("self.ran = batch", "self.ran = batch + 1"), None, 0, 1),
    ("a default", ("fast=False", "fast=True"), None, 1, 0),
    ("a new argument", ("fast=False", "fast=False, slow=None"), None, 1, 0),
    ("a renamed function", ("def run", "def go"), None, 1, 0),
    ("a generator that became a function", ("async def answers(rid):\n    yield", "def answers(rid):\n    return"), None, 1, 0),
    ("a field that is gone", ("size: int = 0", "length: int = 0"), None, 1, 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "second", "broken", "to_read"), CHANGES, ids=[c[0] for c in CHANGES])
def test_what_counts_as_a_change(tmp_path: Path, name: str, first: Any, second: Any, broken: int, to_read: int) -> None:
    after = BEFORE.replace(*first)
    after = after.replace(*second) if second else after
    assert after != BEFORE
    before = record(sources(tmp_path / "before", BEFORE), TOUCHES)
    difference = compare(before, record(sources(tmp_path / "after", after), TOUCHES))
    assert (len(difference.broken), len(difference.to_read)) == (broken, to_read), difference


def test_a_touch_point_that_is_not_recorded_is_red(tmp_path: Path) -> None:
    read = record(sources(tmp_path, BEFORE), TOUCHES)
    known = {target: what for target, what in read.items() if target != "sglang.thing.Thing.run"}
    assert compare(known, read).broken == ["sglang.thing.Thing.run: not in the record; record the version anew"]


def test_a_record_can_be_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "RECORDS", tmp_path)
    read = record(sources(tmp_path, BEFORE), TOUCHES)
    contract.save("1.2.3", read)
    assert load("1.2.3") == read
