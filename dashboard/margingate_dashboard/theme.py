"""One legend vocabulary for every page: what a step was, its colour, its mark, and its words."""

from __future__ import annotations

import zlib
from typing import NamedTuple


class State(NamedTuple):
    """How one kind of step looks everywhere."""

    name: str
    colour: str
    symbol: str
    """Plotly marker: shape tells the states apart where colour does not."""
    mark: str
    """Sign before the name in HTML legends."""
    doc: str

    @property
    def css(self) -> str:
        """Its class in a style sheet."""
        return self.name.replace(" ", "-")


# Okabe-Ito colours (distinct under the common colour-vision deficiencies, visible on white and on near-black).
STABLE = State("stable", "#8C96A3", "circle", "●", "margin above the threshold, no flip seen")
TRIGGERED = State(
    "triggered", "#56B4E9", "triangle-up", "▲", "margin at or below the threshold: verified, token confirmed"
)
WOULD = State(
    "would trigger",
    "#7F9DB9",
    "triangle-up-open",
    "△",
    "margin at or below the threshold under a policy that verifies nothing (log): no flip can be seen",
)
FLIPPED = State("flipped", "#E69F00", "x", "✕", "the verify chose another token; not put in place (shadow verify)")
REPAIRED = State("repaired", "#009E73", "diamond", "◆", "flipped, and the verify's token and K/V put in place")
MISSED = State("missed", "#D55E00", "square", "■", "flipped above the threshold: seen by the audit, not put in place")

STATES: tuple[State, ...] = (STABLE, WOULD, TRIGGERED, FLIPPED, REPAIRED, MISSED)
"""Index in this tuple is the state code of :func:`margingate_dashboard.states.classify`."""

# For datasets, policies and runs, which are not states: IBM's colour-blind-safe set, told apart by dash as well.
SERIES_COLOURS = ("#648FFF", "#FFB000", "#785EF0", "#22A7A0", "#DC267F", "#FE6100")
SERIES_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

# A policy has one colour in every figure of every run.
POLICY_COLOURS = {
    "gate": "#648FFF",
    "always": "#785EF0",
    "log": "#FFB000",
    "off": "#FE6100",
    "not observed": "#8C96A3",
    "running": "#B9C0CA",
}
POLICY_DASHES = {"gate": "solid", "always": "dash", "log": "dot", "off": "dashdot"}


def policy_colour(name: str) -> str:
    """Return a policy's colour."""
    return POLICY_COLOURS.get(name, "#8C96A3")


