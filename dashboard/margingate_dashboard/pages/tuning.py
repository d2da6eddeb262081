"""Tuning: choose a threshold per dataset, see its price and its risk, and take the profile to the server."""

from __future__ import annotations

import html
from functools import partial
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import address, profiles, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.facts.policies import leading
from margingate_dashboard.facts.price import STEP_COLUMNS as PRICE_COLUMNS
from margingate_dashboard.facts.price import Price, knee, measure
from margingate_dashboard.figures import tuning as figures
from margingate_dashboard.rates import at_most, of, share
from margingate_dashboard.theme import FLIPPED, MISSED, PART_COLOURS, TRIGGERED
from margingate_dashboard.ui import Page
from sglang_margingate.gate.calibration import Calibration, CalibrationError, threshold_for, trade_off, transfer_matrix

CURVE_POINTS = 300
KNEE, NONE = "knee", "none missed"
TARGETS = (0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Largest acceptable miss rates to choose from; fixed, so that their bounds hold whatever the sample."""


def _curve(sample: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """Tabulate the trade-off: at the flips' margins, where misses change, and evenly between for the trigger rate."""
    margin, flipped = sample
    at_flips = margin[flipped & (margin > 0)]
    top = max(float(at_flips.max()) * 1.1 if at_flips.size else 0.5, 0.25)
    return trade_off(margin, flipped, np.concatenate([np.linspace(0, top, CURVE_POINTS), at_flips]))


def _counterexamples(name: str, calibration: Calibration, tau: float, known: profiles.KnownFlips | None) -> None:
    """Say where a flip outside the sample has raised a threshold, and which ones a threshold set by hand would miss."""
    if known is None:
        return
    above = known.above(tau)
    if above:
        st.warning(
            f"{ui.markdown_safe(name)}: {above:,} flips that the gate or the audit confirmed in this run lie above {tau:.6g}, "
            f"the largest at {known.largest:.6g}: this threshold, set by hand, would have missed them.",
            icon=":material/warning:",
        )
    elif known.above(calibration.threshold):
        st.caption(
            f":material/info: {ui.markdown_safe(name)}: the sample alone gives {calibration.threshold:.6g}; a flip that the gate "
            f"or the audit confirmed at {known.largest:.6g} raised it."
        )


def predicted(price: Price | None, trigger_rate: float) -> dict[str, float | None]:
    """Return the predicted cost of a trigger rate, for a table."""
    if price is None:
        return {"ms a token": None, "overhead": None, "tokens/s": None}
    found = price.predict(trigger_rate)
    return {"ms a token": found.step_ms, "overhead": 100 * found.overhead, "tokens/s": found.tokens_per_second}


def price_cards(price: Price | None, trigger_rate: float) -> list[Card]:
    """Return the predicted cost as cards; none where no verify was timed."""
    if price is None:
        return []
    found, fast = price.predict(trigger_rate), price.predict(0.0)
    return [
        Card(
            "Predicted",
            f"{found.step_ms:.2f} ms",
            f"a token, at {price.rows} rows; {fast.step_ms:.2f} ms without verifies; {found.overhead:.1%} overhead",
            PART_COLOURS["verify"],
        ),
        Card(
            "Predicted speed",
            f"{found.tokens_per_second:,.0f}/s",
            f"tokens of the whole batch, {fast.tokens_per_second:,.0f} without verifies; from {price.verifies:,} timed verifies",
            PART_COLOURS["decode"],
        ),
    ]


def why_not(policy: str, decode: int, structural: int) -> str:
    """Say why a run has no sample for a threshold, from its leading policy and its steps."""
    if structural and not decode:
        return f"All {structural:,} decode steps ran inside the probed class: their shape answers for them, and no threshold decides."
    if not decode:
        return (
            "No decode step was observed: requests with one output token have none, and sampled ones are not observed."
        )
    counts = f"{of(0, decode)} decode steps that a threshold decides about belong to requests in which every step was verified."
    if policy in ("log", "off"):
        return f"{counts} Its policy is {policy}, which verifies nothing."
    return f"{counts} In a gated run only low margins were looked at, so every threshold would look safe."


def _incomplete(page: Page, decode: int) -> None:
    requests = page.requests("policy", "structural")
    policy = leading(requests["policy"])
    why = why_not(policy, decode, int(requests["structural"].fillna(0).sum()))
    ui.empty_state(
        "This run cannot calibrate a threshold",
        f"<p>{html.escape(why)}</p>"
        "<pre>python -m sglang_margingate.launch_server --model-path MODEL --margingate-policy always</pre>"
        "<p>Send your prompts to it with a dataset tag, then choose that run here. The Margins page shows what another "
        "threshold would have triggered in this run.</p>",
    )


def by_hand(text: object) -> dict[str, float]:
    """Return thresholds set by hand, from a link: ``arith:0.25,code:1``; what cannot be read is left out."""
    found = {}
    for part in str(text or "").split(","):
        name, _, value = part.rpartition(":")
        try:
            tau = float(value)
        except ValueError:
            continue
        if name and 0 <= tau < float("inf"):
            found[unquote(name)] = tau
    return found


def _choose(found: dict[str, Calibration], start: dict[str, float]) -> dict[str, float]:
    """Let the reader set thresholds; they stand in the link."""
    given = by_hand(address.get("taus"))

    def remember() -> None:
        taus = {n: st.session_state[f"hand-{n}"] for n in found}
        text = ",".join(f"{quote(n, safe='')}:{t:g}" for n, t in taus.items() if t is not None and t != start[n])
        address.write(taus=text or None)

    with st.expander("Choose thresholds by hand", expanded=bool(given)):
        st.caption("Everything on this page follows; what is set here stands in the link.")
        places = st.columns(4)
        for index, name in enumerate(found):
            st.session_state[f"hand-{name}"] = given.get(name, start[name])
            places[index % 4].number_input(
                ui.markdown_safe(name),
                min_value=0.0,
                step=0.0625,
                format="%.6g",
                key=f"hand-{name}",
                on_change=remember,
            )
    return {n: given.get(n, start[n]) for n in found}


def calibrate(page: Page, samples: profiles.Samples, target: float | str, tail: bool) -> dict[str, Calibration]:
    """Return each dataset's calibration; those that cannot be used are named on the page.

    The knee is chosen among the fixed targets after seeing the sample, so each of them is shown at a confidence that holds
    for all of them at once.
    """
    found: dict[str, Calibration] = {}
    for name, sample in samples.items():
        try:
            if target == KNEE:
                found[name] = page.memo("knee", partial(_knee, sample), name)
            else:
                make = partial(threshold_for, *sample, target_miss=float(target), tail=tail)
                found[name] = page.memo("calibration", make, name, target, tail)
        except CalibrationError as error:
            st.warning(f"{ui.markdown_safe(name)}: {ui.markdown_safe(error)}", icon=":material/warning:")
    return found


def _knee(sample: tuple[np.ndarray, np.ndarray]) -> Calibration:
    confidence = 1 - 0.05 / len(TARGETS)
    every = [threshold_for(*sample, target_miss=t, confidence=confidence, tail=False) for t in TARGETS]
    shown = [c for c in every if c.met] or every[:1]
    return shown[knee([c.triggered.value for c in shown], [c.miss_upper for c in shown])]


@ui.fragment
def _tune(page: Page, samples: profiles.Samples, known: dict[str, profiles.KnownFlips], price: Price | None) -> None:
    left, right = st.columns([0.5, 0.5], vertical_alignment="bottom")
    target = left.select_slider(
        "Largest acceptable miss rate (missed flips per step, to be shown at 95%)",
        [KNEE, NONE, *(f"{t:g}" for t in TARGETS if t)],
        help=f"“{KNEE}”: beyond it a smaller risk costs much. “{NONE}”: no flip of the sample is missed.",
        key="target",
        bind="query-params",
    )
    tail = right.toggle(
        "Fit the tail of the flips' margins (slower)", key="tail", bind="query-params", disabled=target == KNEE
    )
    found = calibrate(page, samples, target if target == KNEE else 0.0 if target == NONE else float(target), tail)
    if not found:
        return
    start = {name: profiles.veto(c, known.get(name)) for name, c in found.items()}
    taus = _choose(found, start)
    chosen = {}
    for name, tau in taus.items():
        row = page.memo("chosen", partial(trade_off, *samples[name], [tau]), name, tau).iloc[0].copy()
        row["miss_upper"] = profiles.honest(found[name], row)
        chosen[name] = row
    for name, calibration in found.items():
        _counterexamples(name, calibration, taus[name], known.get(name))
    total = {k: int(sum(row[k] for row in chosen.values())) for k in ("steps", "triggered", "flips", "missed")}
    ui.cards(
        [
            Card("Datasets", f"{len(chosen):,}", f"thresholds {min(taus.values()):.6g} to {max(taus.values()):.6g}"),
            Card(
                "Would trigger",
                share(total["triggered"], total["steps"]),
                f"{of(total['triggered'], total['steps'])} sampled steps",
                TRIGGERED.colour,
            ),
            *price_cards(price, total["triggered"] / total["steps"]),
            Card(
                "Flips caught",
                f"{total['flips'] - total['missed']:,}",
                f"{of(total['flips'] - total['missed'], total['flips'])} flips of the sample",
                FLIPPED.colour,
            ),
            Card(
                "Worst miss bound",
                at_most(max(float(r["miss_upper"]) for r in chosen.values())),
                "of a dataset's steps, at 95%: that of its calibration",
                MISSED.colour,
            ),
        ]
    )
    names = {name: ui.safe(name) for name in found}
    ui.chart(
        figures.trade_off(
            {names[n]: page.memo("curve", partial(_curve, samples[n]), n) for n in found},
            {names[n]: r for n, r in chosen.items()},
            page.subtitle,
        ),
        "trade-off",
        page.exports,
    )
    st.caption(
        "Lines: each threshold with the bound that it would have, had it been fixed before the sample was seen. Stars: the chosen "
        "ones, with the bound of their calibration, which stays true although the sample chose them."
    )
    st.markdown("##### Chosen thresholds")
    rows = pd.DataFrame(
        [
            {
                "dataset": n,
                "threshold": r["threshold"],
                "from the sample": found[n].threshold,
                "steps": int(r["steps"]),
                "triggered": int(r["triggered"]),
                "trigger rate": 100 * r["trigger_rate"],
                "flips": int(r["flips"]),
                "missed": int(r["missed"]),
                "missed at most (95%)": 100 * r["miss_upper"],
                "known flips above": known[n].above(float(r["threshold"])) if n in known else 0,
                "target": "shown" if found[n].met else "not shown",
                **predicted(price, float(r["trigger_rate"])),
            }
            for n, r in chosen.items()
        ]
    )
    ui.table(
        rows,
        "thresholds",
        page.exports,
        column_config={
            **{n: st.column_config.NumberColumn(format="localized") for n in ("steps", "triggered", "flips", "missed")},
            "from the sample": st.column_config.NumberColumn(
                format="%.6g",
                help="What the sample alone gives; a flip known from gate or audit raises it, set by hand it may differ",
            ),
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%"),
            "missed at most (95%)": st.column_config.NumberColumn(
                format="%.4f%%", help="The bound of the calibration: it holds although the sample chose the threshold"
            ),
            "known flips above": st.column_config.NumberColumn(
                help="Flips outside the sample, confirmed by gate or audit, that it would miss: none, unless set by hand"
            ),
            "ms a token": st.column_config.NumberColumn(format="%.2f", help="Predicted, at the run's median batch"),
            "overhead": st.column_config.NumberColumn(format="%.1f%%", help="Predicted share that verifying adds"),
            "tokens/s": st.column_config.NumberColumn(format="%.0f", help="Predicted, of the whole batch"),
        },
    )
    for name, calibration in found.items():
        st.caption(f"**{ui.markdown_safe(name)}**, from the sample alone: {ui.markdown_safe(calibration.statement())}")
    matrix = page.memo("transfer", lambda: transfer_matrix({n: samples[n] for n in found}, taus), tuple(taus.items()))
    shown = matrix.assign(**{c: [names[v] for v in matrix[c]] for c in ("calibrated_on", "applied_to")})
    ui.chart(figures.transfer(shown, page.subtitle), "transfer", page.exports)
    st.caption(
        "Each cell: flips missed of all flips, and the trigger rate. The less clean this matrix, the more a threshold "
        "belongs to its own dataset."
    )
    page.exports.tables["transfer"] = matrix
    _export(page, chosen)


def _export(page: Page, chosen: dict[str, pd.Series]) -> None:
    st.markdown("##### Threshold profile for the server")
    for name, why in profiles.left_out(chosen).items():
        st.warning(
            f"{ui.markdown_safe(name)} is not in the profile: {ui.markdown_safe(why)}", icon=":material/warning:"
        )
    repairs = page.data.requests("repair")["repair"].dropna().astype(str)
    repair = str(repairs.mode().iloc[0]) if len(repairs) else "window"
    profile = profiles.make_profile(page.info.manifest, repair, chosen)
    text = profiles.to_json(profile)
    if not profile.datasets:
        st.caption("No sample is large enough, so there is no profile to take: the server's default threshold stands.")
        page.exports.show("tuning")
        return
    unknown = [
        f
        for f in ("model", "dtype", "attention_backend", "device", "sglang_version", "torch_version")
        if getattr(profile, f) == "unknown"
    ]
    if unknown:
        st.caption(
            f":material/warning: the run's manifest does not name {', '.join(unknown)}: "
            "the server will report a mismatch"
        )
    st.download_button(
        "Download the profile",
        text,
        "margingate-profile.json",
        "application/json",
        type="primary",
        icon=":material/download:",
        on_click="ignore",
        key="profile",
    )
    start = "python -m sglang_margingate.launch_server --model-path MODEL"
    st.code(f"{start} --margingate-profile margingate-profile.json", language=None)
    with st.expander("What is in it"):
        st.code(text, language="json")
    page.exports.show("tuning")


def _known(page: Page) -> dict[str, profiles.KnownFlips]:
    """Return the flips of the whole run that are not in the sample, also those that the sidebar hides."""
    steps = page.data.steps(*dict.fromkeys([*profiles.STEP_COLUMNS, *page.filters.columns]))
    return profiles.known_flips(steps, page.filters.keep(steps))


def _page() -> None:
    page = ui.open_page(
        "Tuning",
        "A threshold belongs to a model, a machine and a dataset. Choose one per dataset from a fully verified run.",
    )
    if page is None:
        return
    samples, taken, decode = page.memo(
        "samples", lambda: profiles.calibration_samples(page.steps(*profiles.STEP_COLUMNS))
    )
    if not samples:
        _incomplete(page, decode)
        return
    known = page.memo("known-flips", lambda: _known(page))
    price = page.memo("price", lambda: measure(page.steps(*PRICE_COLUMNS)))
    if taken < decode:
        st.caption(f":material/info: {of(taken, decode)} decode steps are used: those of fully verified requests.")
    _tune(page, samples, known, price)


if __name__ == "__main__":
    ui.guarded(_page)
