"""``margingate bench --workload`` from its command line to its files, with fake servers in the place of real ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer

from sglang_margingate.bench import options
from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.cli import main

STOCK = {"gauge": "loads", "pool": 50_000}


class Servers:
    """Starts fakes, and remembers which ones lived at once."""

    def __init__(self) -> None:
        self.given: dict[str, dict[str, Any]] = {"stock": STOCK, "stock (2)": STOCK}
        self.living: list[str] = []
        self.most_at_once = 0
        self.room = 9
        self.started: list[tuple[str, list[str]]] = []
        self.seen: dict[str, list[dict[str, Any]]] = {}

    @contextmanager
    def start(self, _args: argparse.Namespace, flags: Sequence[str], label: str, _module: str) -> Iterator[Client]:
        self.started.append((label, list(flags)))
        if len(self.living) == self.room:
            raise ServerError("the server died (exit 1): CUDA out of memory")
        self.living.append(label)
        self.most_at_once = max(self.most_at_once, len(self.living))
        try:
            with FakeServer(tokenizer=False, seconds=0.002, **self.given.get(label, {"pool": 50_000})) as fake:
                yield Client(fake.base_url)
                self.seen[label] = fake.seen
        finally:
            self.living.remove(label)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    found = Servers()
    monkeypatch.setattr(options, "started", found.start)
    return found


def bench(tmp: Path, *words: str, flags: Sequence[str] = ("--device", "cpu")) -> int:
    model = tmp / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"vocab_size": 900, "max_position_embeddings": 512}))
    given = ["--dataset", "random:20-40:4-9", "--requests", "12", "--repeats", "2", "-o", str(tmp / "w.json"), *words]
    return main(["bench", *given, "--", "--model-path", str(model), "--skip-tokenizer-init", *flags])


def found(tmp: Path) -> dict[str, Any]:
    return json.loads((tmp / "w.json").read_text())


def test_rounds_visit_every_server_and_every_sequence_is_compared(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--workload", "closed:3,closed:6", "--modes", "stock,canonical,stock", "--goodput", "10000:10000"]
    assert bench(tmp_path, *words) == 0
    assert servers.most_at_once == 3
    cells = {(c["mode"], c["load"]): c for c in found(tmp_path)["cells"]}
    assert len(cells) == 6
    assert all(c["identical"] == {"numerator": 24, "denominator": 24} for c in cells.values())
    assert cells["canonical", "closed:6"]["promised"] == {"numerator": 24, "denominator": 24}
    assert cells["stock", "closed:6"]["promised"]["denominator"] == 0
    assert all(r["goodput"] == 1.0 for c in cells.values() for r in c["rounds"])
    assert cells["stock (2)", "closed:3"]["rounds"][0]["decode_steps"] > 0
    assert len(cells["canonical", "closed:3"]["ratio_spread"]["tokens_per_s"]) == 2
    assert 2 <= cells["canonical", "closed:6"]["batches"]["largest"] <= 6
    # Both loads have the same requests, so each is run alone once, and alone indeed.
    alone = found(tmp_path)["alone"]["canonical"]
    assert (alone["runs"], alone["batches"]["largest"], alone["cached_tokens"]) == (12, 1, 0)
    sent = [tuple(b["input_ids"]) for b in servers.seen["canonical"]]
    assert sent.count(sent[-1]) >= 5
    text = capsys.readouterr().out
    assert "of stock" in text
    assert "GPU busy" not in text, "what cannot be read is absent"
    assert (tmp_path / "w.md").read_text().strip() in text


def test_stock_gets_no_flag_that_its_defaults_have_not(servers: Servers, tmp_path: Path) -> None:
    words = ["--workload", "closed:3", "--modes", "stock,stock-flashinfer,canonical", "--identity", "none"]
    assert bench(tmp_path, *words, flags=["--device", "cuda"]) == 0
    assert servers.most_at_once == 1, "nothing says that their memory would do for all"
    flags = {label: " ".join(given) for label, given in servers.started}
    assert "attention" not in flags["stock"]
    assert "prefill" not in flags["stock"]
    assert "--attention-backend flashinfer --cuda-graph-backend-prefill disabled" in flags["stock-flashinfer"]
    assert all("identical" not in c for c in found(tmp_path)["cells"])


def test_servers_that_do_not_fit_come_one_after_the_other(servers: Servers, tmp_path: Path) -> None:
    servers.room = 1
    assert bench(tmp_path, "--workload", "closed:3") == 0
    assert servers.most_at_once == 1
    result = found(tmp_path)
    assert [c["mode"] for c in result["cells"]] == ["stock", "canonical"]
    assert any(
        "Not all servers fit at once (the server died (exit 1): CUDA out of memory)" in n for n in result["notes"]
    )
    assert "Servers: one after the other." in result["notes"]


def test_a_broken_promise_is_exit_1(servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    servers.given["canonical"] = {"flip_rate": 0.2, "pool": 50_000}
    assert bench(tmp_path, "--workload", "closed:6") == 1
    cell = found(tmp_path)["cells"][1]
    assert cell["identical"]["numerator"] < 24
    assert "though it claimed" in cell["first_difference"]
    assert "**canonical, closed:6: broken promise**" in capsys.readouterr().out


def test_differences_without_a_promise_are_only_counted(servers: Servers, tmp_path: Path) -> None:
    servers.given["stock"] = STOCK | {"flip_rate": 0.2}
    assert bench(tmp_path, "--workload", "closed:6", "--identity", "all") == 0
    assert found(tmp_path)["cells"][0]["identical"]["numerator"] < 24


def test_running_servers_and_conversations(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fakes = [stack.enter_context(FakeServer(tokenizer=False, seconds=0.002, pool=50_000)) for _ in range(2)]
        urls = [w for name, f in zip("ab", fakes) for w in ("--base-url", f"{name}={f.base_url}")]
        words = ["--dataset", "random:6:4", "--requests", "12", "--repeats", "1", "--vocab", "900"]
        out = ["-o", str(tmp_path / "w.json")]
        load = ["--workload", "sessions:2:3:16,poisson:200,burst:4:0.05"]
        assert main(["bench", *words, *out, *urls, *load]) == 0
        result = found(tmp_path)
        assert [c["mode"] for c in result["cells"][:2]] == ["a", "b"]
        assert result["loads"]["sessions:2:3:16"]["conversations"] == 4
        assert all(c["identical"] == {"numerator": 12, "denominator": 12} for c in result["cells"])
        lengths = [len(b["input_ids"]) for b in fakes[0].seen if b.get("rid", "").startswith("random-0002/sessions")]
        assert lengths == [16 + 6 + 4 + 6 + 4 + 6], "the third turn holds the prefix, two turns and their answers"
        firsts = {tuple(b["input_ids"][:16]) for b in fakes[0].seen if "/sessions" in b.get("rid", "")}
        assert len(firsts) == 1, "four conversations are one group"


def test_company_beside_the_runs_alone_is_an_error(servers: Servers, tmp_path: Path) -> None:
    class Busy(FakeServer):
        def decode(self, text: str, steps: int) -> list[int]:
            tokens = super().decode(text, steps)
            self.by_rows[2] += 1
            return tokens

    with Busy(tokenizer=False, seconds=0.002, pool=50_000) as fake:
        words = [
            "--dataset",
            "random:6:4",
            "--requests",
            "3",
            "--repeats",
            "1",
            "--vocab",
            "900",
            "--workload",
            "closed:2",
        ]
        assert main(["bench", *words, "-o", str(tmp_path / "w.json"), "--base-url", f"a={fake.base_url}"]) == 2
    assert "the runs alone were not alone: up to 2 requests ran there" in found(tmp_path)["failures"]["a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workload", "poisson:0"], "RATE '0' is not a number above 0"),
        (["--workload", "moon"], "'moon' is no kind of load"),
        (["--workload", "closed:2", "--dataset", "zipf:3"], "unknown dataset 'zipf:3'; known are"),
        (["--workload", "closed:2", "--dataset", "random:9-3:4"], "ends below its beginning"),
        (["--workload", "closed:2", "--dataset", "random:500:80"], "do not fit the model's context of 512"),
        (["--workload", "closed:80", "--requests", "80"], "runs at most 64 requests at once; ask for 64"),
        (
            ["--workload", "closed:12", "--dataset", "random:400:100", "--mode-flags", "stock=--x"],
            "holds 5,000; ask for 10 ",
        ),
        (["--workload", "closed:2", "--join", "x.json"], "--join is not for --workload"),
        (["--workload", "closed:2", "--base-url", "http://h:1"], "give name and address, as ours="),
        (["--workload", "replay:no.jsonl"], "replay:no.jsonl: no such file"),
        (["--base-url", "a=http://h:1"], "--base-url is for --workload"),
    ],
)
def test_wrong_input_is_one_line(
    servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    servers.given["stock"] = {"gauge": "loads", "pool": 5_000}
    if "--base-url" in words:
        given = ["bench", "-o", str(tmp_path / "w.json"), *words]
        assert main(given) == 2
    else:
        assert bench(tmp_path, *words) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert message in error[0]
