"""The root: the list of runs, which has an address of its own as well."""

from __future__ import annotations

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("runs.py")), run_name="__main__")
