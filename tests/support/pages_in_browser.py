"""What the browser tests do with a page: open it, wait for it, read it, and look at what a reader could not read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "screenshots"
KEEP = os.environ.get("MARGINGATE_SCREENSHOTS") == "1"


def wait_drawn(tab: Any, title: str) -> None:
    """Wait until the page's script has ended, nothing on it is stale, and its charts are drawn."""
    tab.wait_for_function(
        """title => {
            const head = document.querySelector('.mg-head h1');
            const app = document.querySelector('[data-testid=stApp]');
            const charts = document.querySelectorAll('[data-testid=stPlotlyChart]');
            return head && head.textContent === title && app.dataset.testScriptState === 'notRunning'
                && !document.querySelector('[data-stale=true]') && !document.querySelector('[data-testid=stSkeleton]')
                && [...charts].every(c => c.querySelector('.main-svg'));
        }""",
        arg=title,
        timeout=180_000,
    )


def visit(tab: Any, address: str, page: str, query: str = "") -> None:
    tab.goto(f"{address}/{'' if page == 'runs' else page}{query}")
    wait_drawn(tab, page.title())


def keep(tab: Any, name: str, whole: bool = True) -> None:
    """Save a screenshot where ``MARGINGATE_SCREENSHOTS=1`` asks for them: one takes as long as the page's test.

    Of the whole page, unless told otherwise; Streamlit scrolls inside, so the window is made as tall as the content.
    """
    if not KEEP:
        return
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    if not whole:
        tab.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
        return
    height = tab.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
    tab.set_viewport_size({"width": 1440, "height": max(800, min(height + 20, 6000))})
    tab.wait_for_timeout(500)
    tab.screenshot(path=SCREENSHOTS / f"{name}.png")
    tab.set_viewport_size({"width": 1440, "height": 1000})


@contextmanager
def problems_of(tab: Any) -> Iterator[list[str]]:
    """Collect what goes wrong on the page meanwhile: errors of its console, and those that nobody caught."""
    found: list[str] = []

    def said(message: Any) -> None:
        if message.type == "error":
            found.append(message.text)

    def thrown(error: Any) -> None:
        found.append(str(error))

    tab.on("console", said)
    tab.on("pageerror", thrown)
    try:
        yield found
    finally:
        tab.remove_listener("console", said)
        tab.remove_listener("pageerror", thrown)


def cards(tab: Any) -> dict[str, str]:
    """Return the headline numbers by label."""
    labels = tab.locator(".mg-card .label").all_text_contents()
    return dict(zip(labels, tab.locator(".mg-card .value").all_text_contents()))


def row_of(tab: Any, table: int, row: int, x: float = 12) -> tuple[float, float]:
    """Where to click to select a row of a table: its box, or where in the row it is asked for."""
    place = tab.locator("[data-testid=stDataFrame]").nth(table)
    place.scroll_into_view_if_needed()
    box = place.bounding_box()
    return box["x"] + x, box["y"] + 35 * (row + 1) + 17


def copied_link(tab: Any) -> str:
    """Return the address that the page offers for copying."""
    tab.get_by_role("button", name="Copy link").click()
    box = tab.locator("[data-testid=stPopoverBody] code")
    box.wait_for()
    text: str = box.text_content()
    tab.keyboard.press("Escape")
    return text


FAINT = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); if (c.startsWith('color(')) {return [m[0]*255,m[1]*255,m[2]*255,m[3]??1];} return [m[0],m[1],m[2],m[3]??1]; };
  const over = (f,b) => [0,1,2].map(i => f[i]*f[3]+b[i]*(1-f[3])).concat([1]);
  const lum = c => { const v = c.slice(0,3).map(x => {x/=255; return x<=.03928? x/12.92 : ((x+.055)/1.055)**2.4;}); return .2126*v[0]+.7152*v[1]+.0722*v[2]; };
  const ratio = (a,b) => { const [x,y]=[lum(a),lum(b)].sort((p,q)=>q-p); return (x+.05)/(y+.05); };
  const back = el => { const stack=[]; for (let e=el; e; e=e.parentElement) { const c=parse(getComputedStyle(e).backgroundColor); if (c[3]>0) stack.push(c); if (c[3]===1) break; }
    let b=[255,255,255,1]; for (const c of stack.reverse()) b=over(c,b); return b; };
  const found = {};
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const t = walk.currentNode.textContent.trim(), el = walk.currentNode.parentElement;
    if (!t || !el || ['SCRIPT','STYLE','NOSCRIPT','TITLE'].includes(el.tagName) || !el.checkVisibility({checkOpacity:true,checkVisibilityCSS:true})) continue;
    const s = getComputedStyle(el), svg = el instanceof SVGElement;
    if (el.closest('[disabled],[aria-disabled=true],label:has(input:disabled),.w,.m,[data-testid=stIconMaterial],[data-testid=stSliderThumbValue],[role=slider]')) continue;
    const r = el.getBoundingClientRect(); if (r.width<1||r.height<1) continue;
    let c = parse(svg ? s.fill : s.color); if (svg && s.fill==='none') continue;
    let o = 1; for (let e=el; e; e=e.parentElement) o*=parseFloat(getComputedStyle(e).opacity);
    if (svg) o*=parseFloat(s.fillOpacity||1);
    c=[c[0],c[1],c[2],c[3]*o];
    const b = back(el.closest('svg')?.parentElement ?? el);
    const k = ratio(over(c,b),b), size=parseFloat(s.fontSize), big = size>=24||(size>=18.66&&parseInt(s.fontWeight)>=700);
    if (k < (big?3:4.5)-0.01 && !(svg && el.closest('.bars,.hm,.heatmaplayer,.bartext,.trace'))) { const key=(el.closest('[data-testid]')?.dataset.testid??el.tagName)+' '+el.className; (found[key] ??= [k.toFixed(2), t.slice(0,40), s.color]); }
  }
  return found;
}"""
OVERLAPS = """() => {
  const boxes = [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot =>
    [...plot.querySelectorAll('.g-xtitle text, .g-x2title text, .g-x3title text, .g-ytitle text, .g-y2title text, .g-y3title text')]
      .map(t => [t.textContent, t.getBoundingClientRect()]).filter(([, r]) => r.width > 0));
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, b] = [boxes[i][1], boxes[j][1]];
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1) found.push([boxes[i][0], boxes[j][0]]);
  }
  return found;
}"""


def faint(tab: Any) -> dict[str, Any]:
    """Return the visible texts with less contrast than WCAG's level AA asks for, by what they stand in.

    4.5 to 1, 3 to 1 for large text; disabled controls are exempt there. Marks are left out here (of white space, in legends, on
    bars), and the value of a slider, which stands above its thumb and not on it.
    """
    found: dict[str, Any] = tab.evaluate(FAINT)
    return found


def overlaps(tab: Any) -> list[list[str]]:
    """Return the titles of axes that lie on each other."""
    found: list[list[str]] = tab.evaluate(OVERLAPS)
    return found
