"""From a fully verified run to a threshold profile that the server takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pandas as pd

from margingate_dashboard import states
from margingate_dashboard.summary import has_tag, tag
from sglang_margingate.gate.calibration import Calibration
from sglang_margingate.gate.profile import DatasetThreshold, Profile, default_for, enough_evidence, too_small

Samples = dict[str, tuple[np.ndarray, np.ndarray]]

STEP_COLUMNS = ("request", "dataset", "margin", "flipped", "prefill", "structural", "verified", "policy")


def calibration_samples(steps: pd.DataFrame) -> tuple[Samples, int, int]:
    """Return (margins, flipped) by dataset tag as shown, and how many of all decode steps they hold.

    Only requests whose every decode step was verified count: in a gated run the verified steps are the low-margin ones,
    a sample that would make any threshold look good.

    Returns
    -------
    samples, taken, decode steps
    """
    decode, usable = _sampled(steps)
    margin, flipped = steps["margin"].to_numpy(dtype=np.float64), states.as_bool(steps["flipped"])
    samples: Samples = {}
    names = sorted({tag(v) for v in steps["dataset"].unique()})
    for name in names:
        mine = usable & has_tag(steps["dataset"], {name})
        if mine.any():
            samples[name] = (margin[mine], flipped[mine])
    return samples, int(usable.sum()), int(decode.sum())


def _sampled(steps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Tell which steps a threshold decides about, and which of them belong to requests that were verified whole."""
    # No threshold decides about a structural step, so none can be chosen from it.
    decode = ~states.as_bool(steps["prefill"]) & ~states.as_bool(steps["structural"])
    seen = steps["verified"].to_numpy()
    codes, requests = pd.factorize(steps["request"], use_na_sentinel=False)
    unseen = np.bincount(codes[decode & ~seen], minlength=len(requests))
    return decode, decode & seen & (unseen[codes] == 0)


@dataclass(frozen=True)
class KnownFlips:
    """Confirmed flips of a dataset outside the sample: what a gate or an audit saw. No sample, but counterexamples."""

    margins: np.ndarray
    """Rising, in logits."""

    def above(self, threshold: float) -> int:
        """Return how many a threshold would miss."""
        return int((self.margins > threshold).sum())

    @property
    def largest(self) -> float:
        """The largest margin of any; 0 where there is none."""
        return float(self.margins[-1]) if self.margins.size else 0.0


def known_flips(steps: pd.DataFrame, kept: np.ndarray | None = None) -> dict[str, KnownFlips]:
    """Return the confirmed flips outside the sample, of decode steps that a threshold decides about, by dataset tag as shown.

    Parameters
    ----------
    steps
        Steps of the whole run, with :data:`STEP_COLUMNS`: a counterexample stays one where a filter hides it.
    kept
        Which of them the sample was drawn from; all by default.
    """
    decode, usable = _sampled(steps)
    if kept is not None:
        usable &= kept
    flips = steps[decode & ~usable & states.as_bool(steps["flipped"])]
    tagged = flips["dataset"].map(tag)
    margin = np.nan_to_num(flips["margin"].to_numpy(dtype=np.float64), nan=0.0)
    return {name: KnownFlips(np.sort(margin[(tagged == name).to_numpy()])) for name in sorted(tagged.unique())}


def veto(calibration: Calibration, known: KnownFlips | None) -> float:
    """Return the threshold that a calibration proposes: the sample's, or that of the largest known flip where it is larger.

    The rule is one for every dataset and every target. What a target lets the sample miss is a rate that the sample bounds; a
    flip that was seen outside it is in no rate, and no threshold is proposed that would have let it pass.
    """
    return calibration.threshold if known is None else max(calibration.threshold, known.largest)


def honest(calibration: Calibration, row: pd.Series) -> float:
    """Return the bound that goes with a threshold: the calibration's, as the sample itself chose it.

    A larger threshold misses no more. A smaller one, set by hand, has the plain bound of what it misses in the sample, which is
    exact for a threshold fixed beforehand; never less than the calibration's.
    """
    if float(row["threshold"]) >= calibration.threshold:
        return calibration.miss_upper
    return max(calibration.miss_upper, float(row["miss_upper"]))


def left_out(chosen: Mapping[str, pd.Series]) -> dict[str, str]:
    """Say of each dataset, by its tag as shown, why the server would take no threshold from it."""
    why = {}
    for name, row in chosen.items():
        steps, flips = int(row["steps"]), int(row["flips"])
        if name == tag(""):
            why[name] = "untagged traffic takes the default threshold"
        elif not enough_evidence(steps, flips):
            why[name] = too_small(steps, flips)
    return why


def make_profile(manifest: Mapping[str, Any], repair: str, chosen: Mapping[str, pd.Series]) -> Profile:
    """Return the profile of the chosen thresholds.

    Parameters
    ----------
    manifest
        Of the run that the sample comes from: names the model and the machine that the thresholds are bound to.
    repair
        ``column`` or ``window``.
    chosen
        By dataset tag as shown: a row of :func:`sglang_margingate.gate.calibration.trade_off`, with the honest bound
        (:func:`honest`) as its ``miss_upper``.

    Notes
    -----
    It holds the datasets whose samples may set a threshold, no others (:func:`left_out`). One that it does not know gets the
    largest threshold: dear, but the one that missed least.
    """
    backed = {name: row for name, row in chosen.items() if name not in left_out(chosen)}
    flags = manifest.get("flags")
    flags = flags.get("sglang") if isinstance(flags, dict) else None
    versions = manifest.get("versions") if isinstance(manifest.get("versions"), dict) else {}

    def named(*places: tuple[Any, str]) -> str:
        return next((str(p[k]) for p, k in places if isinstance(p, Mapping) and p.get(k)), "unknown")

    return Profile(
        model=named((manifest, "model")),
        dtype=named((manifest, "dtype"), (flags, "dtype")),
        attention_backend=named((manifest, "attention_backend"), (flags, "attention_backend")),
        device=named((manifest, "device")),
        sglang_version=named((versions, "sglang")),
        torch_version=named((versions, "torch")),
        created=datetime.now(timezone.utc).date().isoformat(),
        repair=repair,
        system_fingerprint=str((manifest.get("fingerprint") or {}).get("system_fingerprint") or ""),
        default_threshold=default_for(float(row["threshold"]) for row in backed.values()),
        datasets={
            name: DatasetThreshold(
                threshold=float(row["threshold"]),
                steps=int(row["steps"]),
                flips=int(row["flips"]),
                trigger_rate=float(row["trigger_rate"]),
                missed=int(row["missed"]),
                miss_upper_95=float(row["miss_upper"]),
            )
            for name, row in backed.items()
        },
    )


def to_json(profile: Profile) -> str:
    """Return the file that the server's ``--margingate-profile`` reads."""
    return json.dumps(profile.to_dict(), indent=2) + "\n"
