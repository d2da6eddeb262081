"""Decode steps by batch size and context, and prefill throughput by length, of servers that are up at once (mixed_load.py).

Each repeat visits every server with the same prompts, which no cache holds, so what drifts meets all of them alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sglang_margingate.bench.evidence.decode_cost import Target, summary


class Steps(NamedTuple):
    """Requests that decode together."""

    context: int
    rows: int
    new: int

    @property
    def name(self) -> str:
        """What the row of the table says."""
        return f"step at {self.rows} behind {self.context}"


STEPS = (
    *(Steps(512, rows, 96) for rows in (1, 8, 32, 64)),
    Steps(8192, 1, 48),
    Steps(8192, 8, 48),
    Steps(32_000, 1, 48),
)
PREFILLS: Mapping[str, tuple[int, ...]] = {
    "64 of 100 to 900": tuple(100 + 800 * i // 63 for i in range(64)),
    "1 of 500": (500,),
    "6 of 8192": (8192,) * 6,
    "2 of 32000": (32_000,) * 2,
}
"""Prompts that arrive together."""

Found = dict[str, dict[str, list[float]]]
"""By what was measured and by server: ms a step, or prompt tokens a second, one of each repeat."""


def measure(
    targets: Mapping[str, Target],
    repeats: int,
    say: Callable[[str], None],
    most: int,
    decodes: Sequence[Steps] | None = None,
    prefills: Mapping[str, tuple[int, ...]] | None = None,
) -> Found:
    """Measure every server at :data:`STEPS` and :data:`PREFILLS`, or at others; more than ``most`` tokens at once are left out."""
    found: Found = {}
    for repeat in range(-1, repeats):  # the first one warms up
        order = list(targets.items())[:: 1 if repeat % 2 == 0 else -1]
        for number, steps in enumerate(STEPS if decodes is None else decodes):
            if steps.rows * (steps.context + steps.new) > most:
                continue
            for label, to in order:
                to.flush_cache()
                prompts = [
                    to.prompt(10**7 * number + 10**4 * (repeat + 2) + i, steps.context) for i in range(steps.rows)
                ]
                took = summary(to.batch(prompts, steps.new, {}))["step_ms"]
                if repeat >= 0:
                    found.setdefault(steps.name, {}).setdefault(label, []).append(took)
        for number, (name, lengths) in enumerate((PREFILLS if prefills is None else prefills).items()):
            if sum(lengths) > most:
                continue
            for label, to in order:
                to.flush_cache()
                prompts = [to.prompt(10**8 * (number + 1) + 10**4 * (repeat + 2) + i, n) for i, n in enumerate(lengths)]
                streams = to.batch(prompts, 1, {})
                seconds = max(s.at[-1] for s in streams) - min(s.sent for s in streams)
                if repeat >= 0:
                    found.setdefault(f"prefill {name}", {}).setdefault(label, []).append(sum(lengths) / seconds)
        say(f"steps and prefills, repeat {repeat + 1} of {repeats}")
    return found


def rows(found: Found, labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the table: medians, and of each further server its ratio to the first, with the range of the repeats' ratios."""
    head = ["what", f"{labels[0]} (ms, or tokens/s)", *(f"{label}, of {labels[0]}" for label in labels[1:])]
    out: list[list[str]] = []
    for name, by in found.items():
        base = by.get(labels[0], [])
        row = [name, f"{statistics.median(base):,.{0 if name.startswith('prefill') else 2}f}" if base else "-"]
        for label in labels[1:]:
            ratios = [a / b for a, b in zip(by.get(label, []), base)]
            said = f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
            row.append(said)
        out.append(row)
    return head, out


def to_dict(found: Found) -> dict[str, Any]:
    """Return plain types."""
    return {name: dict(by) for name, by in found.items()}
