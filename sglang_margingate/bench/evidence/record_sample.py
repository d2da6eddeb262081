"""Record ``traces/sample``: a small run of the real server that the dashboard, its tests and the README show.

``margingate evidence record-sample --out traces/sample``

Gated requests alone, in pairs and in a batch of 16, with an audit; some under ``log``; a few sampled ones. Each prompt also
under ``always``, alone, where this model's flips are: what the Tuning page chooses thresholds from.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from sglang_margingate.bench.prompts.embedded import demo_prompts
from sglang_margingate.bench.servers.client import run_alone, run_together
from sglang_margingate.bench.servers.process import GATE_ALONE, serve
from sglang_margingate.trace import read_run
from sglang_margingate.trace.compact import compact

FLAGS = (*GATE_ALONE, "--margingate-threshold", "0.0625", "--margingate-audit-rate", "0.05",
         "--margingate-trace-text", "on")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Record the run and put it in place of the old one."""
    parser = argparse.ArgumentParser(prog="margingate evidence record-sample", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("traces/sample"))
    args = parser.parse_args(argv)
    prompts = demo_prompts(36)
    with tempfile.TemporaryDirectory() as folder:
        with serve([*FLAGS, "--margingate-trace-dir", folder]) as server:
            run_alone(server.client, prompts[:24], custom=_pass(0))
            run_together(server.client, prompts[12:30], 2, custom=_pass(1))
            run_together(server.client, prompts, 16, background=prompts[:2], custom=_pass(2))
            run_together(server.client, prompts[:12], 6, custom=_pass(3, "log"))
            run_together(server.client, prompts[:6], 6, custom=_pass(4, "always"))
            run_alone(server.client, demo_prompts(48), custom=_pass(5, "always"))
        run = next(p for p in Path(folder).iterdir() if p.is_dir())
        if args.out.exists():
            shutil.rmtree(args.out)
        shutil.copytree(run, args.out)
    compact(args.out)
    _clean_manifest(args.out)
    rows = read_run(args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {len(rows.requests)} requests, {len(rows.steps)} steps, {size / 1e6:.2f} MB")
    return 0


def _pass(repeat: int, policy: str = "gate") -> dict[str, object]:
    """Return what a pass over the prompts asks of the server."""
    return {"margingate_repeat": repeat, "margingate_policy": policy}


def _clean_manifest(run: Path) -> None:
    """Leave out paths of the machine that recorded the run."""
    import json

    path = run / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.get("flags", {}).get("margingate", {}).pop("map_dir", None)
    manifest["model_path"] = manifest["model"]
    manifest.get("flags", {}).pop("sglang", None)
    manifest.get("flags", {}).get("margingate", {}).pop("trace_dir", None)
    path.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
