"""Two runs in one file: what differs in how they were started, which answers are the same, and what they took."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd

from margingate_dashboard import align
from margingate_dashboard.cards import Card, cards_html
from margingate_dashboard.facts import identity, versus
from margingate_dashboard.rates import of, share
from margingate_dashboard.report import parts
from margingate_dashboard.report.page import document, load
from margingate_dashboard.summary import tag


def pair_html(a: Path, b: Path) -> str:
    """Return the report of run b against run a.

    Raises
    ------
    TraceError
        A run cannot be read.
    """
    (left, steps_a, requests_a), (right, steps_b, requests_b) = load(a), load(b)
    names = left.path.resolve().name, right.path.resolve().name
    answers = [parts.answers_of(r, s, n) for r, s, n in zip((requests_a, requests_b), (steps_a, steps_b), names)]
    rows = pd.concat(answers, ignore_index=True)
    settings = versus.settings(left.manifest, right.manifest)
    grave = [str(f) for f in settings["field"] if f in versus.GRAVE]
    pairs = align.pair(requests_a, requests_b)
    table = align.divergences(pairs.table, steps_a, steps_b)
    table["dataset"] = table["dataset"].map(tag)
    kept = versus.paired(*(identity.compared(r) for r in answers))
    body = [
        f'<div class="mg-head"><h1>{html.escape(names[0])} (a) and {html.escape(names[1])} (b)</h1></div>',
        *(
            [
                f"<p><b>These runs differ in {html.escape(', '.join(grave))}: other answers are no sign of a flip.</b></p>"
            ]
            if grave
            else []
        ),
        "<h2>Identical answers, whatever the batch</h2>",
        parts.table(parts.matrix_table(identity.matrix(identity.compared(rows)), 2)),
        *_paired(kept),
        f"<h2>Matched requests</h2><p class='note'>{html.escape(pairs.how)} Left out, as no step of them was observed: "
        f"{pairs.unobserved[0]:,} of a, {pairs.unobserved[1]:,} of b.</p>",
        *([parts.table(versus.by_policies(table)), cards_html(_headline(table))] if len(table) else ["<p>None.</p>"]),
        "<h2>Time of matched requests, in ms</h2>",
        parts.table(versus.deltas(table, requests_a, requests_b)),
        "<h2>What differs in how they were started</h2>",
        parts.table(settings),
        "<h2>Requests that diverge, earliest first</h2>",
        parts.table(table[~table["identical"]].sort_values("first", kind="stable").drop(columns="identical").head(300)),
    ]
    return document(f"{names[0]} and {names[1]}: MarginGate report", body)


def _headline(table: pd.DataFrame) -> list[Card]:
    same = int(table["identical"].sum())
    return [
        Card("Identical sequences", share(same, len(table)), f"{of(same, len(table))} matched requests"),
        Card("Diverged", f"{len(table) - same:,}", f"{of(len(table) - same, len(table))} matched requests"),
    ]


def _paired(found: versus.Paired) -> list[str]:
    if not found.prompts:
        return []
    return [
        f"<p>Prompts that both answered more than once: all answers the same in both {found.both:,} of {found.prompts:,}, only in a "
        f"{found.only_a:,}, only in b {found.only_b:,}, in neither {found.neither:,}. McNemar's exact test: p = {found.p_value:.3g}.</p>"
    ]
