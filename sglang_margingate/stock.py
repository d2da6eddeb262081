"""Stock SGLang's own tools on a CPU: ``python -m sglang_margingate.stock TOOL [its options]``.

``bench_serving``, ``bench_offline_throughput`` and others are modules of SGLang that import triton, which a CPU-only
environment does not have. This installs the stand-ins that the front door installs (:mod:`sglang_margingate.serving.cpu`)
and then runs the module as ``python -m sglang.TOOL`` would. Nothing of this project is attached; where triton is installed
nothing is changed at all.

Tools that start further processes (an engine, several benchmark processes) get no stand-ins there: those need the front
door, ``python -m sglang_margingate.launch_server``, and a tool that talks to it.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec

from sglang_margingate.serving.cpu import install_stand_ins

USAGE = "usage: python -m sglang_margingate.stock TOOL [its options], as bench_serving --backend sglang --help"


def main(argv: list[str] | None = None) -> int:
    """Run one of SGLang's modules; return the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0].startswith("-"):
        print(USAGE, file=sys.stdout if words[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if words else 2
    tool = words[0].removeprefix("sglang.")
    if find_spec("sglang") is None:
        print("margingate: error: SGLang is not installed; see README.md, Install", file=sys.stderr)
        return 2
    install_stand_ins()
    name = f"sglang.{tool}"
    try:
        known = find_spec(name) is not None
    except ModuleNotFoundError:
        known = False
    if not known:
        print(f"margingate: error: {name} is no module of this SGLang; {USAGE}", file=sys.stderr)
        return 2
    sys.argv = [name, *words[1:]]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
