"""Tuning: choose a threshold per dataset, see its price and its risk, and take the profile to the server."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import streamlit as st

from margingate_dashboard import profiles, ui
from margingate_dashboard.cards import Card
from margingate_dashboard.figures import tuning as figures
from margingate_dashboard.rates import at_most, of, share
from margingate_dashboard.theme import FLIPPED, MISSED, TRIGGERED
from margingate_dashboard.ui import Page
from sglang_margingate.gate.calibration import Calibration, CalibrationError, threshold_for, trade_off, transfer_matrix

CURVE_POINTS = 300


def _curve(sample: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    """Tabulate the trade-off: at the flips' margins, where misses change, and evenly between for the trigger rate."""
    margin, flipped = sample
    at_flips = margin[flipped & (margin > 0)]
    top = max(float(at_flips.max()) * 1.1 if at_flips.size else 0.5, 0.25)
    return trade_off(margin, flipped, np.concatenate([np.linspace(0, top, CURVE_POINTS), at_flips]))


def _incomplete(page: Page, decode: int) -> None:
    ui.empty_state(
        "This run cannot calibrate a threshold",
        f"<p>{of(0, decode)} decode steps belong to requests in which every step was verified. A threshold needs such "
        "a sample: in a gated run only low margins were looked at, so every threshold would look safe.</p>"
        "<pre>python -m sglang_margingate.launch_server --model-path MODEL --margingate-policy always</pre>"
        "<p>Send your prompts to it with a dataset tag, then choose that run here. The Margins page shows what another "
        "threshold would have triggered in this run.</p>",
    )


def _choose(found: dict[str, Calibration]) -> dict[str, float]:
    with st.expander("Choose thresholds by hand"):
        st.caption("Edit the last column; everything on this page follows.")
        edited = st.data_editor(
            pd.DataFrame(
                {
                    "dataset": list(found),
                    "calibrated": [c.threshold for c in found.values()],
                    "threshold": [c.threshold for c in found.values()],
                }
            ),
            disabled=["dataset", "calibrated"],
            hide_index=True,
            key="by-hand-" + "-".join(f"{c.threshold:g}" for c in found.values()),
            column_config={
                "threshold": st.column_config.NumberColumn(min_value=0.0, step=0.0001, format="%.4g", required=True)
            },
        )
    return {
        str(n): float(t) if pd.notna(t) else found[str(n)].threshold
        for n, t in zip(edited["dataset"], edited["threshold"])
    }


@ui.fragment
def _tune(page: Page, samples: profiles.Samples) -> None:
    left, right = st.columns([0.5, 0.5], vertical_alignment="bottom")
    target = left.select_slider(
        "Largest acceptable miss rate (missed flips per step, to be shown at 95%)",
        [0.0, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2],
        format_func=lambda v: "none missed in the sample" if v == 0 else f"{v:g}",
        key="target",
    )
    tail = right.toggle("Fit the tail of the flips' margins (slower)", key="tail")
    found: dict[str, Calibration] = {}
    for name, sample in samples.items():
        try:
            found[name] = page.data.memo(
                ("calibration", name, target, tail),
                partial(threshold_for, *sample, target_miss=float(target), tail=tail),
            )
        except CalibrationError as error:
            st.warning(f"{ui.markdown_safe(name)}: {ui.markdown_safe(error)}", icon=":material/warning:")
    if not found:
        return
    taus = _choose(found)
    chosen = {
        name: page.data.memo(("chosen", name, tau), partial(trade_off, *samples[name], [tau])).iloc[0]
        for name, tau in taus.items()
    }
    total = {k: int(sum(row[k] for row in chosen.values())) for k in ("steps", "triggered", "flips", "missed")}
    ui.cards(
        [
            Card("Datasets", f"{len(chosen):,}", f"thresholds {min(taus.values()):.4g} to {max(taus.values()):.4g}"),
            Card(
                "Would trigger",
                share(total["triggered"], total["steps"]),
                f"{of(total['triggered'], total['steps'])} sampled steps",
                TRIGGERED.colour,
            ),
            Card(
                "Flips caught",
                f"{total['flips'] - total['missed']:,}",
                f"{of(total['flips'] - total['missed'], total['flips'])} flips of the sample",
                FLIPPED.colour,
            ),
            Card(
                "Worst miss bound",
                at_most(max(float(r["miss_upper"]) for r in chosen.values())),
                "of a dataset's steps, at 95%",
                MISSED.colour,
            ),
        ]
    )
    names = {name: ui.safe(name) for name in found}
    ui.chart(
        figures.trade_off(
            {names[n]: page.data.memo(("curve", n), partial(_curve, samples[n])) for n in found},
            {names[n]: r for n, r in chosen.items()},
            page.subtitle,
        ),
        "trade-off",
        page.exports,
    )
    st.markdown("##### Chosen thresholds")
    rows = pd.DataFrame(
        [
            {
                "dataset": n,
                "threshold": r["threshold"],
                "steps": int(r["steps"]),
                "triggered": int(r["triggered"]),
                "trigger rate": 100 * r["trigger_rate"],
                "flips": int(r["flips"]),
                "missed": int(r["missed"]),
                "missed at most (95%)": 100 * r["miss_upper"],
                "target shown": found[n].met,
            }
            for n, r in chosen.items()
        ]
    )
    ui.table(
        rows,
        "thresholds",
        page.exports,
        column_config={
            "threshold": st.column_config.NumberColumn(format="%.4g"),
            "trigger rate": st.column_config.NumberColumn(format="%.2f%%"),
            "missed at most (95%)": st.column_config.NumberColumn(format="%.4f%%"),
        },
    )
    for name, calibration in found.items():
        st.caption(f"**{ui.markdown_safe(name)}**: {ui.markdown_safe(calibration.statement())}")
    matrix = page.data.memo(
        ("transfer", tuple(taus.items())), lambda: transfer_matrix({n: samples[n] for n in found}, taus)
    )
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
        page.exports.show(st.container(horizontal_alignment="right"), "tuning")
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
    page.exports.show(st.container(horizontal_alignment="right"), "tuning")


def _page() -> None:
    page = ui.open_page(
        "Tuning",
        "A threshold belongs to a model, a machine and a dataset. Choose one per dataset from a fully verified run.",
    )
    if page is None:
        return
    samples, taken, decode = page.data.memo(
        "samples", lambda: profiles.calibration_samples(page.data.steps(*profiles.STEP_COLUMNS))
    )
    if page.datasets is not None:
        samples = {name: sample for name, sample in samples.items() if name in page.datasets}
    if not samples:
        _incomplete(page, decode)
        return
    if taken < decode:
        st.caption(f":material/info: {of(taken, decode)} decode steps are used: those of fully verified requests.")
    _tune(page, samples)


if __name__ == "__main__":
    ui.guarded(_page)
