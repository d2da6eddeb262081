"""``python -m sglang_margingate.dashboard``: open the dashboard on a folder of runs. Needs neither SGLang nor a GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install 'sglang-margingate[dashboard]'"


def _app() -> Path | None:
    """Return the dashboard's main script: the installed package's, or the one beside this source tree."""
    spec = find_spec("margingate_dashboard")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))) / "pages" / "app.py"
    beside = Path(__file__).resolve().parents[1] / "dashboard" / "margingate_dashboard" / "pages" / "app.py"
    return beside if beside.is_file() else None


def command(app: Path, host: str, port: int) -> list[str]:
    """Return the Streamlit command: bound to ``host`` only, no statistics sent, no questions asked, no file watcher."""
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "server.showEmailPrompt": "false",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        "runner.magicEnabled": "false",
        "theme.baseRadius": "0.6rem",
        "theme.light.primaryColor": "#2F62DC",
        "theme.dark.primaryColor": "#7FA4FF",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "streamlit", "run", str(app), *flags]


def environment(app: Path, trace_dir: Path) -> dict[str, str]:
    """Return the environment of the Streamlit process: the trace folder, and both packages importable."""
    env = dict(os.environ)
    env["MARGINGATE_TRACE_DIR"] = str(trace_dir.absolute())
    roots = [str(app.parents[2]), str(Path(__file__).resolve().parents[1])]
    env["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [env.get("PYTHONPATH")])])
    return env


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, start Streamlit and wait for it; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="margingate dashboard", description="See where, why and at what cost tokens flip."
    )
    parser.add_argument("--trace-dir", type=Path, default=Path("traces"), help="folder of runs (default: traces)")
    parser.add_argument("--port", type=int, default=8501, help="TCP port (default: 8501)")
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine only)")
    args = parser.parse_args(argv)
    missing = [name for name in ("streamlit", "plotly") if find_spec(name) is None]
    app = _app()
    if missing or app is None:
        what = ", ".join(missing) if missing else "the package margingate_dashboard"
        print(f"margingate dashboard: {what} is not installed; run {INSTALL}", file=sys.stderr)
        return 2
    if not 0 < args.port < 65536:
        print(f"margingate dashboard: --port {args.port} is not a port; give a number from 1 to 65535", file=sys.stderr)
        return 2
    if args.trace_dir.exists() and not args.trace_dir.is_dir():
        print(f"margingate dashboard: --trace-dir {args.trace_dir} is a file; give the folder of runs", file=sys.stderr)
        return 2
    print(
        f"MarginGate dashboard: http://{args.host}:{args.port}  (runs from {args.trace_dir}; Ctrl+C stops it)",
        flush=True,
    )
    arguments, env = command(app, args.host, args.port), environment(app, args.trace_dir)
    if os.name == "posix":
        # Become the server, so that a signal to this process reaches it and none is left behind.
        os.execve(sys.executable, arguments, env)
    try:
        return subprocess.call(arguments, env=env)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    raise SystemExit(main())
