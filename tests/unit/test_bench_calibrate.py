"""Calibration against a server with a known law of flips: shadow passes, confirmation, resumption, the profile."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fake_server import FakeServer
from rich.console import Console

from sglang_margingate.bench import console
from sglang_margingate.bench.calibrate.samples import SampleError, SampleStore, covering, exact
from sglang_margingate.bench.servers.client import Client
from sglang_margingate.cli import main
from sglang_margingate.gate.profile import load_profile


def calibrate(fake: FakeServer, out: Path, *words: str) -> int:
    return main(["calibrate", "--base-url", fake.base_url, "--no-template", "--limit", "56", "-o", str(out), *words])


def test_thresholds_are_confirmed_in_a_pass_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    with FakeServer(seconds=0) as fake:
        assert calibrate(fake, out, "--dataset", "arith,code", "--json", str(tmp_path / "c.json")) == 0
    text = capsys.readouterr().out
    # At 0.5 the fake's flips reach 0.1 (6/64 on its grid); at what that suggests they reach 0.2 (12/64).
    found = json.loads((tmp_path / "c.json").read_text())["datasets"]
    assert [p["recorded_at"] for p in found["arith"]["passes"]] == [0.5, 0.09375, 0.1875]
    assert found["arith"]["threshold"] == found["code"]["threshold"] == 0.1875
    assert "threshold 0.1875, confirmed in a pass at it: triggers" in text
    assert "misses 0 of" in text
    profile = load_profile(out)
    assert profile.default_threshold == 0.5, "traffic that was not calibrated"
    assert profile.datasets["arith"].missed == 0
    assert profile.datasets["arith"].steps == 56 * 63, "the first token comes from the prefill"
    assert 0 < profile.datasets["arith"].miss_upper_95 <= 3 / (56 * 63)
    assert "unknown" in (profile.device, profile.dtype), "the fake does not tell; it is not made up"


def test_no_refine_says_what_is_approximate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(seconds=0) as fake:
        assert calibrate(fake, tmp_path / "p.json", "--dataset", "arith", "--no-refine") == 0
    assert "threshold 0.09375, approximate: recorded at 0.5, where more steps are repaired" in capsys.readouterr().out


def test_transfer_shows_the_flips_that_a_foreign_threshold_misses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(seconds=0) as fake:
        calibrate(fake, tmp_path / "p.json", "--dataset", "arith", "--transfer", "story", "--start-threshold", "0.1")
        sent = {b["sampling_params"]["custom_params"]["margingate_dataset"] for b in fake.seen}
    text = capsys.readouterr().out
    assert sent == {"arith", "story"}
    assert "story: carried over at 0.1875: misses 0 of" in text


def test_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    with FakeServer(seconds=0, dies_after=17) as fake:
        assert calibrate(fake, out, "--dataset", "arith") == 2
    assert not out.exists()
    error = capsys.readouterr().err
    assert "kept 1" in error
    with FakeServer(seconds=0) as fake:
        assert calibrate(fake, out, "--dataset", "arith") == 0
        first_pass = [b for b in fake.seen if b["sampling_params"]["custom_params"]["margingate_threshold"] == 0.5]
        assert 0 < len(first_pass) <= 56 - 14, "what was measured before is not measured again"
        assert calibrate(fake, out, "--dataset", "arith", "--max-tokens", "8") == 2
    assert "recorded with max_tokens 64, this run has 8; --fresh measures again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"policy": "log"}, "runs policy 'log', which verifies nothing; start it with --margingate-policy gate"),
        ({"audit_rate": 0.01}, "audits a share of 0.01 of untriggered steps, calibration needs all"),
    ],
)
def test_server_that_cannot_be_calibrated(
    status: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(status=status) as fake:
        assert calibrate(fake, tmp_path / "p.json", "--dataset", "arith") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_other_servers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(gauge="none") as fake:
        assert calibrate(fake, tmp_path / "p.json", "--dataset", "arith") == 2
    assert "is not a margingate server (no /margingate/status)" in capsys.readouterr().err


def test_dataset_cannot_test_its_own_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as fake:
        assert calibrate(fake, tmp_path / "p.json", "--dataset", "arith", "--transfer", "arith") == 2
    assert "a dataset cannot test its own threshold" in capsys.readouterr().err


def test_prompts_are_dealt_over_concurrency_levels(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    with FakeServer(seconds=0.005) as fake:
        assert calibrate(fake, out, "--dataset", "arith", "--concurrency", "1,8", "--no-refine") == 0
    rows = [json.loads(line) for line in out.with_name("p.json.samples.jsonl").read_text().splitlines()[1:]]
    assert sorted(r["concurrency"] for r in rows) == [1] * 28 + [8] * 28


def test_rounded_margins_do_not_hide_their_own_step() -> None:
    margin = 7 / 1024  # 0.0068359375
    assert exact(np.array([round(margin, 6)]))[0] == margin
    assert covering(margin) == margin
    assert covering(0.1234567) > 0.1234567


def test_torn_last_line_is_dropped_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    SampleStore(path, {"model": "m"}).open()
    row = {"dataset": "d", "threshold": 0.5, "prompt": "p", "margins": [0.1, 0.2], "flips": [1]}
    path.write_text(path.read_text() + json.dumps(row) + "\n" + '{"dataset": "d", "thr')
    store = SampleStore(path, {"model": "m"})
    store.open()
    assert store.resumed == 1
    assert store.sample("d", 0.5, ["p"]).flipped.tolist() == [False, True]
    path.write_text("not json\n")
    with pytest.raises(SampleError, match="damaged"):
        SampleStore(path, {"model": "m"}).open()


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    words = ["calibrate", "--no-template", "--dataset", "arith", "--concurrency", "2", "-o", str(out), "--base-url"]
    with FakeServer(seconds=0.2) as fake:
        command = [sys.executable, "-m", "sglang_margingate.cli", *words, fake.base_url]
        # A shell without job control starts background jobs, CI's among them, with SIGINT ignored; a terminal does not.
        terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=terminal) as process:
            while fake.served < 6:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate()
    assert process.returncode == 130
    kept = len(out.with_name("p.json.samples.jsonl").read_text().splitlines()) - 1
    assert kept >= 4
    assert f"kept {kept} measured prompts" in error
    assert fake.served < 56, "what was not sent yet is dropped"


def test_a_sample_too_small_confirms_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    words = ["--dataset", "arith,code", "--limit", "6", "--max-tokens", "24", "--json", str(tmp_path / "c.json")]
    with FakeServer(seconds=0) as fake:
        assert calibrate(fake, out, *words) == 1
        assert calibrate(fake, out, *words, "--no-refine") == 1
    text = capsys.readouterr().out
    assert f"arith: sample too small: {6 * 23} steps, " in text
    assert "the default threshold stands" in text
    assert "confirmed in a pass" not in text
    profile = load_profile(out)
    assert profile.datasets == {}, "no threshold is taken from it"
    assert profile.default_threshold >= 0.5
    found = json.loads((tmp_path / "c.json").read_text())["datasets"]["arith"]
    assert (found["confirmed"], found["sample_too_small"]) == (False, True)


def test_one_small_sample_keeps_the_default_where_it_is_larger(tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(6)))
    with FakeServer(seconds=0) as fake:
        assert calibrate(fake, out, "--dataset", "arith,few", "--data", f"few={few}") == 1
    profile = load_profile(out)
    assert set(profile.datasets) == {"arith"}
    assert profile.datasets["arith"].threshold < profile.default_threshold == 0.5


def test_no_server_is_started_when_everything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile.json"
    started: list[int] = []

    @contextmanager
    def own(*_: object) -> Iterator[Client]:
        started.append(1)
        yield Client(fake.base_url)

    monkeypatch.setattr("sglang_margingate.bench.options.server", own)
    words = ["calibrate", "--no-template", "--dataset", "arith", "--limit", "56", "-o", str(out)]
    with FakeServer(seconds=0) as fake:
        assert main(words) == 0
        served, profile = fake.served, load_profile(out)
        assert main(words) == 0
        assert (len(started), fake.served) == (1, served)
        assert "no server was started" in capsys.readouterr().err
        assert load_profile(out).datasets == profile.datasets
        assert main([*words, "--", "--dtype", "float32"]) == 0
        assert len(started) == 2, "another server's samples are not this one's"
        assert main([*words, "--limit", "60"]) == 0
        assert len(started) == 3


def test_progress_on_a_pipe_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with console.bar(Console(file=out)) as progress:
        task = progress.add_task("pass 1", total=8)
        progress.advance(task)
        while not re.search(r"pass 1: 1/8 after \d+ s", out.getvalue()):
            time.sleep(0.02)
    with console.starting(Console(file=out), "a server") as tell:
        tell(0.01, "loading")
        tell(0.07, "still loading")
    assert "not serving yet after 0 s: still loading" in out.getvalue()
    assert "after 0 s: loading" not in out.getvalue()
