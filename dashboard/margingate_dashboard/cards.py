"""Headline numbers, as data and as HTML; used by the pages and by the report."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from margingate_dashboard.rates import at_most, milliseconds, of, share
from margingate_dashboard.summary import Headline, overhead
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, TRIGGERED


class Card(NamedTuple):
    """One headline number."""

    label: str
    value: str
    sub: str = ""
    accent: str = ""


def cards_html(items: Iterable[Card]) -> str:
    """Return the HTML of some headline numbers; every text is escaped."""
    parts = []
    for card in items:
        accent = f' style="--mg-accent:{card.accent}"' if card.accent else ""
        parts.append(
            f'<div class="mg-card"{accent}><div class="label">{html.escape(card.label)}</div>'
            f'<div class="value">{html.escape(card.value)}</div><div class="sub">{html.escape(card.sub)}</div></div>'
        )
    return f'<div class="mg-cards">{"".join(parts)}</div>'


def missed_card(total: Headline, structural: bool = False) -> Card:
    """Return the card of missed flips: a count, and the bound that goes with how many steps were looked at.

    ``structural`` says that every request ran inside the probed class, where no margin has to be trusted.
    """
    if total.steps and not total.untriggered:
        return Card("Missed flips", "0", "every decode step triggered", MISSED.colour)
    if structural and not total.examined:
        return Card(
            "Missed flips", "n/a", "all shapes inside the probed class: no step depends on its margin", MISSED.colour
        )
    if not total.examined:
        return Card(
            "Missed flips", "unknown", "no untriggered step was audited (--margingate-audit-rate)", MISSED.colour
        )
    if total.miss_known:
        sub = f"{of(total.missed, total.examined)} untriggered steps, all of them verified"
    else:
        sub = f"{of(total.missed, total.examined)} audited steps: at most {at_most(total.miss_upper)} (95%)"
    return Card("Missed flips", f"{total.missed:,}", sub, MISSED.colour)


def headline_cards(total: Headline, requests: pd.DataFrame) -> list[Card]:
    """Return the cards of a run's headline numbers."""
    added, whole = overhead(requests)
    claims = requests["guarantee"].astype(str)
    held = int(claims.isin(("structural", "verified", "gated")).sum())
    return [
        Card(
            "Requests finished",
            f"{len(requests):,}",
            f"{int(requests['output_tokens'].fillna(0).sum()):,} output tokens",
        ),
        Card(
            "Trigger rate",
            share(total.triggered, total.steps),
            f"{of(total.triggered, total.steps)} decode steps",
            TRIGGERED.colour,
        ),
        Card(
            "Flips",
            f"{total.flips:,}",
            f"{share(total.flips, total.verified)} of {total.verified:,} verified steps",
            FLIPPED.colour,
        ),
        Card("Repaired", f"{total.repaired:,}", f"{of(total.repaired, total.flips)} flips", REPAIRED.colour),
        missed_card(total, len(claims) > 0 and bool((claims == "structural").all())),
        Card("Overhead", share(added, whole), f"{milliseconds(added)} of {milliseconds(whole)} end to end"),
        Card("With a guarantee", share(held, len(requests)), f"{of(held, len(requests))} finished requests"),
    ]
