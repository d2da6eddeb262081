"""Measure the dashboard on a run of 1,000,000 steps, a request of 30,000 tokens and a folder of 1,000 runs.

    python dashboard/bench_dashboard.py [--steps N] [--runs N] [--repeat N] [--json FILE]

Writes a made-up run into a temporary folder, starts the dashboard as a user would, and drives it with Chromium through
Playwright. Without them it measures the page scripts alone (Streamlit's AppTest), which leaves out the browser.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent / "tests" / "support"),
]  # a source tree needs no installation

import pyarrow.parquet as pq  # noqa: E402
from synthetic_runs import SyntheticSpec, write_run  # noqa: E402

from sglang_margingate.trace.files import KINDS, name_of  # noqa: E402

PAGES = ("overview", "requests", "request", "margins", "flips", "latency", "tuning", "compare")
CHARTS = {
    "runs": 2,
    "overview": 3,
    "requests": 0,
    "request": 2,
    "margins": 2,
    "flips": 4,
    "latency": 6,
    "tuning": 2,
    "compare": 1,
}
"""Charts of each page on this run: it has opened when they are drawn."""
OPEN_LIMIT = 3.0
SWITCH_LIMIT = 1.0
REQUEST_LIMIT, REQUEST_TOKENS = 2.0, 30_000
LONG_MEAN = 51_500
"""Mean of the drawn length with which the one request gets that many tokens."""
LIST_LIMIT, IDLE_LIMIT = 2.0, 0.02
"""A folder of many runs: seconds until its table stands, and the share of a core that an open page may use afterwards."""
SETTLE_SECONDS, IDLE_SECONDS = 20.0, 36.0
"""A browser tidies its memory for some seconds after a page was drawn; idling is measured after that, over some looks at the folder."""
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def hardware() -> dict[str, object]:
    """Name the machine that the numbers are from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": cores,
        "load": load and round(load, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def memory_mb(pid: int) -> dict[str, float]:
    """Return resident and peak memory of a process in MB; empty where /proc does not tell."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return {}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


def cpu_seconds() -> float:
    """Return the processor time that all processes started from here have used so far: server, browser, driver.

    On a machine that others use as well, wall time says little; what a step costs in processor time stays the same.
    """
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        pid = int(entry.parent.name)
        parents.setdefault(int(fields[1]), []).append(pid)
        used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        total += used.get(pid, 0.0)
        waiting += parents.get(pid, [])
    return total


class Watch:
    """Wall and processor seconds since its making."""

    def __init__(self) -> None:
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Return both."""
        wall = time.perf_counter() - self.wall
        return {"wall": round(wall, 3), "cpu": round(cpu_seconds() - self.cpu, 3)}


def dashboard(trace_dir: Path, port: int) -> list[str]:
    """Return the command of our server."""
    return [sys.executable, "-m", "sglang_margingate.dashboard", "--trace-dir", str(trace_dir), "--port", str(port)]


def empty_page(folder: Path, port: int) -> list[str]:
    """Return the command of a Streamlit server whose page is one line and never runs again: what cannot be saved."""
    from sglang_margingate.dashboard import command

    script = folder / "empty.py"
    script.write_text("import streamlit as st\n\nst.html('<div class=mg-head><h1>Empty</h1></div>')\n")
    return command(script, "127.0.0.1", port)


@contextmanager
def server(folder: Path, how: Callable[[Path, int], list[str]] = dashboard) -> Iterator[tuple[str, int]]:
    """Start a server on a free port and yield its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2])}
    process = subprocess.Popen(how(folder, port), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(10)


def wait_drawn(page: Any, title: str) -> None:
    """Wait until the page's script has ended, nothing on it is stale, and its charts are drawn."""
    page.wait_for_function(
        """([title, least]) => {
            const head = document.querySelector('.mg-head h1');
            const app = document.querySelector('[data-testid=stApp]');
            const charts = document.querySelectorAll('[data-testid=stPlotlyChart]');
            return head && head.textContent === title && app.dataset.testScriptState === 'notRunning'
                && !document.querySelector('[data-stale=true]') && !document.querySelector('[data-testid=stSkeleton]')
                && charts.length >= least && [...charts].every(c => c.querySelector('.main-svg'));
        }""",
        arg=[title, CHARTS[title.lower()]],
        timeout=60_000,
        polling=25,
    )


def in_browser(trace_dir: Path, chromium: str, run: str) -> dict[str, Any]:
    """Return seconds as a user sees them, in a real browser."""
    from playwright.sync_api import sync_playwright

    found: dict[str, Any] = {"how": "real browser", "switch": {}, "again": {}}
    with server(trace_dir) as (url, pid), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        # The server imports its libraries with the first page of its life; that is not opening a run.
        page.goto(f"{url}/?warm", wait_until="commit")
        wait_drawn(page, "Runs")
        page.goto("about:blank")
        watch = Watch()
        page.goto(f"{url}/overview?run={run}", wait_until="commit")
        wait_drawn(page, "Overview")
        found["open"] = watch.stop()
        for key in ("switch", "again"):
            for name in (*PAGES[1:], PAGES[0]):
                watch = Watch()
                page.locator("[data-testid=stSidebar]").get_by_role("link", name=name.title(), exact=True).click()
                wait_drawn(page, name.title())
                found[key][name] = watch.stop()
        found["memory"] = memory_mb(pid)
        browser.close()
    return found


def long_request(trace_dir: Path, chromium: str) -> dict[str, float]:
    """Return the seconds until a request of 30,000 tokens is drawn."""
    from playwright.sync_api import sync_playwright

    with server(trace_dir) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{url}/overview?run=long", wait_until="commit")
        wait_drawn(page, "Overview")
        watch = Watch()
        page.goto(f"{url}/request?run=long", wait_until="commit")
        wait_drawn(page, "Request")
        found = watch.stop()
        browser.close()
    return found


def idle(page: Any) -> float:
    """Return the share of a core that an open page uses, server and browser together."""
    page.wait_for_timeout(SETTLE_SECONDS * 1000)
    watch = Watch()
    page.wait_for_timeout(IDLE_SECONDS * 1000)
    used = watch.stop()
    return used["cpu"] / used["wall"]


def floor(folder: Path, chromium: str) -> float:
    """Return the idle share of a page of Streamlit's with nothing on it."""
    from playwright.sync_api import sync_playwright

    with server(folder, empty_page) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(url, wait_until="commit")
        page.wait_for_selector(".mg-head h1")
        found = idle(page)
        browser.close()
    return found


def many_runs(trace_dir: Path, chromium: str) -> dict[str, Any]:
    """Return the seconds until a folder's runs are listed, until all are counted, and the share of a core used afterwards.

    None of them was looked at before: they are moved into the folder when the server has imported its libraries.
    """
    from playwright.sync_api import sync_playwright

    served = trace_dir.with_name(f"{trace_dir.name}-served")
    served.mkdir()
    with server(served) as (url, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.goto(f"{url}/overview", wait_until="commit")
        page.wait_for_selector(".mg-empty")
        page.wait_for_timeout(1500)
        page.goto("about:blank")
        for run in trace_dir.iterdir():
            run.rename(served / run.name)
        watch = Watch()
        page.goto(f"{url}/runs", wait_until="commit")
        page.wait_for_selector("[data-testid=stDataFrame]", timeout=120_000)
        listed = watch.stop()
        page.wait_for_function(
            "() => !document.body.innerText.includes('the others follow') && document.querySelector('[data-testid=stDataFrame]')",
            timeout=300_000,
        )
        counted = watch.stop()
        used = idle(page)
        browser.close()
    return {"listed": listed, "counted": counted, "idle": used}


def write_many(folder: Path, count: int) -> None:
    """Write so many runs by copying one."""
    first = write_run(folder / "run-0000", SyntheticSpec(requests=8, tokens=40, files=1))
    for kind in KINDS:  # named by their rows, as a server names them
        file = first / f"{kind}-0000.parquet"
        file.rename(first / name_of(kind, 0, pq.read_metadata(file).num_rows - 1))
    for i in range(1, count):
        shutil.copytree(first, folder / f"run-{i:04d}")


def without_browser(trace_dir: Path, run: str) -> dict[str, Any]:
    """Return seconds of the page scripts alone."""
    from streamlit.testing.v1 import AppTest

    os.environ["MARGINGATE_TRACE_DIR"] = str(trace_dir)
    at = AppTest.from_file(str(HERE / "margingate_dashboard" / "pages" / "app.py"), default_timeout=120).run()
    at.query_params["run"] = run
    found: dict[str, Any] = {"how": "page scripts only (no Chromium with Playwright here)", "switch": {}, "again": {}}
    watch = Watch()
    at.switch_page("overview.py").run()
    found["open"] = watch.stop()
    for key in ("switch", "again"):
        for name in (*PAGES[1:], PAGES[0]):
            watch = Watch()
            at.switch_page(f"{name}.py").run()
            found[key][name] = watch.stop()
    found["memory"] = memory_mb(os.getpid())
    return found


def main() -> int:
    """Measure, print, and return 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1_000_000, help="step rows of the run (default: 1,000,000)")
    parser.add_argument(
        "--repeat", type=int, default=3, help="rounds; the best of each measurement counts (default: 3)"
    )
    parser.add_argument("--runs", type=int, default=1000, help="runs of the folder that is listed (default: 1,000)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="margingate-bench-") as folder:
        traces = Path(folder)
        # A request has 170 tokens in the mean, one of them from its prefill; a little more than asked for.
        spec = SyntheticSpec(
            requests=max(1, args.steps // 168), tokens=170, slots=64, files=20, policy="always", seed=3
        )
        run = write_run(traces / "million", spec)
        write_run(traces / "other", SyntheticSpec(requests=200, tokens=170, policy="off", seed=3))
        rows = sum(pq.read_metadata(f).num_rows for f in run.glob("steps-*.parquet"))
        size = sum(f.stat().st_size for f in run.iterdir()) / 1e6
        rounds = []
        for _ in range(args.repeat):
            with_browser = args.chromium and find_spec("playwright")
            rounds.append(
                in_browser(traces, args.chromium, run.name) if with_browser else without_browser(traces, run.name)
            )
        more = {}
        if args.chromium and find_spec("playwright"):
            write_run(traces / "long", SyntheticSpec(requests=1, tokens=LONG_MEAN, slots=1, policy="always", seed=5))
            more["request"] = min(
                (long_request(traces, args.chromium) for _ in range(args.repeat)), key=lambda s: s["wall"]
            )
            write_many(traces / "many", args.runs)
            more["runs"] = many_runs(traces / "many", args.chromium)
            more["runs"]["floor"] = floor(traces, args.chromium)
    found = {**best(rounds), **more}
    result = {"hardware": hardware(), "step_rows": rows, "requests": spec.requests, "run_mb": size, **found}
    print(f"{rows:,} step rows, {spec.requests:,} requests, {size:.0f} MB on disk; {found['how']}")
    print("machine: " + ", ".join(f"{k} {v}" for k, v in hardware().items()))
    print(f"best of {args.repeat} rounds, each with a new server and browser; in seconds, processor time in brackets")
    print(f"open the run (Overview, nothing cached)  {shown(found['open'])}   limit {OPEN_LIMIT:g}")
    for name in found["switch"]:
        first, again = shown(found["switch"][name]), shown(found["again"][name])
        print(f"switch to {name:<9} first {first}   again {again}   limit {SWITCH_LIMIT:g}")
    over = []
    if "request" in found:
        print(f"a request of {REQUEST_TOKENS:,} tokens  {shown(found['request'])}   limit {REQUEST_LIMIT:g}")
        over += ["request"] if found["request"]["wall"] > REQUEST_LIMIT else []
    if "runs" in found:
        runs = found["runs"]
        print(
            f"{args.runs:,} runs: listed {shown(runs['listed'])}   limit {LIST_LIMIT:g}; all counted {shown(runs['counted'])}; "
            f"idle {runs['idle']:.1%} of a core, browser included   limit {IDLE_LIMIT:.0%}, an empty page of Streamlit's {runs['floor']:.1%}"
        )
        over += ["listing"] if runs["listed"]["wall"] > LIST_LIMIT else []
        over += ["idle"] if runs["idle"] > IDLE_LIMIT else []
    print("server memory: " + ", ".join(f"{k} {v:,.0f} MB" for k, v in found["memory"].items()))
    if args.json:
        args.json.write_text(json.dumps({**result, "rounds": rounds}, indent=2) + "\n")
    slow = [f"{k} {n}" for k in ("switch", "again") for n, s in found[k].items() if s["wall"] > SWITCH_LIMIT]
    slow += over
    slow += ["open"] if found["open"]["wall"] > OPEN_LIMIT else []
    print("over the limit: " + ", ".join(slow) if slow else "all within the limits")
    return 1 if slow else 0


def shown(seconds: dict[str, float]) -> str:
    """Return wall seconds with processor seconds in brackets."""
    return f"{seconds['wall']:.2f} ({seconds['cpu']:.2f})"


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each measurement's least wall time over the rounds, and the largest memory."""

    def least(values: list[dict[str, float]]) -> dict[str, float]:
        return min(values, key=lambda v: v["wall"])

    found = {**rounds[0], "open": least([r["open"] for r in rounds])}
    for key in ("switch", "again"):
        found[key] = {name: least([r[key][name] for r in rounds]) for name in rounds[0][key]}
    found["memory"] = {k: max(r["memory"][k] for r in rounds) for k in rounds[0]["memory"]}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
