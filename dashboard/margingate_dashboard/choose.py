"""The sidebar: which run is looked at, what of it, and the link that brings another reader to the same view.

What is chosen lives in the URL. Nothing is written there that the reader did not choose, so that Back goes back once.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from margingate_dashboard import address, data, links
from margingate_dashboard.facts.filters import Filters
from margingate_dashboard.facts.policies import present
from margingate_dashboard.summary import tags
from sglang_margingate.trace import RunInfo

FOLLOW_SECONDS = 3.0
"""How often a live run is looked at for newly closed files."""

LISTED = 20
"""Runs offered where a link names one that is not there."""


def markdown_safe(text: object) -> str:
    r"""Return untrusted text for Streamlit's Markdown (labels, captions, errors): every special sign is escaped."""
    return "".join("\\" + c if c in r"\`*_{}[]()#+-.!|~$:<>&" else c for c in str(text))


OF_ONE_RUN = (
    "request",
    "number",
    "step",
    "taus",
    "flip",
    "pair",
    "reference",
    "cell",
    "answer",
    "find",
    "tokens",
    "picked",
    "worst",
)
"""Query parameters that name something in the run that is shown: in another run they would name something else."""


def leave(**params: str) -> None:
    """Take out of the address what belongs to the run that was shown, and write these parameters into it."""
    address.write(**(dict.fromkeys(OF_ONE_RUN) | params))


def _remember_run() -> None:
    name = st.session_state["run_box"]
    if name is None:  # the box was cleared: what is looked at stays
        return
    st.session_state["pinned_run"] = name
    leave(run=name)


def choose_run(infos: list[RunInfo]) -> RunInfo | None:
    """Show the sidebar's choice of run; None where a link names one that is not in the folder.

    Without a link the newest run is shown, and stays while newer ones begin.
    """
    by_name = {info.name: info for info in infos}
    asked = address.get("run")
    if asked is not None and links.known_run(asked, by_name) is None:
        return None
    name = asked or links.known_run(st.session_state.get("pinned_run"), by_name) or infos[0].name
    st.session_state["pinned_run"] = st.session_state["run_box"] = name
    with st.sidebar:
        st.selectbox("Run", list(by_name), key="run_box", on_change=_remember_run, help="Newest first.")
    return by_name[name]


CARRIED = ("dataset", "policy", "guarantee")
"""Query parameters that go with the reader from page to page, beside the run."""


def navigate(places: dict[str, tuple[str, str, str]]) -> None:
    """Show the pages as links that carry the run and the filters: the URL is whole at once, so that Back goes back once.

    Parameters
    ----------
    places
        (script, title, icon) by path.
    """
    carried = {name: values for name in CARRIED if (values := address.get_all(name))}
    run = address.get("run") or st.session_state.get("pinned_run")
    if run is not None:
        carried["run"] = [str(run)]
    for script, title, icon in places.values():
        st.page_link(script, label=title, icon=icon, query_params=carried or None)


def here(label: str, place: Any = st, icon: str | None = None, **params: str) -> None:
    """Show a button to this page with other parameters: a link to the page that one is on would leave the address as it is."""
    place.button(label, key=f"here-{label}", icon=icon, on_click=leave, kwargs=params, type="tertiary")


def missing(asked: object, infos: list[RunInfo], parameter: str = "run") -> None:
    """Say that a link names a run that is not here, and offer what is; nothing else is shown.

    Parameters
    ----------
    asked
        The name.
    infos
        The runs that there are.
    parameter
        Where the link names it.
    """
    st.warning(
        f"There is no run named “{markdown_safe(str(asked)[:80])}” in this trace folder.", icon=":material/link_off:"
    )
    st.markdown("##### Runs in this folder" + (f", newest {LISTED} of {len(infos):,}" if len(infos) > LISTED else ""))
    for info in infos[:LISTED]:
        here(markdown_safe(info.name), **{parameter: info.name})


def choose_filters(run: data.RunData) -> Filters:
    """Show the sidebar's filters, each where the run has more than one value of it, and return what is chosen."""
    rows = run.requests("dataset", "policy", "guarantee")
    options = {
        "dataset": tags(rows["dataset"]),
        "policy": present(rows["policy"]),
        "guarantee": sorted(rows["guarantee"].dropna().astype(str).unique()),
    }
    chosen = {}
    for name, every in options.items():
        if len(every) < 2:
            continue
        # Not bound to the URL by Streamlit: that would be lost on the way to another page.
        box = f"{name}_box"
        st.session_state[box] = [value for value in address.get_all(name) if value in every]

        def remember(name: str = name, box: str = box) -> None:
            address.write(**{name: st.session_state[box]})

        with st.sidebar:
            label = {"dataset": "Datasets", "policy": "Policies", "guarantee": "Guarantees"}[name]
            picked = st.multiselect(label, every, key=box, on_change=remember, placeholder=f"All {label.lower()}")
        chosen[name] = frozenset(picked)
    return Filters(**chosen)


def follow(info: RunInfo) -> None:
    """Look at a live run now and then; show the page again once its writer has closed another file, or has ended."""
    with st.sidebar:
        if not st.toggle("Follow the live run", value=True, key="follow"):
            return
    seen = data.signature(info.path)

    @st.fragment(run_every=FOLLOW_SECONDS)
    def watch() -> None:
        if data.signature(info.path) != seen or not data.still_live(info.path):
            st.rerun(scope="app")

    with st.sidebar:
        watch()


def await_first_run() -> None:
    """Look at an empty folder now and then; show the page again once a run has begun there."""

    @st.fragment(run_every=FOLLOW_SECONDS)
    def watch() -> None:
        if data.runs(links.trace_dir()):
            st.rerun(scope="app")

    watch()


_LINK_HTML = """<style>
  code { display: block; overflow-wrap: anywhere; font-size: 0.8rem; margin-bottom: 0.5rem; user-select: all; }
  button { font: inherit; color: inherit; background: none; border: 1px solid currentColor; border-radius: 6px;
    padding: 2px 10px; cursor: pointer; }
</style><code></code><button type="button">Copy</button>"""
_LINK_JS = """
export default function (component) {
  const { parentElement, data } = component;
  const box = parentElement.querySelector("code"), button = parentElement.querySelector("button");
  const show = () => {
    const url = new URL(window.location.href);
    for (const [name, value] of Object.entries(data ?? {})) {
      if (!url.searchParams.has(name)) url.searchParams.set(name, value);
    }
    box.textContent = url.href;
    return url.href;
  };
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(show());
      button.textContent = "Copied";
    } catch {
      // Browsers lend the clipboard to safe addresses only: elsewhere the text stands there, selected.
      const range = document.createRange();
      range.selectNodeContents(box);
      window.getSelection().removeAllRanges();
      window.getSelection().addRange(range);
    }
  };
  show();
  box.mgOpened?.disconnect();  // of the page before, which pinned something else
  box.mgOpened = new IntersectionObserver(() => { show(); button.textContent = "Copy"; });
  box.mgOpened.observe(box);
  return () => box.mgOpened.disconnect();
}
"""


def copy_link(**pinned: str) -> None:
    """Offer the address of this view, as the browser has it when it is asked: parts of a page change it without the others.

    Parameters
    ----------
    pinned
        What the page shows of its own accord, by query parameter: where the address does not name it, the link does. The newest
        run of today is not that of tomorrow.
    """
    offer = st.components.v2.component("margingate_link", html=_LINK_HTML, js=_LINK_JS)
    with st.sidebar.popover("Copy link", icon=":material/link:"):
        offer(data=pinned, key="copy-link")
