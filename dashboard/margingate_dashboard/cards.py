"""Headline numbers, as data and as HTML; used by the pages and by the report."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from margingate_dashboard.facts.policies import may_verify
from margingate_dashboard.rates import at_most, milliseconds, of, share
from margingate_dashboard.summary import Headline, overhead
from margingate_dashboard.theme import FLIPPED, MISSED, REPAIRED, TRIGGERED, WOULD


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


def missed_card(total: Headline, policy: str) -> Card:
    """Return the card of missed flips of one policy's traffic: a count, and the bound that goes with what was looked at."""
    label, colour = "Missed flips", MISSED.colour
    if not total.steps:
        return Card(label, "n/a", "no decode step was observed", colour)
    if policy == "always":
        above = f"{of(total.above, total.flips)} flips lay above tau: the gate alone would have missed them"
        return Card(label, f"{total.missed:,}", f"every step is verified and repaired; {above}", colour)
    if not may_verify(policy):
        return Card(label, "unknown", f"policy {policy} verifies nothing", colour)
    if policy != "gate":
        return Card(label, "unknown", "the policies of these requests are known when they end", colour)
    if not total.untriggered:
        return Card(label, f"{total.missed:,}", "every decode step triggered", colour)
    if not total.examined:
        if total.structural == total.steps:
            return Card(label, "n/a", "all shapes inside the probed class: no step depends on its margin", colour)
        return Card(label, "unknown", "no untriggered step was audited (--margingate-audit-rate)", colour)
    counts = f"{of(total.above, total.examined)} audited steps of policy {policy}"
    return Card(
        label, f"{total.missed:,}", f"{counts}: at most {at_most(total.miss_upper)} of untriggered steps (95%)", colour
    )


def trigger_card(total: Headline, policy: str) -> Card:
    """Return the card of low margins: verified for it, or only seen (policy log)."""
    counts = f"{of(total.low, total.steps)} decode steps"
    if policy == "log":
        return Card("Would trigger", share(total.low, total.steps), counts + ", none verified", WOULD.colour)
    inside = f"; {total.structural:,} structural" if total.structural else ""
    return Card("Trigger rate", share(total.low, total.steps), counts + inside, TRIGGERED.colour)


def headline_cards(total: Headline, requests: pd.DataFrame, policy: str) -> list[Card]:
    """Return the cards of one policy's traffic."""
    added, whole = overhead(requests)
    claims = requests["guarantee"].astype(str)
    held = int(claims.isin(("structural", "verified", "gated")).sum())
    tokens = int(requests["output_tokens"].fillna(0).sum())
    found = [Card("Requests finished", f"{len(requests):,}", f"{tokens:,} output tokens"), trigger_card(total, policy)]
    if may_verify(policy):
        flips = f"{share(total.flips, total.verified)} of {total.verified:,} verified steps"
        found += [
            Card("Flips", f"{total.flips:,}", flips, FLIPPED.colour),
            Card("Repaired", f"{total.repaired:,}", f"{of(total.repaired, total.flips)} flips", REPAIRED.colour),
        ]
    else:
        found.append(Card("Flips", "unknown", "no step was verified, so none can be seen", FLIPPED.colour))
    return [
        *found,
        missed_card(total, policy),
        Card("Overhead", share(added, whole), f"{milliseconds(added)} of {milliseconds(whole)} end to end"),
        Card("With a guarantee", share(held, len(requests)), f"{of(held, len(requests))} finished requests"),
    ]
