"""A click on a token of a strip, told to the page: HTML that Streamlit shows has no events of its own."""

from __future__ import annotations

import streamlit as st

_JS = """
export default function (component) {
  const { setTriggerValue } = component;
  const clicked = (event) => {
    const token = event.target.closest ? event.target.closest(".mg-strip .t[data-step]") : null;
    if (token) setTriggerValue("step", Number(token.dataset.step));
  };
  document.addEventListener("click", clicked);
  return () => document.removeEventListener("click", clicked);
}
"""


def clicked_step(key: str) -> int | None:
    """Return the step of the token that was clicked since the last run of the page, or None."""
    listen = st.components.v2.component("margingate_token_clicks", js=_JS)
    found = listen(key=key, on_step_change=lambda: None)
    step = getattr(found, "step", None)
    return int(step) if isinstance(step, (int, float)) and 0 <= step < 10**9 else None
