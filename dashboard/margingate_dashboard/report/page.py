"""A run as one HTML file that opens from disk: numbers, guarantee, margins, flips, and the worst requests' tokens."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from margingate_dashboard import states, tokens
from margingate_dashboard.bins import LOGARITHMIC, margin_bins
from margingate_dashboard.cards import cards_html, headline_cards
from margingate_dashboard.context import flip_text
from margingate_dashboard.facts import identity
from margingate_dashboard.facts.policies import leading, of_request, with_policy
from margingate_dashboard.figures import margins as margin_figures
from margingate_dashboard.figures import overview as overview_figures
from margingate_dashboard.figures.common import safe
from margingate_dashboard.report import parts
from margingate_dashboard.summary import guarantee_notes, has_tag, headline, tags
from margingate_dashboard.tables import FLIP_CODES, FLIP_COLUMNS, by_dataset, by_policy, flip_list
from margingate_dashboard.theme import CSS
from sglang_margingate import __version__
from sglang_margingate.trace import Run, read_run
from sglang_margingate.trace.errors import brief
from sglang_margingate.trace.schema import STEP_SCHEMA

WORST = 5
"""Requests whose tokens are shown."""
STRIP = 600
"""Tokens of a strip, around the request's first flip."""
FLIPS = 300
"""Rows of the table of flips."""

STEPS = tuple(
    n
    for n in dict.fromkeys(
        [*FLIP_COLUMNS, *states.STATE_COLUMNS, "prefill", "time", "structural", "step_ms", "verify_ms", "window_rows"]
    )
    if n in STEP_SCHEMA.names
)
REQUESTS = tuple(
    dict.fromkeys(
        [
            *identity.COLUMNS, "guarantee", "guarantee_note", "overhead_ms", "overhead_share", "e2e_ms", "ttft_ms", "tpot_ms",
            "repair", "prompt_text",
        ]
    )
)  # fmt: skip

_PAGE_CSS = """
<style>
:root { color-scheme: light dark; }
body { font-family:system-ui, "Segoe UI", Helvetica, Arial, sans-serif; margin:0 auto; padding:2rem 2.2rem 4rem; max-width:1240px;
  background:#fff; color:#23262d; line-height:1.5; }
h1 { font-size:1.7rem; margin:0; } h2 { font-size:1.2rem; margin:2.2rem 0 .6rem; } h3 { font-size:1rem; margin:1.4rem 0 .3rem; }
table { border-collapse:collapse; font-size:.85rem; font-variant-numeric:tabular-nums; }
.scroll { overflow-x:auto; max-height:32rem; overflow-y:auto; }
th, td { text-align:left; padding:.3rem .7rem; border-bottom:1px solid color-mix(in srgb, currentColor 14%, transparent); }
th { position:sticky; top:0; background:#f3f4f6; } td.n { text-align:right; }
pre { white-space:pre-wrap; overflow-wrap:anywhere; font-size:.8rem; padding:.8rem 1rem; border-radius:.5rem;
  background:color-mix(in srgb, currentColor 6%, transparent); }
.note { font-size:.85rem; opacity:.75; }
@media (prefers-color-scheme: dark) { body { background:#16181d; color:#e8eaee; } th { background:#22262e; } }
</style>
"""

# Axis text follows the reader's colour scheme; the file has no server to do it.
_SCRIPT = """
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const ink = dark.matches ? "#d7dae0" : "#3a3f48";
  document.querySelectorAll(".js-plotly-plot").forEach(p => Plotly.relayout(p, {"font.color": ink}));
}
dark.addEventListener("change", paint); addEventListener("load", paint);
</script>
"""

# The file may not load anything: what it shows is what it holds, whatever a prompt in it says.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


def report_html(path: Path) -> str:
    """Return the report of the run at ``path``.

    Raises
    ------
    TraceError
        The run cannot be read.
    """
    run, steps, requests = load(path)
    policy = leading(requests["policy"]) if len(requests) else leading(steps["policy"])
    mine = requests[(requests["policy"] == policy).to_numpy()]
    title = f"{run.path.resolve().name}: MarginGate report"
    body = [
        _head(run),
        *parts.identity_part(requests, steps, run.path.resolve().name),
        f"<h2>Policy {html.escape(policy)}: {len(mine):,} of {len(requests):,} finished requests</h2>",
        cards_html(headline_cards(headline(steps[(steps["policy"] == policy).to_numpy()]), mine, policy)),
        "<h2>By policy</h2>",
        parts.table(by_policy(steps, requests)),
        _figure(overview_figures.guarantees(requests)),
        *_guarantee_notes(requests),
        _figure(overview_figures.events(overview_figures.over_time(steps))),
        "<h2>By dataset</h2>",
        parts.table(by_dataset(steps, requests)),
        *parts.latency_part(requests),
        *parts.tuning_part(steps),
        _figure(_histogram(steps)),
        *_flips(run, steps),
        *_worst(run, steps),
        f"<h2>Manifest</h2><pre>{html.escape(json.dumps(run.manifest, indent=2, default=str))}</pre>",
        f'<p class="note">Written by sglang-margingate {html.escape(__version__)}. This file loads nothing from the network.</p>',
    ]
    return document(title, body)


def load(path: Path) -> tuple[Run, pd.DataFrame, pd.DataFrame]:
    """Return a run, its steps with what pages derive from them, and its requests with their policies as shown."""
    run = read_run(path, step_columns=STEPS, request_columns=REQUESTS)
    requests = with_policy(run.requests)
    steps = run.steps.assign(
        state=states.classify(run.steps),
        triggered=states.triggered(run.steps),
        verified=states.verified(run.steps),
        examined=states.examined(run.steps),
        above=states.above(run.steps),
        policy=of_request(run.steps["request"], requests, "policy"),
    )
    return run, steps, requests


