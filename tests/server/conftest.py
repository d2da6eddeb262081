"""Real SGLang servers on the CPU, one per configuration, shared by the tests of this folder.

The one that most tests ask starts as a user starts it; the others are forks that have SGLang imported already.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sglang_process import SGLangProcess

from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers import process
from sglang_margingate.bench.servers.client import Completion, Prompt, run_alone, run_together
from sglang_margingate.bench.servers.process import Server, serve

BEGIN = process.begin
THRESHOLD = 0.0625
CANONICAL = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical", "--margingate-trace", "off"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("sglang") is None
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.server)
            if missing:
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the servers' invariance maps out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def forks(sglang: SGLangProcess) -> Iterator[None]:
    """Let servers begin as forks of a process that has imported SGLang (tests/support/forked_servers.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "begin", sglang.begin)
        yield


def begin_by_command(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Begin a server as users do, by its command; where there is ``setpriv``, it is interrupted when this process ends."""
    setpriv = shutil.which("setpriv")
    return BEGIN([setpriv, "--pdeathsig", "INT", *command] if setpriv else command, log, env)


@contextmanager
def serve_by_command(flags: Sequence[str], **options: Any) -> Iterator[Server]:
    """Serve by the command: the server that most tests ask does."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process, "begin", begin_by_command)
            server = stack.enter_context(serve(flags, **options))
        yield server


@pytest.fixture(scope="session")
def gate_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The gate with everything on: radix, trace with text, metrics, K/V digests."""
    folder = tmp_path_factory.mktemp("gate")
    flags = ["--margingate-policy", "gate", "--margingate-threshold", str(THRESHOLD), "--margingate-trace-text", "on",
             "--margingate-trace-dir", str(folder / "traces"), "--enable-metrics"]  # fmt: skip
    with serve_by_command(flags, log=folder / "server.log", env={"MARGINGATE_KV_DIGEST": "1"}) as server:
        yield server


@pytest.fixture(scope="session")
def log_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model without a gate."""
    folder = tmp_path_factory.mktemp("log")
    flags = ["--margingate-policy", "log", "--margingate-trace-dir", str(folder / "traces")]
    with serve(flags, log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def canonical_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The gate on the canonical fast path; sixteen requests run at once and more wait. Its map is kept beside its log."""
    folder = tmp_path_factory.mktemp("canonical")
    flags = [*CANONICAL, "--margingate-map-dir", str(folder / "maps"), "--margingate-threshold", str(THRESHOLD),
             "--max-running-requests", "16"]  # fmt: skip
    with serve(flags, log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def audit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Every step is audited, and no audit is ever long enough to show what is asked for."""
    folder = tmp_path_factory.mktemp("audit")
    flags = ["--margingate-audit-rate", "1", "--margingate-max-miss", "0.00001", "--margingate-trace", "off"]
    with serve([*flags, "--enable-metrics"], log=folder / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """A few held-out prompts of each dataset."""
    return demo_prompts(24)


# What several tests compare with: each prompt alone takes 24 times as many forwards as all of them together.


@pytest.fixture(scope="session")
def tokens() -> int:
    """The most that an answer has which is compared with the same one in a batch."""
    return 104


@pytest.fixture(scope="session")
def gate_alone(gate_server: Server, prompts: list[Prompt], tokens: int) -> list[Completion]:
    return run_alone(gate_server.client, prompts, max_new_tokens=tokens)


@pytest.fixture(scope="session")
def canonical_alone(canonical_server: Server, prompts: list[Prompt], tokens: int) -> list[Completion]:
    return run_alone(canonical_server.client, prompts, max_new_tokens=tokens)


@pytest.fixture(scope="session")
def log_both(log_server: Server, prompts: list[Prompt], tokens: int) -> tuple[list[Completion], list[Completion]]:
    """Without a gate: alone, and sixteen at a time."""
    alone = run_alone(log_server.client, prompts, max_new_tokens=tokens)
    return alone, run_together(log_server.client, prompts, 16, max_new_tokens=tokens)
