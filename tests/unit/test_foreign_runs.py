"""Answers of other engines become runs that the pages read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_margingate.bench.foreign import import_run
from sglang_margingate.bench.options import UsageError
from sglang_margingate.cli import main
from sglang_margingate.gate.request import digest
from sglang_margingate.trace import read_run

PLAIN = {
    "id": "a",
    "prompt": "Once",
    "token_ids": [5, 6],
    "finish_reason": "stop",
    "dataset": "story",
    "repeat": 1,
    "e2e_ms": 9.5,
}
OPENAI = {
    "id": "b",
    "model": "m",
    "prompt_token_ids": [1, 2],
    "choices": [
        {
            "finish_reason": "length",
            "message": {"content": "xy"},
            "logprobs": {
                "content": [
                    {"token": "x", "token_id": 7, "top_logprobs": [{"token": "x", "token_id": 7, "logprob": -0.5}, {"token": "z", "token_id": 9, "logprob": -1.25}]},
                    {"token": "y", "token_id": 8, "top_logprobs": []},
                ]
            },
        }
    ],
}  # fmt: skip


def lines(file: Path, *answers: Any) -> Path:
    file.write_text("\n".join(a if isinstance(a, str) else json.dumps(a) for a in answers) + "\n")
    return file


def test_both_shapes_are_read(tmp_path: Path) -> None:
    path, count = import_run(lines(tmp_path / "x.jsonl", PLAIN, OPENAI), tmp_path / "traces")
    run = read_run(path)
    assert (count, run.manifest["model"], run.warnings) == (2, "m", [])
    assert run.steps["token"].tolist() == [5, 6, 7, 8]
    assert run.steps["token_text"].tolist()[2:] == ["x", "y"]
    assert run.steps["margin"][2] == pytest.approx(0.75)
    assert run.steps["second_token"][2] == 9
    rows = run.requests
    assert rows["output_digest"].tolist() == [digest([5, 6]), digest([7, 8])]
    assert rows["prompt_digest"][1] == digest([1, 2])
    assert rows["guarantee"].astype(str).tolist() == ["none", "none"]
    assert rows["e2e_ms"][0] == 9.5


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("{", "line 2"), ("[1]", "a JSON object"), ({"prompt": "x"}, "no token_ids"), ({"token_ids": [-1]}, "no token_ids"),
        ({"token_ids": ["a"]}, "no token_ids"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_named_by_its_line(answer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        import_run(lines(tmp_path / "x.jsonl", PLAIN, answer), tmp_path / "traces")
    assert not (tmp_path / "traces").exists(), "nothing is written before all of it was read"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "x.jsonl", PLAIN)
    traces = tmp_path / "traces"
    assert main(["runs", "import", str(file), str(traces), "--model", "theirs"]) == 0
    assert "1 requests" in capsys.readouterr().out
    assert main(["runs", "compact", str(traces)]) == 0
    assert "theirs" in capsys.readouterr().out
    assert main(["runs", "import"]) == 2
    assert main(["runs", "import", str(tmp_path / "none.jsonl"), str(traces)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
