"""The dashboard's frame: pages and navigation. Started by ``python -m sglang_margingate.dashboard``.

It lies among the pages, not above them: Streamlit takes a folder ``pages/`` beside the main script for its older way of
building apps, and then a deep link to a page would run that page without this frame.
"""

from __future__ import annotations

import threading

import streamlit as st
from PIL import Image, ImageDraw

from margingate_dashboard import address, choose
from margingate_dashboard.ui import PAGES

_LOOKS = {
    "runs": ("Runs", ":material/list_alt:"),
    "overview": ("Overview", ":material/dashboard:"),
    "requests": ("Requests", ":material/list:"),
    "request": ("Request", ":material/segment:"),
    "margins": ("Margins", ":material/bar_chart:"),
    "flips": ("Flips", ":material/sync_alt:"),
    "latency": ("Latency", ":material/speed:"),
    "tuning": ("Tuning", ":material/tune:"),
    "compare": ("Compare", ":material/compare_arrows:"),
}


_LOGO = """<svg xmlns="http://www.w3.org/2000/svg" width="172" height="32" viewBox="0 0 172 32">
<rect width="32" height="32" rx="7" fill="#4C7DF0"/>
<rect x="7" y="7" width="7" height="18" rx="1.5" fill="#fff"/>
<rect x="18" y="12" width="7" height="13" rx="1.5" fill="#BFD2FF"/>
<path d="M4 10h24" stroke="#FFB000" stroke-width="2" stroke-dasharray="3 2"/>
<text x="42" y="22.5" font-family="system-ui,Helvetica,Arial,Liberation Sans,sans-serif"
 font-size="20" font-weight="700" fill="#4C7DF0">MarginGate</text>
</svg>"""


def _icon() -> Image.Image:
    """Draw the tab's icon: the best two logits and the margin between them. Named icons would come from the network."""
    image = Image.new("RGBA", (64, 64))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, 63, 63), 14, fill="#4C7DF0")
    draw.rectangle((14, 14, 27, 50), fill="#FFFFFF")
    draw.rectangle((36, 25, 49, 50), fill="#BFD2FF")
    draw.line((8, 20, 56, 20), fill="#FFB000", width=4)
    return image


@st.cache_resource(show_spinner=False)
def _warm_up() -> None:
    """Load what the other pages need while the reader looks at the first one; once per server."""
    from margingate_dashboard.warmup import load

    threading.Thread(target=load, daemon=True).start()


def main() -> None:
    """Show the chosen page."""
    st.set_page_config(page_title="MarginGate", page_icon=_icon(), layout="wide")
    st.logo(_LOGO, size="large")
    _warm_up()
    pages = []
    for name, path in PAGES.items():
        title, icon = _LOOKS[name]
        pages.append(st.Page(path, title=title, icon=icon, url_path=name))
    # The default page answers at the root alone. This one does, so that /runs is an address like any other page's.
    home = st.Page("home.py", title="Runs", default=True, visibility="hidden")
    page = st.navigation([home, *pages], position="hidden")
    place = st.sidebar.container(key="mg-nav", gap=None)
    with address.kept(page.url_path):
        try:
            page.run()
        finally:  # by now it is known which run is looked at
            with place:
                choose.navigate({name: (path, *_LOOKS[name]) for name, path in PAGES.items()})


main()
