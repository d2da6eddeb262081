"""Headline numbers of a run, each with what it is counted from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from margingate_dashboard.rates import of, upper_95
from margingate_dashboard.states import CODE, as_bool

STEP_COLUMNS = ("prefill", "state", "triggered", "verified", "examined")
REQUEST_COLUMNS = (
    "policy", "dataset", "max_batch_rows", "output_tokens", "triggers", "verified", "audited", "flips", "missed",
    "overhead_ms", "e2e_ms", "guarantee",
)  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """Counts over decode steps; steps whose token a prefill chose are canonical already and are left out."""

    steps: int
    triggered: int
    verified: int
    examined: int
    """Untriggered steps that were verified (audit or `always`): the sample behind the missed-flip bound."""
    untriggered: int
    flips: int
    repaired: int
    missed: int

    @property
    def miss_upper(self) -> float:
        """Upper bound at 95% of the missed-flip rate among untriggered steps; 1.0 where none was examined."""
        return upper_95(self.missed, self.examined)

    @property
    def miss_known(self) -> bool:
        """Whether every untriggered step was examined, so that the count of missed flips is exact."""
        return self.examined == self.untriggered


def headline(steps: pd.DataFrame) -> Headline:
    """Count a run's decode steps (needs :data:`STEP_COLUMNS`)."""
    decode = ~as_bool(steps["prefill"])
    state = steps["state"].to_numpy()[decode]
    low = steps["triggered"].to_numpy()[decode]
    seen = steps["verified"].to_numpy()[decode]
    by_state = np.bincount(state, minlength=len(CODE))
    flips = int(by_state[[CODE["flipped"], CODE["repaired"], CODE["missed"]]].sum())
    return Headline(
        steps=int(decode.sum()),
        triggered=int(low.sum()),
        verified=int(seen.sum()),
        examined=int(steps["examined"].to_numpy()[decode].sum()),
        untriggered=int((~low).sum()),
        flips=flips,
        repaired=int(by_state[CODE["repaired"]]),
        missed=int(by_state[CODE["missed"]]),
    )


def from_requests(requests: pd.DataFrame) -> Headline:
    """Count finished requests' decode steps from their own totals (needs :data:`REQUEST_COLUMNS`).

    The first token of a request comes from its prefill, so it has ``output_tokens - 1`` decode steps. A request without
    any recorded step (one that was sampled, not decoded greedily) has a largest batch of 0 and does not count.
    """
    requests = requests[requests["max_batch_rows"].fillna(1) > 0]
    steps = int((requests["output_tokens"].fillna(0) - 1).clip(lower=0).sum())
    total = {c: int(requests[c].fillna(0).sum()) for c in ("triggers", "verified", "audited", "flips", "missed")}
    always = requests["policy"].astype(str) == "always"
    # Under `always` every untriggered step is examined; under `gate` only the audited ones.
    beyond = int((requests["output_tokens"].fillna(0) - 1 - requests["triggers"].fillna(0))[always].clip(lower=0).sum())
    return Headline(
        steps=steps,
        triggered=total["triggers"],
        verified=total["verified"],
        examined=total["audited"] + beyond,
        untriggered=max(0, steps - total["triggers"]),
        flips=total["flips"],
        repaired=total["flips"] - total["missed"],
        missed=total["missed"],
    )


def overhead(requests: pd.DataFrame) -> tuple[float, float]:
    """Return what the policy added to all requests and their end-to-end time, both in ms."""
    return float(requests["overhead_ms"].fillna(0).sum()), float(requests["e2e_ms"].fillna(0).sum())


def guarantee_notes(requests: pd.DataFrame, most: int = 6) -> list[str]:
    """Return what the responses' guarantees stand on, or why there is none, the commonest first."""
    noted = requests[requests["guarantee_note"].notna()]
    counts = noted.groupby([noted["guarantee"].astype(str), noted["guarantee_note"].astype(str)]).size()
    return [
        f"{of(times, len(requests))} requests are {label}: {note}"
        for (label, note), times in counts.sort_values(ascending=False, kind="stable").head(most).items()
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
