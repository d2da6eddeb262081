"""Deep links (run, request, step in the URL) and the rule that a link cannot leave the trace folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote_plus, urlencode

TRACE_DIR_ENV = "MARGINGATE_TRACE_DIR"


def trace_dir() -> Path:
    """Return the folder of runs that this dashboard shows (set by the launcher)."""
    return Path(os.environ.get(TRACE_DIR_ENV) or "traces")


def known_run(name: object, names: Collection[str]) -> str | None:
    """Return ``name`` only if it is one of the listed runs, else None.

    A name from a link is compared, never joined to a path: ``..``, absolute paths and symbolic names cannot resolve to
    anything because no listed run is called so.
    """
    return name if isinstance(name, str) and name in names else None


def parse_step(value: object) -> int | None:
    """Return a step number from a query parameter, or None where it is not one."""
    text = str(value) if value is not None else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else None


def params(
    run: str | None = None, request: str | None = None, step: int | None = None, **more: object
) -> dict[str, str]:
    """Return query parameters without the absent ones.

    ``number`` says which of several requests with one id is meant; a link with the id alone finds the newest.
    """
    pairs: Mapping[str, object] = {"run": run, "request": request, "step": step, **more}
    return {key: str(value) for key, value in pairs.items() if value is not None}


def href(page: str, run: str | None = None, request: str | None = None, step: int | None = None, **more: object) -> str:
    """Return a relative link such as ``request?run=a&request=b&step=3`` (quoted; still escape it inside HTML)."""
    query = urlencode(params(run, request, step, **more))
    return f"{page}?{query}" if query else page


def hrefs(page: str, run: str, requests: Iterable[object], numbers: Iterable[object]) -> list[str]:
    """Return the links of many requests of one run, each as :func:`href` makes it."""
    begin = href(page, run)
    return [f"{begin}&request={quote_plus(str(rid))}&number={number}" for rid, number in zip(requests, numbers)]
