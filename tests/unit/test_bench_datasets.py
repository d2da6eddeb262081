"""Prompt sets by name and from files; every bad input is one line that names the place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from sglang_margingate.bench.prompts.datasets import EMBEDDED, DatasetError, load
from sglang_margingate.bench.prompts.template import TemplateError, find_template
from sglang_margingate.demo.paths import model_path


def lines(*rows: object) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded(name: str) -> None:
    found = load([name], limit=3)
    assert [p.id for p in found] == [f"{name}-00{i}" for i in range(3)]
    assert all(p.text and p.dataset == name for p in found)


def test_known_formats(tmp_path: Path) -> None:
    gsm = tmp_path / "gsm.jsonl"
    gsm.write_text(lines({"question": "How many?", "answer": "3"}))
    human = tmp_path / "HumanEval.jsonl.gz"
    human.write_bytes(gzip.compress(lines({"task_id": "HumanEval/0", "prompt": "def f():"}).encode()))
    share = tmp_path / "share.json"
    turns = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Hello"}]
    share.write_text(json.dumps([{"id": "a", "conversations": turns[1:]}, {"id": "b", "conversations": turns}]))
    found = load(["gsm8k", "humaneval", "sharegpt"], [f"gsm8k={gsm}", f"humaneval={human}", f"sharegpt={share}"])
    assert [(p.id, p.text) for p in found] == [
        ("gsm8k-0000", "How many?"),
        ("HumanEval/0", "def f():"),
        ("b", "Hi there"),
    ]


def test_any_jsonl_with_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(lines({"prompt": "one"}, {"prompt": "two", "id": "x"}) + "\n")
    assert [p.id for p in load([], [str(file)])] == ["mine-0000", "x"]
    assert [p.dataset for p in load(["mine"], [str(file)], limit=1)] == ["mine"]
    other = tmp_path / "other.jsonl"
    other.write_text(lines({"prompt": "two", "id": "x"}))
    assert [p.id for p in load([], [str(file), str(other)])] == ["mine-0000", "x", "other:x"]
    assert [p.text for p in load([], [str(file)], only=["x"])] == ["two"]


def test_the_field_of_the_user_text_can_be_named(tmp_path: Path) -> None:
    file = tmp_path / "gsm8k_test.jsonl"
    file.write_text(lines({"question": "How many?", "answer": "3"}, {"question": "Why?", "answer": 4}))
    with pytest.raises(
        DatasetError, match=r"line 1 has no field 'prompt', but question, answer; name .* --field NAME$"
    ):
        load([], [str(file)])
    assert [p.text for p in load([], [str(file)], field="question")] == ["How many?", "Why?"]
    with pytest.raises(DatasetError, match=r"line 2: field 'answer' has an unknown form, not the user's text"):
        load([], [str(file)], field="answer")
    with pytest.raises(DatasetError, match=r"line 1 has no field 'text', but question, answer"):
        load([], [str(file)], field="text")
    with pytest.raises(DatasetError, match=r"--field question names a field of a file; give the file with --data"):
        load(["arith"], field="question")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines({"prompt": "a"}, {"text": "b"}), r"line 2 has no field 'prompt'"),
        (lines({"prompt": "a"}) + "{oops\n", r"line 2 is not valid JSON"),
        (lines({"prompt": " "}), r"line 1: field 'prompt' is empty"),
        (lines(3), r"line 1 is not an object with a field 'prompt'"),
        ("", r"no prompts in it"),
        ("[1", r"not valid JSON"),
    ],
)
def test_bad_files_are_named_by_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DatasetError, match=message) as error:
        load([], [str(file)])
    assert "\n" not in str(error.value)


def test_missing_things_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match="unknown dataset 'moon'; known are arith"):
        load(["moon"])
    with pytest.raises(DatasetError, match="no file /nowhere"):
        load(["gsm8k"], ["gsm8k=/nowhere"])
    with pytest.raises(DatasetError, match="no dataset named"):
        load([])
    with pytest.raises(DatasetError, match="no prompt named 'z'"):
        load(["arith"], only=["z"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"give its file with --data gsm8k=FILE, or pip install datasets"):
        load(["gsm8k"])


def test_embedded_template() -> None:
    template = find_template(str(model_path()))
    assert template.render("2 + 2?") == "<|user|>2 + 2?<|assistant|>"
    remote = find_template("/elsewhere/site-packages/sglang_margingate/demo/model")
    assert remote.name == template.name


def test_missing_template_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TemplateError, match=r"needs transformers .* or use --no-template"):
        find_template("some/model")
