"""Tokens on screen: classes for statistics, visible white space, and the HTML of a token strip.

Prompt and token text come from users and models. Nothing of it reaches HTML without :func:`html.escape`.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable

import numpy as np
import pandas as pd

from margingate_dashboard.theme import STATES

CLASSES = ("word", "word piece", "number", "punctuation", "white space", "other", "no text")

_MOST_IDS = 1 << 24
_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u200b": "∅"}


def token_class(text: object) -> str:
    """Return the class of one token's text: ``" the"`` is a word, ``"ing"`` a word piece."""
    if not isinstance(text, str) or text == "":
        return "no text"
    body = text.strip()
    if not body:
        return "white space"
    if all(unicodedata.category(c)[0] in "PS" for c in body):
        return "punctuation"
    if any(c.isdigit() for c in body) and not any(c.isalpha() for c in body):
        return "number"
    if any(c.isalpha() for c in body):
        return "word" if text[0].isspace() or body[0].isupper() else "word piece"
    return "other"


def vocabulary(tokens: pd.Series, texts: pd.Series) -> dict[int, str]:
    """Return the text of each token id that these steps committed (a runner-up's text is known only from there)."""
    codes, ids = pd.factorize(tokens.to_numpy(), sort=False)
    first = np.zeros(len(ids), dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last write wins: the first row of each id
    found = zip(ids.tolist(), texts.iloc[first].tolist())
    return {int(token): text for token, text in found if isinstance(text, str)}


def classes(tokens: pd.Series, known: dict[int, str]) -> np.ndarray:
    """Return an index into :data:`CLASSES` for each step, from the text of each token id: a lookup, no comparison."""
    ids = [token for token in known if 0 <= token < _MOST_IDS]
    by_id = np.full(
        max(ids, default=-1) + 2, CLASSES.index("no text"), dtype=np.int8
    )  # the last one is for the unknown
    for token in ids:
        by_id[token] = CLASSES.index(token_class(known[token]))
    wanted = tokens.to_numpy()
    return by_id[np.where((wanted >= 0) & (wanted < by_id.size), wanted, by_id.size - 1)]


def plain(text: object, token: object) -> str:
    """Return a token as one line of visible plain text: ``·the``, ``⏎``, or ``#1234`` where no text was recorded."""
    if not isinstance(text, str) or text == "":
        return f"#{token}"
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text)


def visible_html(text: object, token: object) -> str:
    """Return a token's text escaped for HTML, white space visible; its id where no text was recorded."""
    if not isinstance(text, str) or text == "":
        return f'<span class="id">{html.escape(str(token))}</span><wbr>'
    parts = []
    for c in text:
        if c in _VISIBLE:
            parts.append(f'<span class="w">{_VISIBLE[c]}</span>' + ("\n" if c == "\n" else ""))
        elif c.isprintable():
            parts.append(html.escape(c))
        else:
            parts.append(f'<span class="w">\\u{ord(c):04x}</span>')
    return "".join(parts)


def _number(value: object, digits: int = 6) -> str:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return "–"
    return f"{number:.{digits}g}" if math.isfinite(number) else "–"


def _id(value: object) -> str:
    return "–" if value is None or value is pd.NA or value != value else str(int(value))  # type: ignore[call-overload]


def describe(step: dict[str, object], known: dict[int, str]) -> str:
    """Return the hover text of one step: what was chosen, by which margin, and what the verify said."""

    def named(value: object) -> str:
        token = _id(value)
        text = known.get(int(token)) if token.lstrip("-").isdigit() else None
        return f"{plain(text, token)} ({token})" if text else token

    lines = [
        f"step {step['step']}  position {step['position']}  {STATES[int(step['state'])].name}",  # type: ignore[call-overload]
        f"token         {named(step['token'])}",
        f"second token  {named(step['second_token'])}",
        f"margin        {_number(step['margin'])}   threshold {_number(step['threshold'])}",
    ]
    if _id(step["verify_token"]) != "–":
        lines += [
            f"fast path     {named(step['fast_token'])}",
            f"verify token  {named(step['verify_token'])}   margin {_number(step['verify_margin'])}   "
            f"({step['reason']})",
            f"K/V change    first layer {_number(step['kv_delta_first'])}, last {_number(step['kv_delta_last'])}"
            f"   window {_id(step['window_rows'])} rows",
        ]
    lines.append(
        f"batch         {_id(step['batch_rows'])} rows, layers at up to {_id(step['padded_rows'])}"
        + (", canonical" if step["canonical"] is True or step["canonical"] == 1 else "")
        + (", from a prefill" if step["prefill"] is True or step["prefill"] == 1 else "")
    )
    return "\n".join(lines)


TIP_COLUMNS = (
    "step", "position", "state", "token", "second_token", "margin", "threshold", "verify_token", "verify_margin",
    "fast_token", "reason", "kv_delta_first", "kv_delta_last", "window_rows", "batch_rows", "padded_rows", "canonical",
    "prefill", "token_text",
)  # fmt: skip


def strip(
    steps: pd.DataFrame,
    known: dict[int, str] | None = None,
    selected: int | None = None,
    style: Callable[[dict[str, object]], str] | None = None,
) -> str:
    """Return the HTML of a token strip.

    Parameters
    ----------
    steps
        Steps of one request in order, with :data:`TIP_COLUMNS`.
    known
        Text by token id, for tokens that were not chosen.
    selected
        Step to outline.
    style
        CSS class of a step; its state's name by default.
    """
    known = vocabulary(steps["token"], steps["token_text"]) if known is None else known
    spans = []
    for row in steps[list(TIP_COLUMNS)].astype(object).to_dict("records"):
        css = style(row) if style else STATES[int(row["state"])].css
        chosen = " sel" if selected is not None and row["step"] == selected else ""
        tip = html.escape(describe(row, known), quote=True)
        special = bool(css) and css not in ("stable", "same", "only", "again")
        # Plain tokens stay out of the tab order: a keyboard user steps through what matters.
        focus = f' tabindex="0" aria-label="{tip}"' if special or chosen else ""
        # Visible spaces are not spaces to a browser: say where a line may break.
        breakable = "<wbr>" if isinstance(row["token_text"], str) and row["token_text"][:1].isspace() else ""
        spans.append(
            f'{breakable}<span class="t {css}{chosen}" data-step="{row["step"]}" data-tip="{tip}"'
            f"{focus}>"
            f"{visible_html(row['token_text'], row['token'])}</span>"
        )
    return f'<div class="mg-strip">{"".join(spans)}</div>'


def legend(names: tuple[str, ...] | None = None) -> str:
    """Return the HTML legend of the states, or of some."""
    items = [
        f'<span title="{html.escape(s.doc, quote=True)}"><span class="m" style="color:{s.colour}">{s.mark}</span>'
        f"{s.name}</span>"
        for s in STATES
        if names is None or s.name in names
    ]
    return f'<div class="mg-legend">{"".join(items)}</div>'
