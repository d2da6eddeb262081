"""Random token ids: names, draws below the vocabulary, servers with and without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_server import VOCABULARY, FakeServer

from sglang_margingate.bench.prompts.datasets import load
from sglang_margingate.bench.prompts.random_ids import (
    Lengths,
    ModelFacts,
    RandomError,
    digest,
    draw,
    model_facts,
    parse,
)
from sglang_margingate.bench.prompts.random_ids import vocabulary_of as vocabulary
from sglang_margingate.bench.servers.client import Client, Prompt
from sglang_margingate.bench.servers.gauges import SAMPLE_SECONDS
from sglang_margingate.cli import main
from sglang_margingate.gate.profile import load_profile


def ids(name: str = "random:64:16", count: int = 20, seed: int = 0, of: int = 50) -> list[tuple[int, ...]]:
    return [p.ids for p in draw(load([name], limit=count, seed=seed), of, seed)]


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 900, "max_position_embeddings": 512}))
    return str(folder)


def test_ids_lie_below_the_vocabulary_and_reach_its_ends() -> None:
    drawn = [i for row in ids(of=50) for i in row]
    assert min(drawn) == 0
    assert max(drawn) == 49


def test_same_seed_same_ids_and_other_seeds_others() -> None:
    assert ids() == ids()
    assert ids()[:5] == ids(count=5), "a prompt does not depend on how many follow"
    assert len({*ids(), *ids(seed=1)}) == 40
    assert digest(draw(load(["random"], limit=2), 9, 0)) != digest(draw(load(["random"], limit=2), 9, 1))


def test_lengths_are_fixed_or_drawn_from_their_range() -> None:
    assert parse("random") == ("random", Lengths(512, 512), Lengths(128, 128))
    prompts = load(["random:64:16"], limit=3)
    assert [(p.id, len(p.ids), p.max_tokens, p.text) for p in prompts] == [
        (f"random-000{i}", 64, 16, "") for i in range(3)
    ]
    some = load(["random:10-20:5-6"], limit=100)
    assert {len(p.ids) for p in some} == set(range(10, 21))
    assert {p.max_tokens for p in some} == {5, 6}
    assert some[:7] == load(["random:10-20:5-6"], limit=7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:0:5", r"random:0:5: INPUT '0' begins below 1; give a whole number"),
        ("random:a:b", r"random:a:b: INPUT 'a' is not a number of tokens; give a whole number"),
        ("random:5:b", r"OUTPUT 'b' is not a number of tokens"),
        ("random:5:-1", r"OUTPUT '-1' is not a number of tokens"),
        ("random:9-3:5", r"INPUT '9-3' ends below its beginning; turn it round: 3-9"),
        ("random:64", r"give the lengths of input and output, as random:512:128"),
        ("random:1:2:3", r"give the lengths of input and output"),
        ("random:", r"give the lengths of input and output"),
    ],
)
def test_malformed_names_are_one_line_with_field_and_fix(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RandomError, match=message):
        load([name])
    for command in ("check", "bench", "calibrate"):
        assert main([command, "--dataset", name]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"margingate {command}: error: dataset {name}: ")
        assert len(error.splitlines()) == 1


def test_vocabulary_comes_from_the_model_and_is_never_guessed(model: str, tmp_path: Path) -> None:
    assert model_facts(model) == ModelFacts(900, 512)
    assert model_facts(model, '{"vocab_size": 800}').vocabulary == 800, "--json-model-override-args"
    inner = tmp_path / "config.json"
    inner.write_text(json.dumps({"text_config": {"vocab_size": 7}}))
    assert model_facts(str(tmp_path)).vocabulary == 7
    inner.write_text("{")
    unknown = model_facts(str(tmp_path))
    assert unknown == model_facts("no/such-model") == ModelFacts(None, None)
    with pytest.raises(RandomError, match=r"--vocab: the vocabulary of m is not known here .* --vocab N"):
        vocabulary("m", unknown, None)
    with pytest.raises(RandomError, match="--vocab 901: the model has 900 ids"):
        vocabulary("m", ModelFacts(900, None), 901)
    assert [vocabulary("m", unknown, 5), vocabulary("m", ModelFacts(9, None), 5)] == [5, 5]
    assert vocabulary("m", ModelFacts(9, None), None) == 9


def test_check_sends_ids_at_a_fixed_length_and_no_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--dataset", "random:32:8", "--limit", "6", "--repeats", "1", "--stagger", "0.02"]
    with FakeServer(tokenizer=False, model=model) as fake:
        assert main([*words, "--base-url", fake.base_url]) == 0
    whole = [b for b in fake.seen if len(b["input_ids"]) == 32]
    heads = [b for b in fake.seen if len(b["input_ids"]) != 32]
    assert not any("text" in b for b in fake.seen)
    assert all(b["sampling_params"]["ignore_eos"] for b in fake.seen)
    assert {b["sampling_params"]["max_new_tokens"] for b in whole} == {8}
    assert {(len(b["input_ids"]), b["sampling_params"]["max_new_tokens"]) for b in heads} == {(19, 1)}, "phase prefix"
    assert max(i for b in whole for i in b["input_ids"]) < 900
    assert "PASS: 6/6 prompts" in capsys.readouterr().out


def test_difference_without_text_shows_ids(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--dataset", "random:32:40", "--limit", "6", "--phases", "alone,together"]
    with FakeServer(tokenizer=False, model=model, flip_rate=0.1) as fake:
        assert main([*words, "--base-url", fake.base_url]) == 1
    out = capsys.readouterr().out
    assert "--dataset random:32:40" in out
    excerpt = out.rstrip().splitlines()[-1].split()
    assert excerpt[0] in ("alone", "together")
    assert all(word.strip(".").isdigit() for word in excerpt[2:])


@pytest.mark.parametrize("command", ["check", "calibrate"])
def test_text_needs_a_tokenizer(
    command: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with FakeServer(tokenizer=False, model=model) as fake:
        for words in (["--dataset", "arith"], ["--dataset", "random:8:8,arith"]):
            assert main([command, "--base-url", fake.base_url, "--no-template", *words]) == 2
            error = capsys.readouterr().err
            assert "--dataset arith is text, but --skip-tokenizer-init (as /server_info says) leaves" in error
            assert "use --dataset random:512:128, or start the server without the flag" in error
            assert len(error.splitlines()) == 1
        assert not fake.seen, "nothing was sent"


def test_text_with_the_flag_of_a_server_to_start_fails_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("bench", "check", "calibrate"):
        assert main([command, "--dataset", "arith", "--", "--skip-tokenizer-init"]) == 2
        error = capsys.readouterr().err
        assert "--dataset arith is text, but --skip-tokenizer-init (the flag after --)" in error
        assert "or leave the flag out" in error


def test_text_and_ids_together_need_a_tokenizer_only(model: str) -> None:
    words = ["check", "--dataset", "random:8:8,arith", "--limit", "3", "--phases", "alone,together", "--no-template"]
    with FakeServer(model=model) as fake:
        assert main([*words, "--base-url", fake.base_url]) == 0
    lengths = {("text" in b, b["sampling_params"]["max_new_tokens"]) for b in fake.seen}
    assert lengths == {(True, 64), (False, 8)}


def test_openai_servers(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "--dataset", "random:8:8", "--limit", "4", "--phases", "alone,together", "--concurrency", "4"]
    # Every batch lasts ten times the pause between two samples of the gauge that must see it.
    with FakeServer(native=False, gauge="metrics", seconds=10 * SAMPLE_SECONDS) as fake:
        assert main([*words, "--vocab", "30", "--base-url", fake.base_url]) == 0
        assert {(len(b["prompt"]), b["max_tokens"], b["ignore_eos"]) for b in fake.seen} == {(8, 8, True)}
        capsys.readouterr()
        assert main([*words, "--base-url", fake.base_url]) == 2
        assert "give its size with --vocab N" in capsys.readouterr().err
    with FakeServer(native=False, takes_ids=False) as fake:
        assert main([*words, "--vocab", "30", "--base-url", fake.base_url]) == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "does not take token ids with ignore_eos (HTTP 422: prompt: a string is expected)" in out
    assert "use a dataset of text, as --dataset arith" in out
    with FakeServer(tokenizer=False, model=model) as fake:
        assert main([*words, "--api", "openai", "--base-url", fake.base_url]) == 2
    assert "so its OpenAI API cannot answer; use --api sglang" in capsys.readouterr().err


def test_ids_beyond_the_vocabulary_end_the_server_as_sglang_does() -> None:
    # What the draws are kept from: without this the tests above could not fail.
    with FakeServer() as fake:
        client = Client(fake.base_url)
        client.generate(Prompt("a", "", "random", ids=(VOCABULARY - 1,), max_tokens=1))
        for last in (VOCABULARY, 0):
            with pytest.raises(Exception, match="POST"):
                client.generate(Prompt("b", "", "random", ids=(last,), max_tokens=1))


def test_too_long_for_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--dataset", "random:500:13", "--", "--model-path", model, "--device", "cpu"]) == 2
    assert "500 + 13 tokens do not fit the model's context of 512" in capsys.readouterr().err
    with FakeServer(tokenizer=False, model=model) as fake:
        assert main(["check", "--base-url", fake.base_url, "--dataset", "random:500:13"]) == 2
    assert "do not fit" in capsys.readouterr().err


def test_calibration_without_a_tokenizer(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    words = ["calibrate", "--dataset", "random:16:24", "--limit", "140", "--no-refine", "-o", str(out)]
    with FakeServer(tokenizer=False, model=model, seconds=0) as fake:
        assert main([*words, "--base-url", fake.base_url]) == 0
        assert "\nrandom:16:24  " in capsys.readouterr().out, "the name is whole"
        assert main([*words, "--base-url", fake.base_url, "--seed", "1"]) == 2
    assert load_profile(out).datasets["random:16:24"].steps == 140 * 23
    assert "recorded with random_ids" in capsys.readouterr().err, "other ids under the same names"
