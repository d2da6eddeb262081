"""The front door: ``python -m sglang_margingate.launch_server [our flags] [any SGLang flag]``.

SGLang starts its processes by spawning, which imports this module again in each of them. The two lines below
``install_stand_ins`` therefore run in every process, before SGLang itself is imported there.
"""

from __future__ import annotations

import sys

from sglang_margingate.serving.cpu import install_stand_ins

install_stand_ins()

if __name__ == "__mp_main__":
    # A spawned SGLang process. Its entry point may be missing (a checkout on PYTHONPATH has no metadata), so the hooks
    # are registered here as well; SGLang applies them when it loads its plugins.
    from sglang_margingate.serving import plugin

    plugin.load()


def main(argv: list[str] | None = None) -> int:
    """Start the server; return the exit status."""
    from sglang_margingate.serving.frontdoor import run

    return run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
