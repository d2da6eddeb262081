"""``check --logprobs``, ``--record`` and ``--against``: what is compared, and what leads the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer

from sglang_margingate.bench.check.identity import Observation, first_difference, identity
from sglang_margingate.bench.servers.client import Completion
from sglang_margingate.cli import main

PARTS = {"machine": {"driver": "570"}, "weights": "w"}
STATUS = {"fingerprint": {"system_fingerprint": "mg-a", "parts": PARTS}}
NEWER = {"fingerprint": {"system_fingerprint": "mg-b", "parts": {**PARTS, "machine": {"driver": "580"}}}}


def check(fake: FakeServer, *words: str) -> int:
    command = [
        "check",
        "--no-template",
        "--dataset",
        "arith",
        "--limit",
        "6",
        "--phases",
        "alone,together",
        "--repeats",
        "1",
    ]
    return main([*command, "--base-url", fake.base_url, *words])


def test_log_probabilities_are_asked_for_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(noise=1e-7) as fake:
        assert check(fake) == 0, "the tokens are the same"
        assert check(fake, "--logprobs", "5") == 1
        assert fake.seen[-1]["top_logprobs_num"] == 5
        assert (fake.seen[-1]["return_logprob"], fake.seen[-1]["logprob_start_len"]) == (True, 0)
        assert check(fake, "--logprobs", "5", "--expect-fail") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "log-probabilities in every bit" in out
    assert "log-probabilities: output_token_logprobs[0]: [-" in out


def test_equal_log_probabilities_pass_and_fail_the_inverse_test(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as fake:
        assert check(fake, "--logprobs", "0") == 0
        assert check(fake, "--logprobs", "0", "--expect-fail") == 1
    assert "FAIL (expected to fail)" in capsys.readouterr().out


def recorded(path: Path, *words: str, status: dict[str, Any] | None = None) -> dict[str, Any]:
    with FakeServer(status=status or STATUS) as fake:
        assert check(fake, "--record", str(path), *words) == 0
    return json.loads(path.read_text())


def test_recorded_answers_are_the_first_run_of_another_server(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "answers.json"
    found = recorded(path, "--logprobs", "2")
    assert found["fingerprint"] == STATUS["fingerprint"]
    assert len(found["answers"]) == 6
    assert all(a["tokens"] and a["logprobs"] for a in found["answers"].values())
    capsys.readouterr()
    with FakeServer(status=STATUS) as fake:
        assert check(fake, "--against", str(path), "--logprobs", "2") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "fingerprint: mg-a, as recorded: the answers must be equal"
    assert out[1].startswith("recorded: 6 of these 6 prompts")


def test_what_differs_in_the_fingerprint_leads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    recorded(path)
    data = json.loads(path.read_text())
    for answer in data["answers"].values():
        answer["tokens"][3] += 1
    path.write_text(json.dumps(data))
    capsys.readouterr()
    with FakeServer(status=NEWER) as fake:
        assert check(fake, "--against", str(path)) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "fingerprint: recorded mg-a, here mg-b; what differs:"
    assert out[1] == "  machine.driver: 570, here 580"
    assert any("recorded against alone" in line for line in out)
    assert not any("--phases recorded" in line for line in out), "no phase of that name can be run"


def test_a_server_without_a_fingerprint_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    recorded(path)
    capsys.readouterr()
    with FakeServer(status={"fingerprint": None}) as fake:
        assert check(fake, "--against", str(path)) == 0
    assert capsys.readouterr().out.startswith("fingerprint: this server has none")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "is no file of `margingate check --record`"),
        ("[", "not whole"),
        ('{"schema": "margingate-answers/1", "fingerprint": {}, "answers": {"a": {"text": ""}}}', "not whole"),
        ('{"schema": "margingate-answers/1", "fingerprint": {}, "answers": {}}', "none of these 6 requests is in"),
        (None, "cannot read"),
    ],
)
def test_a_wrong_file_is_one_line(
    text: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "answers.json"
    if text is not None:
        path.write_text(text)
    with FakeServer() as fake:
        assert check(fake, "--against", str(path)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line


def test_other_requests_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.json"
    recorded(path)
    with FakeServer() as fake:
        assert check(fake, "--against", str(path), "--max-tokens", "12") == 2
        assert check(fake, "--against", str(path), "--logprobs", "1") == 2
    assert "ask for the same prompts" in capsys.readouterr().err


def test_a_difference_in_log_probabilities_alone_says_where() -> None:
    def answer(**meta: Any) -> Completion:
        return Completion("p", (1, 2), "stop", meta=meta)

    one, other = answer(output_token_logprobs=[[-1.0, 1]]), answer(output_token_logprobs=[[-1.5, 1]])
    assert identity(one) != identity(other)
    said = first_difference(Observation("a", one), Observation("b", other)).describe()
    assert said == "log-probabilities: output_token_logprobs[0]: [-1.0, 1] is not [-1.5, 1]"
    none = first_difference(Observation("a", one), Observation("b", answer())).describe()
    assert none == "log-probabilities: output_token_logprobs: not the same entries"
