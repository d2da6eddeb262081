"""Take the picture of docs/dashboard.md anew: the Request page of the committed run, in a real browser.

python dashboard/take_screenshot.py        # writes docs/images/request.png; needs Chromium and Playwright
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from bench_dashboard import CHROMIUM_FLAGS, HERE, server, wait_drawn

WIDTH = 1440
ROOM = 4
"""Pixels below what is shown last."""


def main() -> int:
    """Open the page, make the window as tall as what is to be seen, and save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=HERE.parent / "traces" / "sample")
    parser.add_argument("-o", "--out", type=Path, default=HERE.parent / "docs" / "images" / "request.png")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    args = parser.parse_args()
    if args.chromium is None:
        print("take_screenshot: no chromium is installed; install it, or name one with --chromium", file=sys.stderr)
        return 2
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(args.run, Path(folder) / args.run.name)
        with server(Path(folder)) as (url, _), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=args.chromium, args=CHROMIUM_FLAGS)
            page = browser.new_page(viewport={"width": WIDTH, "height": 2400}, color_scheme="light")
            page.goto(f"{url}/request?run={args.run.name}")
            wait_drawn(page, "Request")
            last = page.locator("[data-testid=stPlotlyChart]").first.bounding_box()
            page.set_viewport_size({"width": WIDTH, "height": int(last["y"] + last["height"]) + ROOM})
            wait_drawn(page, "Request")
            page.wait_for_timeout(1000)  # Streamlit fades its elements in
            page.screenshot(path=args.out)
            browser.close()
    print(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
