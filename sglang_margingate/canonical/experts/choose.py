"""Chooses a bank's configurations from what was measured: the fastest among those that give a row the same bits.

Decode and prefill may have classes of their own, as linear layers do; inside one, each number of rows has the fastest of its
class, and no companion can tell the difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sglang_margingate.canonical.experts.table import Config, ExpertTable, TableError

DECODE_LARGEST = 256
"""Numbers of rows up to it are chosen for together, for decode; those above, for prefill."""

LARGEST = 16_384


@dataclass(frozen=True)
class Measured:
    """One configuration, tried.

    Parameters
    ----------
    config
        The configuration.
    bits
        What the probed row became, among all companions at all numbers of rows; None where not always the same.
    us
        Microseconds of a bank by number of rows.
    """

    config: Config
    bits: int | None
    us: Mapping[int, float]


def choose(measured: Sequence[Measured]) -> ExpertTable:
    """Return the fastest table whose steps share their bits, those for decode and those for prefill.

    Raises
    ------
    TableError
        No configuration gives a row the same bits among all companions.
    """
    holding = [m for m in measured if m.bits is not None and m.us]
    if not holding:
        raise TableError(f"none of {len(measured)} configurations gives a row the same bits among all companions")
    rows = sorted(set.intersection(*(set(m.us) for m in holding)))
    steps: list[tuple[int, Config]] = []
    for part in ([m for m in rows if m <= DECODE_LARGEST], [m for m in rows if m > DECODE_LARGEST]):
        if part:
            steps += _steps(holding, part)
    steps[-1] = (LARGEST, steps[-1][1])
    return ExpertTable(tuple(_merged(steps)), "tuned")


def _steps(holding: Sequence[Measured], rows: list[int]) -> list[tuple[int, Config]]:
    """Return the steps of the class that is fastest over some numbers of rows, each of which counts alike."""
    classes: dict[int | None, list[Measured]] = {}
    for one in holding:
        classes.setdefault(one.bits, []).append(one)

    def cost(members: list[Measured]) -> float:
        return sum(math.log(min(m.us[n] for m in members)) for n in rows)

    best = min(classes.values(), key=cost)
    return [(n, min(best, key=lambda m: m.us[n]).config) for n in rows]


def _merged(steps: list[tuple[int, Config]]) -> list[tuple[int, Config]]:
    out: list[tuple[int, Config]] = []
    for most, config in steps:
        if out and out[-1][1] == config:
            out.pop()
        out.append((most, config))
    return out


def united(table: ExpertTable, bits: Mapping[str, int | None], name: Callable[[Config], str]) -> ExpertTable:
    """Return a table whose steps share their bits, those for decode and those for prefill, without any measured time.

    Each part keeps the class that serves most doublings of rows; what is not of it takes the configuration of the nearest
    step that is.

    Parameters
    ----------
    table
        Somebody's choice.
    bits
        What a row becomes with each of its configurations, by name; None where that depends on companions.
    name
        Names a configuration.

    Raises
    ------
    TableError
        A part has no configuration that gives a row the same bits among all companions.
    """
    out: list[tuple[int, Config]] = []
    cut = [(most, config) for most, config in table.steps if most < DECODE_LARGEST]
    cut += [(DECODE_LARGEST, table.at(DECODE_LARGEST))]
    rest = [(most, config) for most, config in table.steps if most > DECODE_LARGEST]
    for first, part in ((1, cut), (DECODE_LARGEST + 1, rest)):
        weights: dict[int, float] = {}
        begins = [first, *(most + 1 for most, _ in part)]
        for begin, (most, config) in zip(begins, part):
            kind = bits[name(config)]
            if kind is not None:
                weights[kind] = weights.get(kind, 0.0) + math.log2((most + 1) / begin)
        if part and not weights:
            raise TableError(
                f"no configuration for {first} rows and more gives a row the same bits among all companions"
            )
        best = max(weights, key=lambda kind: weights[kind], default=None)
        fine = [at for at, (_, config) in enumerate(part) if bits[name(config)] == best]
        for at, (most, _) in enumerate(part):
            nearest = min((abs(other - at), other) for other in fine)[1]
            out.append((most, part[nearest][1]))
    return ExpertTable(tuple(_merged(out)), table.source)


def ratios(table: ExpertTable, measured: Sequence[Measured], stock: Mapping[int, float]) -> dict[int, float]:
    """Return a table's time as a share of SGLang's own choice, by number of rows."""
    by_config = {tuple(sorted(m.config.items())): m.us for m in measured}
    return {n: by_config[tuple(sorted(table.at(n).items()))][n] / us for n, us in stock.items()}