def dataset_look(name: str) -> tuple[str, str]:
    """Return colour and dash of a dataset: the same on every page and in every run, whatever else is shown."""
    code = zlib.crc32(name.encode())
    return SERIES_COLOURS[code % len(SERIES_COLOURS)], SERIES_DASHES[code // 7 % len(SERIES_DASHES)]


# Latency parts, in the order in which they happen.
PART_COLOURS = {"queue": "#B9C0CA", "prefill": "#785EF0", "decode": "#648FFF", "verify": "#56B4E9", "hold": "#FFB000"}

GUARANTEE_COLOURS = {"structural": "#009E73", "verified": "#0072B2", "gated": "#56B4E9", "none": "#8C96A3"}

THRESHOLD_COLOUR = "#CC79A7"
"""The threshold line in every plot."""

CSS = """
<style>
/* Neutral lines and fills are mixed from the text colour, so that one sheet serves the dark and the light theme. */
.block-container, .stMainBlockContainer { padding: 4.2rem 2.6rem 4rem 2.6rem; max-width: 1560px; }
.mg-head { display:flex; flex-wrap:wrap; align-items:baseline; gap:.35rem .8rem; margin:0 0 .2rem 0; }
.mg-head h1 { font-size:1.7rem; font-weight:650; letter-spacing:-.015em; padding:0; margin:0; line-height:1.2; }
.mg-lead { opacity:.72; font-size:.95rem; margin:0 0 .2rem 0; max-width:110ch; }
.mg-chip { display:inline-block; padding:.1rem .55rem; border-radius:999px; font-size:.78rem; line-height:1.5;
  border:1px solid color-mix(in srgb, currentColor 22%, transparent);
  background:color-mix(in srgb, currentColor 5%, transparent); white-space:nowrap; max-width:32rem; overflow:hidden;
  text-overflow:ellipsis; vertical-align:middle; }
.mg-chip b { font-weight:600; }
.mg-chip.live { border-color:#009E73; background:color-mix(in srgb, #009E73 16%, transparent); }
.mg-chip.warn { border-color:#E69F00; background:color-mix(in srgb, #E69F00 16%, transparent); }
.mg-cards { display:grid; grid-template-columns:repeat(auto-fit, minmax(132px, 1fr)); gap:.7rem;
  margin:.3rem 0 .5rem 0; }
/* Of eight cards the last would stand alone in a second line. */
.mg-cards:has(.mg-card:nth-child(8)) { grid-template-columns:repeat(auto-fit, minmax(min(225px, 44%), 1fr)); }
.mg-card { border:1px solid color-mix(in srgb, currentColor 14%, transparent); border-radius:.7rem;
  padding:.8rem .95rem .75rem .95rem; background:color-mix(in srgb, currentColor 2.5%, transparent);
  border-top:3px solid var(--mg-accent, color-mix(in srgb, currentColor 25%, transparent)); container-type:inline-size; }
.mg-card .label { font-size:.8rem; opacity:.72; font-weight:500; }
/* "unknown" must stay one word in the narrowest card. */
.mg-card .value { font-size:clamp(1.2rem, 22cqi, 1.75rem); font-weight:650; letter-spacing:-.02em; line-height:1.25;
  font-variant-numeric:tabular-nums; overflow-wrap:anywhere; }
.mg-card .value small { font-size:.95rem; font-weight:500; opacity:.75; margin-left:.15rem; letter-spacing:0; }
.mg-card .sub { font-size:.8rem; opacity:.78; font-variant-numeric:tabular-nums; line-height:1.35; }
.mg-legend { display:flex; flex-wrap:wrap; gap:.3rem 1.1rem; font-size:.82rem; margin:.1rem 0 .35rem 0; }
.mg-legend span.m { font-size:.85rem; margin-right:.3rem; }
.mg-empty { border:1px dashed color-mix(in srgb, currentColor 30%, transparent); border-radius:.8rem;
  padding:2rem 2.2rem;
  margin:1rem 0; max-width:62rem; }
.mg-empty h3 { margin:0 0 .5rem 0; padding:0; font-size:1.2rem; }
.mg-empty pre { background:color-mix(in srgb, currentColor 7%, transparent); padding:.8rem 1rem; border-radius:.5rem;
  overflow-x:auto; font-size:.86rem; }
.mg-strip { font-family:ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size:.87rem;
  line-height:2.05; padding:.8rem 1rem 1rem 1rem; border-radius:.7rem; overflow-wrap:anywhere; position:relative;
  border:1px solid color-mix(in srgb, currentColor 14%, transparent);
  background:color-mix(in srgb, currentColor 2.5%, transparent); }
.mg-strip .t { padding:.14rem .07rem; border-radius:.22rem; border-bottom:2px solid transparent; cursor:pointer;
  white-space:pre-wrap; text-decoration:none; color:inherit; }
.mg-strip .t:hover, .mg-strip .t:focus-visible { outline:2px solid currentColor; outline-offset:1px; }
.mg-strip .w { opacity:.34; }
.mg-strip .id { opacity:.75; font-size:.78rem; padding:0 .22rem; margin:0 .06rem;
  border:1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius:.25rem; }
.mg-strip .triggered { background:color-mix(in srgb, #56B4E9 26%, transparent); border-bottom-color:#56B4E9; }
.mg-strip .would-trigger { background:color-mix(in srgb, #7F9DB9 22%, transparent); border-bottom:2px dotted #7F9DB9; }
.mg-strip .flipped { background:color-mix(in srgb, #E69F00 34%, transparent); border-bottom:2px dashed #E69F00;
  font-weight:600; }
.mg-strip .repaired { background:color-mix(in srgb, #009E73 38%, transparent); border-bottom:3px double #009E73;
  font-weight:600; }
.mg-strip .missed { background:color-mix(in srgb, #D55E00 42%, transparent); border-bottom:3px solid #D55E00;
  font-weight:700; }
.mg-strip .diverged { background:color-mix(in srgb, #D55E00 42%, transparent); border-bottom:3px solid #D55E00;
  font-weight:700; }
.mg-strip .only, .mg-key.only { background:color-mix(in srgb, #D55E00 14%, transparent); }
.mg-strip .again, .mg-key.again { border-bottom:2px dotted color-mix(in srgb, #009E73 80%, transparent); }
.mg-key { font-weight:500; padding:.05rem .3rem; border-radius:.2rem; }
.mg-key.diverged { background:color-mix(in srgb, #D55E00 42%, transparent); }
.mg-result { font-size:1.5rem; font-weight:650; letter-spacing:-.01em; margin:.1rem 0 .3rem 0; font-variant-numeric:tabular-nums; }
.mg-strip .same { }
.mg-strip .sel { outline:2px solid #CC79A7; outline-offset:1px; }
.mg-strip .t::after { display:none; content:attr(data-tip); position:absolute; z-index:50; white-space:pre;
  font-size:.76rem; font-weight:400; line-height:1.5; text-align:left; padding:.55rem .7rem; border-radius:.5rem;
  background:#1b1f27; color:#f2f4f8; border:1px solid #4a5160; box-shadow:0 6px 24px rgba(0,0,0,.35); left:1rem;
  bottom:100%;
  pointer-events:none; }
.mg-strip .t:hover::after, .mg-strip .t:focus-visible::after { display:block; }
/* Where the browser can anchor it, the hover text stands below its token and stays inside the window. */
@supports (position-area: bottom span-right) {
  .mg-strip .t:hover, .mg-strip .t:focus-visible { anchor-name:--mg-token; }
  .mg-strip .t::after { position:fixed; left:auto; bottom:auto; position-anchor:--mg-token;
    position-area:bottom span-right; margin:.35rem 0; position-try-fallbacks:flip-inline, flip-block, flip-block flip-inline; }
}
.mg-two { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap:1rem; }
.st-key-mg-nav a { padding-top:.22rem; padding-bottom:.22rem; }
@media (max-width: 640px) {
  .st-key-mg-nav a { padding-top:.5rem; padding-bottom:.5rem; }
  [data-testid=stButtonGroup] > div { flex-wrap:wrap; max-width:100%; }
}
/* Streamlit's own captions are 3.6:1 on white, the keys on its buttons 3.9:1. */
[data-testid=stBaseButton-secondary]:not(:disabled) * { opacity:1; }
[data-testid=stCaptionContainer] { color:inherit; opacity:.78; }
[data-testid=stCaptionContainer] p { color:inherit; }
.mg-two h4 { margin:.1rem 0 .35rem 0; padding:0; font-size:.92rem; font-weight:600; opacity:.85; }
</style>
"""

DARK_CSS = """
<style>
/* White on the dark theme's light blue is 2.4:1. */
[data-testid=stBaseButton-primary], [data-testid=stBaseButton-primary] * { color:#10131A; }
</style>
"""
