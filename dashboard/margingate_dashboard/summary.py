"""Headline numbers of a run, each with what it is counted from."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from margingate_dashboard.facts.policies import NOT_OBSERVED, VERIFYING
from margingate_dashboard.rates import of, upper_95
from margingate_dashboard.states import CODE, as_bool

STEP_COLUMNS = ("prefill", "state", "triggered", "verified", "examined", "above", "structural")
REQUEST_COLUMNS = (
    "policy", "dataset", "max_batch_rows", "output_tokens", "triggers", "verified", "audited", "flips", "missed",
    "overhead_ms", "e2e_ms", "guarantee", "steps", "retractions", "structural",
)  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """Counts over decode steps; steps whose token a prefill chose are canonical already and are left out."""

    steps: int
    triggered: int
    """Steps with a low margin that were verified for it."""
    would: int
    """Steps with a low margin that nothing verified (policy log)."""
    verified: int
    examined: int
    """Untriggered steps that were verified (audit or `always`): the sample behind the bound of missed flips."""
    untriggered: int
    flips: int
    repaired: int
    above: int
    """Flips above the threshold, among the examined steps."""
    missed: int
    """Those of them that were not repaired: the audit saw them, the answer kept them."""
    structural: int = 0
    """Steps whose shape answers for them."""

    @property
    def miss_upper(self) -> float:
        """Upper bound at 95% of the rate of flips above the threshold among untriggered steps; 1.0 where none was examined."""
        return upper_95(self.above, self.examined)

    @property
    def miss_known(self) -> bool:
        """Whether every untriggered step was examined, so that the count of flips above the threshold is exact."""
        return self.examined == self.untriggered

    @property
    def low(self) -> int:
        """Steps with a low margin, verified or not."""
        return self.triggered + self.would


def headline(steps: pd.DataFrame) -> Headline:
    """Count a run's decode steps (needs :data:`STEP_COLUMNS`)."""
    decode = ~as_bool(steps["prefill"])
    state = steps["state"].to_numpy()[decode]
    low = steps["triggered"].to_numpy()[decode]
    seen = steps["verified"].to_numpy()[decode]
    by_state = np.bincount(state, minlength=len(CODE))
    return Headline(
        steps=int(decode.sum()),
        triggered=int((low & seen).sum()),
        would=int((low & ~seen).sum()),
        verified=int(seen.sum()),
        examined=int(steps["examined"].to_numpy()[decode].sum()),
        untriggered=int((~low).sum()),
        flips=int(by_state[[CODE["flipped"], CODE["repaired"], CODE["missed"]]].sum()),
        repaired=int(by_state[CODE["repaired"]]),
        above=int(steps["above"].to_numpy()[decode].sum()),
        missed=int(by_state[CODE["missed"]]),
        structural=int(as_bool(steps["structural"])[decode].sum()),
    )


def from_requests(requests: pd.DataFrame) -> Headline:
    """Count finished requests' decode steps from their own totals (needs :data:`REQUEST_COLUMNS`)."""
    return from_sums({name: float(values.sum()) for name, values in contributions(requests).items()})


def contributions(requests: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return what each finished request adds to the counts of a headline, by name.

    The first token of a request comes from its prefill, and so does the next one after a retraction. Requests without an
    observed step (policy ``not observed``) do not count.
    """
    policy = requests["policy"].astype(str).to_numpy(dtype=object)
    seen = policy != NOT_OBSERVED

    def counted(name: str, missing: float = 0.0) -> np.ndarray:
        return requests[name].to_numpy(dtype=np.float64, na_value=missing)

    observed = counted("steps", np.nan)
    known = np.where(np.isnan(observed), counted("output_tokens"), observed)
    prefills = 1 + np.where(np.isnan(observed), 0, counted("retractions"))
    steps = np.maximum(known - prefills, 0)
    always, verifies = policy == "always", np.isin(policy, VERIFYING)
    triggers, verified, audited, flips, missed, structural = (
        counted(name) for name in ("triggers", "verified", "audited", "flips", "missed", "structural")
    )
    # Under `always` every untriggered step is examined; under `gate` only the audited ones.
    found = {
        "steps": steps,
        "triggered": triggers * verifies,
        "would": triggers * ~verifies,
        "verified": verified,
        "examined": audited + np.maximum(steps - triggers, 0) * always,
        "flips": flips,
        "above": missed,
        "missed": missed * ~always,
        "structural": structural,
    }
    return {name: values * seen for name, values in found.items()}


def from_sums(sums: dict[str, float]) -> Headline:
    """Return the headline of summed :func:`contributions`."""
    whole = {name: int(value) for name, value in sums.items()}
    low = whole["triggered"] + whole["would"]
    return Headline(**whole, untriggered=max(0, whole["steps"] - low), repaired=whole["flips"] - whole["missed"])


def overhead(requests: pd.DataFrame) -> tuple[float, float]:
    """Return what the policy added to all requests and their end-to-end time, both in ms."""
    return float(requests["overhead_ms"].fillna(0).sum()), float(requests["e2e_ms"].fillna(0).sum())


def guarantee_notes(requests: pd.DataFrame, most: int = 6) -> list[str]:
    """Return what the responses' guarantees stand on, or why there is none, the commonest first."""
    # Before schema 2.1 some rows gave no reason.
    reason = (
        requests["guarantee_note"].astype(object).where(requests["guarantee_note"].notna(), "no reason was recorded")
    )
    # Sentences that differ in their numbers alone are one.
    words = reason.astype(str).map(lambda text: re.sub(r"\d[\d,.]*", "n", text))
    counts = (
        words.groupby([requests["guarantee"].astype(str), words]).size().sort_values(ascending=False, kind="stable")
    )
    first = reason.astype(str).groupby(words).agg(["first", "nunique"])
    return [
        f"{of(times, len(requests))} requests are {label}: {first.loc[note, 'first'] if first.loc[note, 'nunique'] == 1 else note}"
        for (label, note), times in counts.head(most).items()
    ]


def tag(name: object) -> str:
    """Return a dataset tag as shown; requests without one are named so."""
    text = "" if name is None or name != name else str(name)
    return text or "(untagged)"


def tags(column: pd.Series) -> list[str]:
    """Return the dataset tags that occur in a column, as shown, sorted."""
    return sorted({tag(value) for value in column.unique()}, key=lambda name: (name == tag(""), name))


def has_tag(column: pd.Series, wanted: set[str]) -> np.ndarray:
    """Tell which rows carry one of the shown tags."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        keep = np.array([tag(value) in wanted for value in column.cat.categories] + [tag("") in wanted])
        return keep[column.cat.codes.to_numpy()]  # code -1 (null) reads the last entry
    return column.map(tag).isin(wanted).to_numpy()
