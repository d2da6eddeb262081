"""tests/gpu/mixed_load.py on fake servers: what it starts, when, with which flags, and what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import FakeServer

from sglang_margingate.bench.servers.client import Client, ServerError
from sglang_margingate.bench.servers.process import OURS, STOCK

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
mixed_load = __import__("mixed_load")


class Started:
    def __init__(self) -> None:
        self.order: list[str] = []
        self.flags: dict[str, tuple[str, str]] = {}
        self.living: set[str] = set()
        self.together: list[set[str]] = []
        self.flip_rate = 0.0
        self.dead = ""

    @contextmanager
    def serve(self, flags: Sequence[str], log: Path, timeout: float, module: str) -> Iterator[Any]:
        name = log.stem
        self.order.append(name)
        if name == self.dead:
            raise ServerError("the server died (exit 1): no kernel image")
        self.flags[name] = module, " ".join(flags)
        self.living.add(name)
        self.together.append(set(self.living))
        own = name == "ours"
        more = {"flip_rate": self.flip_rate} if own else {"gauge": "loads"}
        with FakeServer(tokenizer=False, seconds=0.001, pool=90_000, most_requests=80, **more) as fake:  # type: ignore[arg-type]
            yield SimpleNamespace(client=Client(fake.base_url))
        self.living.remove(name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Started:
    found = Started()
    monkeypatch.setattr(mixed_load, "serve", found.serve)
    monkeypatch.setattr(mixed_load, "prepare", lambda words, script: None)
    monkeypatch.setattr(mixed_load, "device", lambda cpu: "a fake GPU")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 900, "max_position_embeddings": 40960}))
    return found


def mixed(tmp_path: Path, *words: str) -> int:
    given = ["--out", str(tmp_path / "out"), "--model", str(tmp_path), "--lengths", "8-20:3-6", "--requests", "12"]
    return int(mixed_load.main([*given, "--loads", "2,6", *words]))


def test_all_modes(started: Started, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed(tmp_path) == 0
    assert set(started.order[:2]) == {"stock", "ours"}
    assert started.order[2:] == ["stock-flashinfer"]
    assert {"stock", "ours"} in started.together
    assert {"ours", "stock-flashinfer"} in started.together, "stock is gone; ours runs alone what it ran in company"
    module, flags = started.flags["stock"]
    assert module == STOCK
    assert "attention" not in flags
    assert "prefill" not in flags
    assert "--cuda-graph-backend-prefill disabled" in started.flags["stock-flashinfer"][1]
    assert started.flags["ours"][0] == OURS
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "medians of 2 rounds;" in " ".join((tmp_path / "out" / "results.md").read_text().split())
    cells = {(c["mode"], c["load"]): c for c in found["cells"]}
    assert len(cells) == 6
    assert all(len(c["rounds"]) == 2 for c in cells.values())
    assert cells["ours", "closed:6"]["identical"] == {"numerator": 24, "denominator": 24}
    assert "identical" not in cells["stock", "closed:6"]
    assert found["alone"]["ours"]["batches"]["largest"] == 1
    last = capsys.readouterr().out.strip().splitlines()[-7:]
    assert last[0].split()[:3] == ["load", "mode", "tokens/s"]
    assert [line.split()[:2] for line in last[1:]] == [
        [load, mode] for load in ("closed:2", "closed:6") for mode in ("stock", "ours", "stock-flashinfer")
    ]


def test_a_broken_promise_and_a_spent_budget(started: Started, tmp_path: Path) -> None:
    started.flip_rate = 0.3
    assert mixed(tmp_path, "--modes", "stock,ours", "--budget", "0", "--rounds", "3") == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(len(c["rounds"]) == 1 for c in found["cells"])
    said = " ".join((tmp_path / "out" / "results.md").read_text().split())
    assert "medians of 1 round (3 were asked for);" in said, "the table says what was run, not what was asked"


def test_a_server_that_dies_leaves_the_others(started: Started, tmp_path: Path) -> None:
    started.dead = "stock"
    assert mixed(tmp_path, "--rounds", "1") == 2
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["failures"] == {"stock": "the server died (exit 1): no kernel image"}
    assert {c["mode"] for c in found["cells"] if c["rounds"]} == {"ours", "stock-flashinfer"}


def test_sessions_and_steps(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = mixed_load.mixed_steps
    monkeypatch.setattr(steps, "STEPS", (steps.Steps(20, 2, 6), steps.Steps(80_000, 2, 6)))
    monkeypatch.setattr(steps, "PREFILLS", {"2 of 30": (30, 30), "9 of 20000": (20_000,) * 9})
    assert mixed(tmp_path, "--modes", "stock,ours", "--rounds", "1", "--steps", "2", "--loads", "sessions:2:3:16") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["steps"]) == {"step at 2 behind 20", "prefill 2 of 30"}, "what the pool cannot hold is left out"
    assert all(len(by[mode]) == 2 for by in found["steps"].values() for mode in ("stock", "ours"))
    assert all(rate > 0 for rates in found["steps"]["prefill 2 of 30"].values() for rate in rates)
    cells = {c["mode"]: c for c in found["cells"]}
    assert cells["ours"]["identical"] == {"numerator": 12, "denominator": 12}
    assert found["loads"]["sessions:2:3:16"]["conversations"] == 4
    assert "step at 2 behind 20" in (tmp_path / "out" / "results.md").read_text()
    assert "step at 2 behind 20" in capsys.readouterr().out


def test_another_shape_is_given_weights_of_its_own(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, made = tmp_path / "some-shape", []
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps({"vocab_size": 700, "max_position_embeddings": 40960}))

    def make(command: Sequence[str], check: bool) -> None:
        made.append(command[-2:])
        out = Path(command[-1])
        out.mkdir()
        (out / "config.json").write_text((shape / "config.json").read_text())

    monkeypatch.setattr(mixed_load, "GPU", SimpleNamespace(weights=tmp_path / "shm" / "llama-8b"))
    monkeypatch.setattr(mixed_load.subprocess, "run", make)
    (tmp_path / "shm").mkdir()
    words = ["--out", str(tmp_path / "out"), "--shape", str(shape), "--lengths", "8-20:3-6", "--requests", "4"]
    assert mixed_load.main([*words, "--modes", "stock,ours", "--loads", "2", "--rounds", "1"]) == 0
    assert made == [[str(shape), str(tmp_path / "shm" / "some-shape")]]
    assert f"--model-path {tmp_path / 'shm' / 'some-shape'} " in started.flags["ours"][1]


def test_one_server_at_a_time_and_lengths_of_a_load_of_its_own(started: Started, tmp_path: Path) -> None:
    words = ("--modes", "stock,ours-triton,deterministic", "--apart", "--rounds", "1", "--loads", "2,3@5*30-40:2-3")
    assert mixed(tmp_path, *words) == 0
    assert started.order == ["ours-triton", "stock", "deterministic"]
    assert all(len(living) == 1 for living in started.together)
    assert "--margingate-prefill-attention triton" in started.flags["ours-triton"][1]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: load["requests"] for name, load in found["loads"].items()} == {"closed:2": 12, "closed:3": 5}
    cells = {(c["mode"], c["load"]): c for c in found["cells"]}
    assert cells["ours-triton", "closed:3"]["identical"] == {"numerator": 5, "denominator": 5}
    assert cells["ours-triton", "closed:2"]["ratio_to_first"], "stock is what all are compared with"


def test_a_profile_follows_the_rounds_on_the_same_servers(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile_load = __import__("profile_load")
    profiled: list[str] = []

    def profile(client: Client, folder: Path, steps: int, activity: str) -> None:
        folder.mkdir(parents=True)
        profiled.append(f"{folder.parent.name} {folder.name} {steps} {activity}")
        events = [{"cat": "kernel", "name": "top2_kernel", "ts": 1000.0 * k, "dur": 500.0} for k in range(3)]
        (folder / "a.trace.json").write_text(json.dumps({"traceEvents": events}))

    monkeypatch.setattr(profile_load, "prepare", lambda words, script: None)
    monkeypatch.setattr(profile_load, "profile", profile)
    monkeypatch.setattr(profile_load, "AFTER", dict.fromkeys(profile_load.PHASES, 0.0))
    monkeypatch.setattr(profile_load, "DECODES", [profile_load.mixed_steps.Steps(20, 2, 6)])
    monkeypatch.setattr(profile_load, "PREFILLS", {"1 of 64": (64,), "1 of 130": (130,)})
    given = ["--out", str(tmp_path / "out"), "--model", str(tmp_path), "--lengths", "8-20:3-6", "--requests", "12"]
    assert profile_load.main([*given, "--in-flight", "4", "--rounds", "1", "--loads", "2,6", "--steps", "9"]) == 0
    assert sorted(started.order) == ["ours", "stock"]
    assert profiled == [
        f"{name} {phase}" for name in ("stock", "ours")
        for phase in ("first 3 GPU", "mixed 9 GPU", "decode 9 GPU", "prefill 1 GPU")
    ]  # fmt: skip
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["ours"]["decode"]["busy"] == pytest.approx(0.5)
    assert found["stock"]["host"] is None
    out = capsys.readouterr().out
    assert "closed:6" in out
    assert out.count("prefill  ours") == 1


def test_what_attends_is_what_the_server_says() -> None:
    attention = mixed_load.report._attention
    found = {"invariance": {"prefill_attention": "fa3", "decode_attention": "margingate"}}
    assert attention({"attention_backend": "flashinfer", "status": found}) == (
        "flashinfer (prefills: fa3, decode graphs: margingate)"
    )
    assert attention({"attention_backend": "fa3", "status": None}) == "fa3"
    plain = {"invariance": {"prefill_attention": "sglang", "decode_attention": "sglang"}}
    assert attention({"attention_backend": None, "status": plain}) == "unknown"
