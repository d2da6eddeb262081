"""What of a run is shown: chosen datasets, policies and guarantees, the same for steps and for requests."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from margingate_dashboard.summary import has_tag


@dataclass(frozen=True)
class Filters:
    """Chosen values by dimension; an empty set shows all."""

    dataset: frozenset[str] = frozenset()
    """Tags as shown."""
    policy: frozenset[str] = frozenset()
    guarantee: frozenset[str] = frozenset()

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that :meth:`keep` reads."""
        return tuple(n for n in ("dataset", "policy", "guarantee") if getattr(self, n))

    @property
    def key(self) -> Hashable:
        """What results depend on."""
        return (self.dataset, self.policy, self.guarantee)

    def keep(self, rows: pd.DataFrame) -> np.ndarray:
        """Tell which rows, of steps or of requests, are shown."""
        kept = np.ones(len(rows), dtype=bool)
        if self.dataset:
            kept &= has_tag(rows["dataset"], set(self.dataset))
        for name in ("policy", "guarantee"):
            chosen = getattr(self, name)
            if chosen:
                kept &= rows[name].isin(list(chosen)).to_numpy()
        return kept

    def words(self) -> list[str]:
        """Return what figures say of it."""
        named = (("datasets", self.dataset), ("policies", self.policy), ("guarantees", self.guarantee))
        return [f"{what}: " + ", ".join(sorted(chosen)) for what, chosen in named if chosen]
