"""Starts that must be refused, each with one line that names the reason and the fix."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from sglang_process import SGLangProcess

from sglang_margingate.bench.servers.client import ServerError
from sglang_margingate.bench.servers.process import serve
from sglang_margingate.gate.profile import DatasetThreshold, Profile

REFUSED = [
    (["--margingate-threshold", "-1"], "--margingate-threshold"),
    (["--margingate-threshold", "nan"], "--margingate-threshold"),
    (["--margingate-threshold", "low"], "--margingate-threshold"),
    (["--margingate-policy", "maybe"], "--margingate-policy"),
    (["--margingate-audit-rate", "1.5"], "--margingate-audit-rate"),
    (["--margingate-verify-rows", "0"], "--margingate-verify-rows"),
    (["--margingate-profile", "/nonexistent.json"], "/nonexistent.json"),
    (["--margingate-thresold", "1"], "--margingate-thresold"),
    (["--enable-mixed-chunk"], "--enable-mixed-chunk"),
    (["--enable-streaming-session"], "--enable-streaming-session"),
    (["--margingate-policy", "log", "--tokenizer-worker-num", "2"], "--tokenizer-worker-num"),
    (["--margingate-policy", "log", "--margingate-fast-path", "canonical"], "--margingate-fast-path"),
    (["--margingate-max-miss", "0.01"], "--margingate-audit-rate"),
    (["--margingate-trace-keep", "30"], "--margingate-trace-keep"),
    (["--chunked-prefill-size", "32"], "--margingate-chunk"),
    (["--model-path", "/nonexistent"], "/nonexistent"),
    (["--tp-size", "3"], "--tp-size 3"),
    (["--tp-size", "2", "--enable-torch-symm-mem"], "--enable-torch-symm-mem"),
    (["--nnodes", "2"], "--nnodes 2"),
]


START = """
import sys
from sglang_margingate.launch_server import main
sys.exit(main(sys.argv[1:]))
"""
"""The front door, in a fork of a process that has imported SGLang already: what is refused is refused before more is started."""


def start(sglang: SGLangProcess, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    return sglang.run(START, "--margingate-trace", "off", *flags, env=env)


@pytest.mark.parametrize(("flags", "names"), REFUSED)
def test_wrong_flags_are_refused_in_one_line(sglang: SGLangProcess, flags: list[str], names: str) -> None:
    done = start(sglang, *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("margingate: error:")
    assert names in last


def test_the_command_itself_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "sglang_margingate.launch_server", "--enable-mixed-chunk"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("margingate: error: --enable-mixed-chunk")


def test_a_variable_that_chooses_kernels_is_refused(sglang: SGLangProcess) -> None:
    done = start(sglang, SGLANG_FORCE_FUSED_OP_BACKEND="torch")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "SGLANG_FORCE_FUSED_OP_BACKEND=torch" in done.stderr.strip().splitlines()[-1]


def test_a_profile_longer_than_a_variable_may_be_is_served(tmp_path: Path) -> None:
    """Its thresholds reach the scheduler, samples that are too small do not count, and nothing is left behind."""
    many = {f"dataset-{i:04}": DatasetThreshold(0.125, 20_000, 12) for i in range(2000)}
    made = Profile("margingate-demo", "bfloat16", "torch_native", "cpu", "0", "0", "2026-11-26", "window", 0.75,
                   {**many, "short": DatasetThreshold(0.0, 144), "": DatasetThreshold(0.0, 7)})  # fmt: skip
    made.save(tmp_path / "profile.json")
    flags = ["--margingate-profile", str(tmp_path / "profile.json"), "--disable-radix-cache",
             "--margingate-trace-dir", str(tmp_path / "traces")]  # fmt: skip
    private = tmp_path / "private"
    private.mkdir()
    with serve(flags, log=tmp_path / "server.log", env={"TMPDIR": str(private)}) as server:
        status = httpx.get(f"{server.base_url}/margingate/status", timeout=300).json()
        handed_over = list(private.glob("margingate-*/config.json"))
        assert [path.stat().st_mode & 0o777 for path in handed_over] == [0o600]
    assert status["threshold"] == 0.75
    assert (status["thresholds"]["dataset-1999"], status["thresholds"]["short"]) == (0.125, 0.5)
    assert status["radix"] == "off"
    assert "datasets.short is not used: sample too small: 144 steps" in (tmp_path / "server.log").read_text()
    assert not list(private.glob("margingate-*"))


def test_a_trace_dir_that_cannot_be_written_is_refused(sglang: SGLangProcess, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = start(sglang, "--margingate-trace", "on", "--margingate-trace-dir", str(blocker / "traces"))
    assert done.returncode == 2
    assert "--margingate-trace-dir" in done.stderr.strip().splitlines()[-1]


def test_a_layer_that_leaks_its_companions_is_named_and_refused(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    env = {"MARGINGATE_TEST_BREAK": "layers.1.mlp.gate_up_proj", "TMPDIR": str(tmp_path)}
    with (
        pytest.raises(ServerError),
        serve(["--margingate-policy", "gate", "--margingate-trace", "off"], log=log, env=env),
    ):
        pass
    refusal = [line for line in log.read_text().splitlines() if line.startswith("margingate: refusing to serve:")]
    assert refusal, log.read_text()[-2000:]
    assert "model.layers.1.mlp.gate_up_proj" in refusal[0]
    assert not list(tmp_path.glob("margingate-*")), "SGLang kills the launcher of a server that did not start"


def test_more_verify_rows_than_the_pool_holds_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    flags = ["--margingate-verify-rows", "5000", "--max-total-tokens", "4096", "--margingate-trace", "off"]
    with pytest.raises(ServerError), serve(flags, log=log):
        pass
    assert "--margingate-verify-rows" in log.read_text()


@pytest.mark.parametrize(("number", "serves"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_demo_that_is_stopped_takes_its_server_with_it(tmp_path: Path, number: signal.Signals, serves: bool) -> None:
    """Its server runs in a session of its own, which the signal does not reach: while it starts, and when it serves."""
    command = [sys.executable, "-m", "sglang_margingate.bench.demo", "--trace-dir", str(tmp_path / "traces"), "--once"]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    children: list[psutil.Process] = []
    try:
        started = psutil.Process(demo.pid)
        while not (children := started.children(recursive=True)) or (
            serves and not any((tmp_path / "traces").glob("*/manifest.json"))
        ):
            assert demo.poll() is None, demo.stdout and demo.stdout.read()
            time.sleep(0.2)
        demo.send_signal(number)
        assert demo.wait() == 0
        gone, alive = psutil.wait_procs(children, timeout=300)
        assert gone
        assert not alive
    finally:
        for process in (demo, *(child for child in children if child.is_running())):
            process.kill()
