"""The determinism check: what it finds, what it proves, and how it says so."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_server import FakeServer

from sglang_margingate.bench.check.identity import Runs, identity
from sglang_margingate.bench.check.phases import PHASES, Plan, run_check
from sglang_margingate.bench.check.verdict import WIDTH, judge, render
from sglang_margingate.bench.servers.client import Client, Completion, Prompt, ServerError
from sglang_margingate.bench.servers.gauges import Gauge
from sglang_margingate.bench.servers.openai_client import OpenAIClient, connect
from sglang_margingate.cli import main


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p-{i}", f"prompt number {i} with some words", "fake") for i in range(count)]


def check(*words: str) -> int:
    return main(["check", "--no-template", "--dataset", "arith", "--limit", "12", *words])


def test_clean_server_passes_with_proof_of_batches(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with FakeServer() as fake:
        assert check("--base-url", fake.base_url, "--json", str(tmp_path / "c.json")) == 0
    out = capsys.readouterr().out
    assert out.startswith("PASS: 12/12 prompts gave the same output in every run")
    assert "had two or more rows" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["batches"]["proven"]
    assert found["pairs"] == {"different": 0, "total": 12 * 66}
    assert [p["name"] for p in found["phases"]] == list(PHASES)
    passes = [(b["sampling_params"].get("custom_params") or {}).get("margingate_repeat") for b in fake.seen]
    assert sorted({p for p in passes if p is not None}) == list(range(12)), "each pass is numbered for the trace"
    assert passes[0] == 0, "alone comes first"


def test_failure_begins_with_its_command_and_fits_the_screen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with FakeServer(flip_rate=0.01) as fake:
        words = ("--base-url", fake.base_url, "--json", str(tmp_path / "c.json"), "--junit", str(tmp_path / "c.xml"))
        assert check(*words) == 1
        assert check("--base-url", fake.base_url, "--expect-fail") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("margingate check --base-url http://127.0.0.1:")
    assert max(map(len, lines)) <= WIDTH
    assert "FAIL: " in out
    assert "PASS (expected to fail)" in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["exit_code"] == 1
    assert "--phases alone," in found["reproduce"] or "--phases together" in found["reproduce"]
    suite = ElementTree.parse(tmp_path / "c.xml").getroot().find("testsuite")
    assert suite is not None
    assert int(suite.attrib["failures"]) == len(found["changed"]) == len(suite.findall("testcase/failure"))


def test_clean_server_fails_the_inverse_test(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as fake:
        assert check("--base-url", fake.base_url, "--expect-fail") == 1
    assert "FAIL (expected to fail)" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_finds_one_flip_in_ten_thousand_steps_within_2000_requests_of_64_tokens(seed: int) -> None:
    # About 10.6 flips are expected: a check that compares everything misses them all with probability 2.5e-5.
    with FakeServer(flip_rate=1e-4, seed=seed, seconds=0.004) as fake:
        plan = Plan(fail_fast=True, background=0, stagger=0.01)
        result = run_check(Client(fake.base_url), prompts(2000 // 12), plan, Gauge(fake.base_url))
        assert fake.served <= 2000
    assert judge(result).word == "FAIL"
    assert result.stopped_at_first


def test_the_same_length_of_traffic_without_flips_passes() -> None:
    with FakeServer(seconds=0.004) as fake:
        plan = Plan(repeats=1, background=0, stagger=0.01)
        result = run_check(Client(fake.base_url), prompts(100), plan, Gauge(fake.base_url))
    assert judge(result).word == "PASS"
    assert result.runs.pairs() == (0, 100 * 15)


def test_server_that_forms_no_batches_is_not_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(serial=True) as fake:
        assert check("--base-url", fake.base_url, "--phases", "alone,together", "--repeats", "1") == 2
    assert "INVALID: no batch formed in together: nothing was tested" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gauge", "words"), [("none", "NOT PROVEN"), ("loads", "from /v1/loads"), ("metrics", "from /metrics")]
)
def test_gauges_of_other_servers(gauge: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(gauge=gauge, seconds=0.03) as fake:
        assert check("--base-url", fake.base_url, "--phases", "alone,together", "--concurrency", "4") == 0
        assert all("custom_params" not in body["sampling_params"] for body in fake.seen), "stock SGLang gets none"
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("token_ids", "by"), [(True, "token ids"), (False, "texts and finish reasons")])
def test_openai_compatible_server(token_ids: bool, by: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(native=False, token_ids=token_ids, gauge="metrics", flip_rate=0.02, seconds=0.01) as fake:
        assert isinstance(connect(fake.base_url), OpenAIClient)
        assert check("--base-url", fake.base_url + "/v1", "--phases", "alone,together") == 1
    assert by in " ".join(capsys.readouterr().out.split())


def test_dying_server_keeps_what_was_seen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with FakeServer(dies_after=30) as fake:
        assert check("--base-url", fake.base_url, "--json", str(tmp_path / "c.json")) == 2
    out = capsys.readouterr().out
    assert out.startswith("INCOMPLETE: POST http://127.0.0.1:")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["phases"][0]["requests"] == 24
    assert found["error"]


def test_unreachable_server_and_wrong_names_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--base-url", "http://127.0.0.1:9") == 2
    assert check("--base-url", "http://127.0.0.1:9", "--phases", "moon") == 2
    assert check("--base-url", "http://127.0.0.1:9", "--", "--margingate-policy", "log") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert "connection refused" in lines[0]
    assert "'moon' is unknown; use alone, together" in lines[1]
    assert "flags of a server to start" in lines[2]


def test_interrupt_keeps_results() -> None:
    count = 0

    def done() -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with FakeServer() as fake:
        result = run_check(Client(fake.base_url), prompts(9), Plan(), Gauge(fake.base_url), done=done)
    assert result.error == "interrupted"
    assert result.runs.outputs == 5
    assert judge(result).word == "INCOMPLETE"


def completion(tokens: tuple[int, ...], reason: str = "length", text: str = "") -> Completion:
    return Completion("p", tokens, reason, text)


def test_identity_is_tokens_and_finish_reason() -> None:
    assert identity(completion((1, 2), text="a")) == identity(completion((1, 2), text="b"))
    assert identity(completion((1, 2))) != identity(completion((1, 2), "stop"))
    assert identity(completion((), text="a")) != identity(completion((), text="b"))


def test_all_pairs_are_compared() -> None:
    runs = Runs()
    for run, tokens in (("a #1", (1, 2)), ("b #1", (1, 3)), ("b #2", (1, 3)), ("c #1", (1, 2, 3))):
        runs.add(run, completion(tokens))
    assert runs.pairs() == (5, 6), "the two of b are the same, whatever the first run gave"
    assert runs.against_first("b") == (2, 2)
    assert runs.changed() == ["p"]
    first = runs.first()
    assert first is not None
    assert first.describe() == "token 1: 2 is not 3"


def test_reason_only_difference_is_named() -> None:
    runs = Runs()
    runs.add("alone #1", completion((1,)))
    runs.add("together #1", completion((1,), "stop"))
    first = runs.first()
    assert first is not None
    assert first.describe() == "finish reason: length is not stop"


def test_server_flags_stay_last_in_the_command_to_reproduce() -> None:
    runs_of = Plan(phases=("alone", "together"), repeats=1, background=0)
    with FakeServer(flip_rate=0.2) as fake:
        result = run_check(Client(fake.base_url), prompts(6), runs_of, Gauge(fake.base_url))
    text = render(result, judge(result), ["margingate", "check", "--", "--margingate-policy", "log"], {})
    assert "--phases alone,together -- --margingate-policy log" in " ".join(text.replace("\\\n", " ").split())


def test_error_of_a_request_is_one_line() -> None:
    with FakeServer(native=False) as fake, pytest.raises(ServerError, match="HTTP 404"):
        Client(fake.base_url).generate(prompts(1)[0])


def test_an_alone_that_was_not_alone_is_no_reference(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The outputs are equal all the same: without its gauge the check would pass."""
    stop = threading.Event()
    with FakeServer(seconds=0.03) as fake:

        def neighbour() -> None:
            client = Client(fake.base_url)
            while not stop.is_set():
                client.generate(prompts(1)[0], 8)

        others = [threading.Thread(target=neighbour) for _ in range(3)]
        for thread in others:
            thread.start()
        report = tmp_path / "c.json"
        try:
            words = ["--base-url", fake.base_url, "--phases", "alone,together", "--json", str(report)]
            assert check(*words) == 2
            assert check(*words, "--expect-fail") == 2
        finally:
            stop.set()
            for thread in others:
                thread.join()
        quiet = tmp_path / "quiet.json"
        assert check(*words[:-1], str(quiet)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "INVALID: alone was not alone: other requests ran in " in out
    assert "stop the other traffic and check again" in out
    assert (json.loads(report.read_text())["alone"], json.loads(quiet.read_text())["alone"]) == (False, True)
