"""The canonical radix cache on SGLang's real tree: who shares what, and that no slot of K/V is lost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from sglang_process import SGLangProcess

from sglang_margingate.runtime.namespaces import namespace, opened_gated

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

KEYS = [None, "", "k", "margingate:fast", "margingate:fast:k", namespace(True, None), namespace(False, "k"), '"]', "\\"]


@pytest.fixture(scope="module")
def scenes(sglang: SGLangProcess) -> dict[str, dict[str, int]]:
    program = Path(__file__).parents[1] / "support" / "radix_scenarios.py"
    return sglang.value("import runpy; runpy.run_path(sys.argv[1], run_name='__main__')", str(program))


@pytest.mark.parametrize("key", KEYS)
def test_no_clients_key_names_the_other_side(key: Any) -> None:
    assert opened_gated(namespace(True, key))
    assert not opened_gated(namespace(False, key))
    gated, ungated = {namespace(True, k) for k in KEYS}, {namespace(False, k) for k in KEYS}
    assert not gated & ungated
    assert len(gated) == len(KEYS) - 1, "an empty key is no key; all others have a name of their own"


def test_an_adapter_is_not_a_clients_key() -> None:
    """SGLang joins the client's key and the adapter's id to one text."""
    assert namespace(True, "keyid", "id") != namespace(True, "keyid")
    assert namespace(True, "id", "id") == namespace(True, None, "id")
    assert namespace(True, None, None, 1) != namespace(True, None, None, 0)
    assert not opened_gated(None)


@needs_sglang
def test_no_slot_is_lost(scenes: dict[str, dict[str, int]]) -> None:
    assert {name: scene["leaked"] for name, scene in scenes.items() if scene["leaked"]} == {}


@needs_sglang
def test_a_forged_key_finds_nothing(scenes: dict[str, dict[str, int]]) -> None:
    forged = {name: scene["hit"] for name, scene in scenes.items() if "asks for" in name}
    assert len(forged) == 6
    assert set(forged.values()) == {0}


@needs_sglang
def test_one_kind_and_one_key_share(scenes: dict[str, dict[str, int]]) -> None:
    assert scenes["gated, same key"] == {"hit": 8, "other": 0, "leaked": 0}
    assert scenes["ungated, same key"] == {"hit": 16, "other": 0, "leaked": 0}
    assert scenes["prefill only"]["hit"] == 8
    assert scenes["other weights"]["hit"] == 0


@needs_sglang
def test_what_a_request_was_opened_as_decides(scenes: dict[str, dict[str, int]]) -> None:
    """After giving up, nothing more is inserted, and a retraction still finds prompt columns only."""
    assert scenes["gave up in the prefill"]["hit"] == 0
    assert scenes["gave up while decoding"]["hit"] == 8
    assert scenes["gave up, retracted"]["hit"] == 8


@needs_sglang
def test_an_unseen_request_shares_nothing(scenes: dict[str, dict[str, int]]) -> None:
    assert scenes["unseen"] == {"first": 0, "second": 0, "third": 0, "leaked": 0}
