"""A dashboard server on a free port and a real Chromium, both once for each file."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "traces" / "sample"
CHROMIUM = os.environ.get("MARGINGATE_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MAP = {
    "decode_ok": True, "decode_rows": 64, "prefill": "batched",
    "map": {"layers": [
        {"name": "qkv_proj", "shape": [1536, 1024], "count": 24, "classes": [[1, 1, 0], [2, 16, 1], [17, 64, 2]]},
        {"name": "gate_up_proj", "shape": [5632, 1024], "count": 24, "classes": [[1, 8, 0], [9, 32, None], [33, 64, 1]]},
        {"name": "lm_head", "shape": [32000, 1024], "count": 1, "classes": [[1, 64, 0]]},
    ]},
}  # fmt: skip
ATTACK = "<img src=x onerror=\"document.title='attacked'\">"


def missing(what: str) -> None:
    """Skip where a person may do without a browser; fail in CI, where nobody would see that all of this was skipped."""
    if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
        pytest.fail(what)
    pytest.skip(what)


def wanted(module: str, what: str) -> Any:
    """Import what the tests of this folder need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing(what)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def trace_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed sample run (a made-up one where it is missing), a second run to compare, and a hostile one."""
    wanted("streamlit", "the dashboard's extra is not installed")
    import synthetic_runs as synthetic

    folder = tmp_path_factory.mktemp("traces")
    if SAMPLE.is_dir():
        shutil.copytree(SAMPLE, folder / "sample")
    else:
        synthetic.write_run(folder / "sample", synthetic.SyntheticSpec(policy="always"))
    # As long as a threshold needs.
    synthetic.write_run(folder / "calibration", synthetic.SyntheticSpec(policy="always", requests=96))
    synthetic.write_run(folder / "stock", synthetic.SyntheticSpec(policy="off"))
    canonical = synthetic.write_run(
        folder / "canonical", synthetic.SyntheticSpec(requests=24, tokens=80, structural=1.0, perturbation=0.0)
    )
    manifest = json.loads((canonical / "manifest.json").read_text())
    (canonical / "manifest.json").write_text(json.dumps({**manifest, "invariance": MAP}))
    hostile = synthetic.write_run(folder / "hostile", synthetic.SyntheticSpec(policy="always", datasets=(ATTACK,)))
    poison(hostile)
    return folder


def poison(run: Path) -> None:
    """Put HTML into every text that users or models write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in run.glob("*.parquet"):
        table = pq.read_table(file)
        for name in {"token_text", "prompt_text"} & set(table.column_names):
            table = table.set_column(table.column_names.index(name), name, pa.array([ATTACK] * table.num_rows))
        pq.write_table(table, file)


@contextmanager
def served(trace_dir: Path) -> Iterator[str]:
    """Start the dashboard as a user does."""
    port = free_port()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "sglang_margingate.dashboard", "--trace-dir", str(trace_dir), "--port", str(port)]
    server = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the dashboard ended at once"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def address(trace_dir: Path) -> Iterator[str]:
    """Where the dashboard of these runs is."""
    with served(trace_dir) as url:
        yield url


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A dashboard on a folder without runs, and the folder."""
    with served(tmp_path) as url:
        yield url, tmp_path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Start a browser; ended with its file, since Playwright keeps an event loop running and no other test could have one."""
    api = wanted("playwright.sync_api", "Playwright is not installed (pip install playwright)")
    if not Path(CHROMIUM).exists():
        missing(f"{CHROMIUM} is missing (apt-get install chromium, or set MARGINGATE_CHROMIUM)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def window(chromium: Any) -> Iterator[tuple[Any, list[str]]]:
    """One tab of a file's tests, and whom else than us its pages asked for something.

    A new tab is a new process that compiles Streamlit's and Plotly's scripts again, which takes three times as long as all else.
    """
    from playwright import sync_api

    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(180_000)  # a loaded machine draws late
    sync_api.expect.set_options(timeout=180_000)
    outside: list[str] = []
    page.on(
        "request",
        lambda r: None if r.url.startswith(("http://127.0.0.1:", "data:", "blob:", "file:")) else outside.append(r.url),
    )
    yield page, outside
    context.close()


@pytest.fixture(params=["light"])
def tab(window: tuple[Any, list[str]], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The tab as a test expects it; each visit loads the page anew, in a session of its own. Ends a test whose page called out."""
    page, outside = window
    page.set_viewport_size({"width": 1440, "height": 1000})
    page.emulate_media(color_scheme=request.param)
    page.mouse.move(0, 0)
    yield page
    found = outside[:]
    outside.clear()
    assert not found, f"the page called out: {found}"