def document(title: str, body: list[str]) -> str:
    """Return one HTML file that loads nothing."""
    plotly = f"<script>{get_plotlyjs()}</script>" if any("Plotly.newPlot" in part for part in body) else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"{CSS}{_PAGE_CSS}{plotly}</head><body>{''.join(body)}{_SCRIPT}</body></html>\n"
    )


def _head(run: Run) -> str:
    manifest = run.manifest
    chips = [str(manifest[k]) for k in ("model", "policy", "device", "created") if manifest.get(k)]
    spans = "".join(f'<span class="mg-chip">{html.escape(c)}</span>' for c in chips)
    if manifest.get("synthetic"):
        spans += '<span class="mg-chip warn">made-up data</span>'
    warnings = "".join(f'<p class="note">Note: {html.escape(brief(w, run.path))}</p>' for w in run.warnings)
    return f'<div class="mg-head"><h1>{html.escape(run.path.resolve().name)}</h1>{spans}</div>{warnings}'


def _figure(fig: go.Figure) -> str:
    fig.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", template="none")
    return str(fig.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}))


def _guarantee_notes(requests: pd.DataFrame) -> list[str]:
    return [f'<p class="note">{html.escape(line)}</p>' for line in guarantee_notes(requests)]


def _histogram(steps: pd.DataFrame) -> go.Figure:
    decode = steps[~states.as_bool(steps["prefill"])]
    flipped = states.as_bool(decode["flipped"])
    margin = np.nan_to_num(decode["margin"].to_numpy(dtype=np.float64), nan=0.0)
    stable, flips = {}, {}
    for name in tags(decode["dataset"]):
        mine = has_tag(decode["dataset"], {name})
        stable[safe(name)], flips[safe(name)] = np.sort(margin[mine & ~flipped]), np.sort(margin[mine & flipped])
    known = decode["threshold"].dropna()
    threshold = float(known.mode().iloc[0]) if len(known) else 0.0
    return margin_figures.histogram(stable, flips, margin_bins(margin, LOGARITHMIC), LOGARITHMIC, threshold)


def _flips(run: Run, steps: pd.DataFrame) -> list[str]:
    known = tokens.vocabulary(steps["token"], steps["token_text"])
    total = headline(steps)
    table = flip_list(steps[~states.as_bool(steps["prefill"])], known)
    if table.empty:
        return [f"<h2>Flips</h2><p>No flip was confirmed in {total.verified:,} verified steps.</p>"]
    first = table.iloc[0]
    full = read_run(run.path, request_columns=[], filters=[("request", "==", int(first["number"]))]).steps
    full = full.sort_values("step", kind="stable").reset_index(drop=True)
    text = flip_text(run.path.resolve().name, run.manifest, str(first["request"]), full, int(first["step"]), known)
    shown = f", first {FLIPS}" if len(table) > FLIPS else ""
    return [
        f"<h2>Flips</h2><p>{total.flips:,} confirmed flips in {total.verified:,} verified steps, highest margin first{shown}.</p>",
        tokens.legend(("flipped", "repaired", "missed")),
        parts.table(table.head(FLIPS)),
        f"<h3>The first of them</h3><pre>{html.escape(text)}</pre>",
    ]


def _worst(run: Run, steps: pd.DataFrame) -> list[str]:
    """Return the token strips of the requests with most flips, then of those with the lowest margin."""
    decode = steps[~states.as_bool(steps["prefill"])]
    if decode.empty:
        return []
    numbers = decode["request"].to_numpy(dtype=np.int64, na_value=-1)
    flips = pd.Series(np.isin(decode["state"], FLIP_CODES)).groupby(numbers).sum()
    lowest = pd.Series(decode["margin"].to_numpy()).groupby(numbers).min()
    order = pd.DataFrame({"flips": -flips, "lowest": lowest}).sort_values(["flips", "lowest"], kind="stable")
    known = tokens.vocabulary(steps["token"], steps["token_text"])
    prompts = dict(zip(run.requests["request"].tolist(), run.requests["prompt_text"].tolist()))
    found_parts = ["<h2>Worst requests, token by token</h2>", tokens.legend()]
    for request in order.index[:WORST]:
        found = read_run(
            run.path, step_columns=STEP_SCHEMA.names, request_columns=[], filters=[("request", "==", int(request))]
        )
        mine = (
            found.steps.sort_values("step", kind="stable").drop_duplicates("step", keep="last").reset_index(drop=True)
        )
        mine = mine.assign(state=states.classify(mine))
        flipped = np.flatnonzero(np.isin(mine["state"], FLIP_CODES))
        begin = max(0, int(flipped[0]) - STRIP // 2) if len(mine) > STRIP and flipped.size else 0
        window = mine.iloc[begin : begin + STRIP]
        where = f", tokens {begin}–{begin + len(window) - 1}" if len(window) < len(mine) else ""
        found_parts.append(
            f"<h3>{html.escape(str(mine['request_id'].iloc[0]))} (request {request})</h3><p class='note'>{-int(order.loc[request, 'flips']):,} flips, lowest margin "
            f"{order.loc[request, 'lowest']:.6g}, {len(mine):,} tokens{where}</p>"
        )
        prompt = prompts.get(int(request))
        if isinstance(prompt, str):
            found_parts.append(f"<details><summary>Prompt</summary><pre>{html.escape(prompt)}</pre></details>")
        found_parts.append(tokens.strip(window, known))
    return found_parts
