"""The dashboard in Streamlit's own test harness: no browser, one script run per visit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from margingate_dashboard import pages
from streamlit.components.v2 import manifest_scanner
from streamlit.testing.v1 import AppTest

APP = Path(str(pages.__file__)).with_name("app.py")


def open_app(folder: Path, monkeypatch: Any) -> AppTest:
    """Return the dashboard on a folder of runs, before its first page.

    The harness reads the metadata of every installed package for each app, to find components in it: more time than a page
    takes. They are the same ones for all apps of a process.
    """
    monkeypatch.setenv("MARGINGATE_TRACE_DIR", str(folder))
    monkeypatch.setattr(manifest_scanner, "scan_component_manifests", installed_components)
    return AppTest.from_file(str(APP), default_timeout=300)


installed_components = functools.cache(manifest_scanner.scan_component_manifests)
