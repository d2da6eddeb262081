"""One legend vocabulary for every page: what a step was, its colour, its mark, and its words."""

from __future__ import annotations

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


# Okabe-Ito colours (distinct under the common colour-vision deficiencies, visible on white and on near-black).
STABLE = State("stable", "#8C96A3", "circle", "●", "margin above the threshold, no flip seen")
TRIGGERED = State(
    "triggered", "#56B4E9", "triangle-up", "▲", "margin at or below the threshold: verified, token confirmed"
)
FLIPPED = State("flipped", "#E69F00", "x", "✕", "the verify chose another token; not put in place (shadow verify)")
REPAIRED = State("repaired", "#009E73", "diamond", "◆", "flipped, and the verify's token and K/V put in place")
MISSED = State("missed", "#D55E00", "square", "■", "flipped above the threshold: the gate alone would not have seen it")

STATES: tuple[State, ...] = (STABLE, TRIGGERED, FLIPPED, REPAIRED, MISSED)
"""Index in this tuple is the state code of :func:`margingate_dashboard.states.classify`."""

# For datasets, policies and runs, which are not states: IBM's colour-blind-safe set, told apart by dash as well.
SERIES_COLOURS = ("#648FFF", "#FFB000", "#785EF0", "#22A7A0", "#DC267F", "#FE6100")
SERIES_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

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
.mg-card { border:1px solid color-mix(in srgb, currentColor 14%, transparent); border-radius:.7rem;
  padding:.8rem .95rem .75rem .95rem; background:color-mix(in srgb, currentColor 2.5%, transparent);
  border-top:3px solid var(--mg-accent, color-mix(in srgb, currentColor 25%, transparent)); }
.mg-card .label { font-size:.8rem; opacity:.72; font-weight:500; }
.mg-card .value { font-size:1.75rem; font-weight:650; letter-spacing:-.02em; line-height:1.25;
  font-variant-numeric:tabular-nums; }
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
.mg-strip .t { padding:.14rem .07rem; border-radius:.22rem; border-bottom:2px solid transparent; cursor:help;
  white-space:pre-wrap; text-decoration:none; color:inherit; }
.mg-strip .t:hover, .mg-strip .t:focus-visible { outline:2px solid currentColor; outline-offset:1px; }
.mg-strip .w { opacity:.34; }
.mg-strip .id { opacity:.75; font-size:.78rem; padding:0 .22rem; margin:0 .06rem;
  border:1px solid color-mix(in srgb, currentColor 20%, transparent); border-radius:.25rem; }
.mg-strip .triggered { background:color-mix(in srgb, #56B4E9 26%, transparent); border-bottom-color:#56B4E9; }
.mg-strip .flipped { background:color-mix(in srgb, #E69F00 34%, transparent); border-bottom:2px dashed #E69F00;
  font-weight:600; }
.mg-strip .repaired { background:color-mix(in srgb, #009E73 38%, transparent); border-bottom:3px double #009E73;
  font-weight:600; }
.mg-strip .missed { background:color-mix(in srgb, #D55E00 42%, transparent); border-bottom:3px solid #D55E00;
  font-weight:700; }
.mg-strip .diverged { background:color-mix(in srgb, #D55E00 42%, transparent); border-bottom:3px solid #D55E00;
  font-weight:700; }
.mg-strip .after { background:color-mix(in srgb, #D55E00 12%, transparent); }
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
.mg-two { display:grid; grid-template-columns:repeat(auto-fit, minmax(420px, 1fr)); gap:1rem; }
.mg-two h4 { margin:.1rem 0 .35rem 0; padding:0; font-size:.92rem; font-weight:600; opacity:.85; }
</style>
"""
