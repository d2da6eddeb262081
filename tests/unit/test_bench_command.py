"""``margingate bench`` from its command line to its files, with fake servers in the place of real ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_server import FakeServer

from sglang_margingate.bench import options
from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.bench.servers.process import OURS, STOCK
from sglang_margingate.bench.side_by_side.compare import MODES
from sglang_margingate.bench.side_by_side.modes import choose, command, parse_mode_flags
from sglang_margingate.cli import main

FLAGS = ["--device", "cpu", "--skip-tokenizer-init"]


class Servers:
    """Starts fakes and remembers what was asked for."""

    def __init__(self) -> None:
        self.started: list[tuple[str, list[str], str]] = []
        self.seen: dict[str, list[dict[str, object]]] = {}
        self.fail = self.interrupt = ""

    @contextmanager
    def start(self, _args: argparse.Namespace, flags: Sequence[str], label: str, module: str) -> Iterator[Client]:
        self.started.append((label, list(flags), module))
        if label == self.fail:
            raise ServerError("the server died (exit 1): no memory")
        if label == self.interrupt:
            raise KeyboardInterrupt
        with FakeServer(tokenizer=False, seconds=0.002) as fake:
            yield Client(fake.base_url)
            self.seen[label] = fake.seen


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    found = Servers()
    monkeypatch.setattr(options, "started", found.start)
    return found


def bench(tmp: Path, *words: str, flags: Sequence[str] = ()) -> int:
    model = tmp / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 900, "max_position_embeddings": 512}))
    given = ["--dataset", "random:20:6", "--limit", "8", "--repeats", "2", "-o", str(tmp / "b.json"), *words]
    return main(["bench", *given, "--", "--model-path", str(model), *FLAGS, *flags])


def test_every_server_gets_the_same_ids_and_the_flags(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--mode-flags", "stock=--disable-radix-cache", "--share", "50,100"]
    assert bench(tmp_path, "--modes", "stock,gate,canonical", *extra, flags=["--margingate-chunk", "32"]) == 0
    flags = {label: words for label, words, _ in servers.started}
    assert all({"--skip-tokenizer-init", "--model-path"} <= set(words) for words in flags.values())
    assert "--margingate-chunk" not in flags["stock"]
    assert flags["stock"][-1] == "--disable-radix-cache"
    assert "--disable-radix-cache" not in flags["gate"]
    assert flags["gate"][-2:] == ["--margingate-chunk", "32"]
    assert "--margingate-fast-path" in flags["canonical"]
    sent = {label: {tuple(b["input_ids"]) for b in seen} for label, seen in servers.seen.items()}  # type: ignore[arg-type]
    assert len(sent["stock"]) == 8
    assert sent["stock"] == sent["gate"] == sent["canonical"]
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    assert "8 prompts (random:20:6), exactly 6 tokens each" in text
    assert "stock also: --disable-radix-cache" in text
    assert "| canonical |   50% |" in text
    assert (tmp_path / "b.md").read_text().strip() in text
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["complete"]
    assert [(c["mode"], c["share"], c["identical"]["denominator"]) for c in found["cells"]] == [
        ("stock", 100.0, 16), ("gate", 50.0, 8), ("gate", 100.0, 16), ("canonical", 50.0, 8), ("canonical", 100.0, 16)
    ]  # fmt: skip


def test_defaults_are_all_modes_of_the_machine_at_four_shares(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tmp_path) == 0
    assert [label for label, *_ in servers.started] == ["stock", "log", "gate", "canonical", "always"]
    found = json.loads((tmp_path / "b.json").read_text())
    assert [c["share"] for c in found["cells"] if c["mode"] == "gate"] == [2.0, 10.0, 50.0, 100.0]
    assert "deterministic mode needs CUDA and does not exist on a CPU" in " ".join(capsys.readouterr().out.split())


def test_failure_and_interrupt_keep_the_rest(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers.fail = "gate"
    assert bench(tmp_path, "--modes", "stock,gate,log") == 2
    found = json.loads((tmp_path / "b.json").read_text())
    assert [c["mode"] for c in found["cells"]] == ["stock", "log"]
    assert not found["complete"]
    assert "**gate: not measured**: the server died (exit 1): no memory" in capsys.readouterr().out
    servers.fail, servers.interrupt = "", "gate"
    assert bench(tmp_path, "--modes", "stock,gate,log") == 130
    found = json.loads((tmp_path / "b.json").read_text())
    assert [c["mode"] for c in found["cells"]] == ["stock"]
    text = capsys.readouterr().out
    assert "Interrupted: not everything" in text
    assert "kept what was measured" in text


def test_join_goes_on_with_the_same_work(servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "b.json"
    assert bench(tmp_path, "--modes", "stock") == 0
    assert bench(tmp_path, "--modes", "log,stock", "--join", str(first)) == 0
    found = json.loads(first.read_text())
    assert [c["mode"] for c in found["cells"]] == ["stock", "log", "stock (2)"]
    assert found["cells"][1]["ratio_to_stock"]["tokens_per_s"] is not None
    capsys.readouterr()
    assert bench(tmp_path, "--seed", "1", "--join", str(first)) == 2
    error = capsys.readouterr().err
    assert "measured with prompts_digest" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "flags", "message"),
    [
        (["--modes", "moon"], [], "'moon' is unknown; use stock, stock-flashinfer, log, gate"),
        (["--modes", "deterministic"], [], "needs CUDA and does not exist on a CPU; leave deterministic out"),
        ([], ["--margingate-policy=log"], "-- --margingate-policy: bench sets it for each server; choose with --modes"),
        ([], ["--port", "1"], "-- --port: bench sets it"),
        (["--mode-flags", "gate"], [], "give modes and flags"),
        (["--mode-flags", "moon=--a"], [], "'moon' is unknown"),
        (["--mode-flags", "log='--a"], [], "close the quotes"),
        (["--mode-flags", "stock=--margingate-chunk 3"], [], "not for stock, which is SGLang alone"),
        (["--mode-flags", "gate=--margingate-policy off"], [], "--mode-flags --margingate-policy: bench sets it"),
    ],
)
def test_wrong_words_are_one_line_before_any_server(
    words: list[str], flags: list[str], message: str, servers: Servers, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert bench(tmp_path, *words, flags=flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not servers.started


def test_on_a_gpu_stock_and_deterministic_are_sglang_alone() -> None:
    given = ["--model-path", "m", "--margingate-chunk", "32", "--margingate-allow-untested", "--max-total-tokens=9"]
    assert choose(None, cpu=False) == (list(MODES), "")
    stock = command("stock", False, given, ["--x"], Path("t"), None)
    assert stock == (STOCK, ["--model-path", "m", "--max-total-tokens=9", "--x"])
    deterministic = command("deterministic", False, given, [], Path("t"), None)
    assert deterministic.module == STOCK
    assert deterministic.flags[0] == "--enable-deterministic-inference"
    gate = command("canonical", False, given, [], Path("t"), Path("p.json"))
    assert gate.module == OURS
    assert gate.flags[-len(given) :] == given
    assert "--margingate-profile" in gate.flags
    assert command("stock", True, given, [], Path("t"), None).flags[:2] == ["--margingate-policy", "off"]
    assert parse_mode_flags(["stock,log=--a 'b c'", "log=--d"]) == {
        "stock": ["--a", "b c"], "log": ["--a", "b c", "--d"]
    }  # fmt: skip
