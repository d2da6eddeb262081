"""Results of an earlier ``margingate bench`` of the same session in one table: GPU sessions come in short commands."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_margingate.bench.servers.gauges import BatchProof
from sglang_margingate.bench.side_by_side.compare import METRICS, MODES, Cell, Comparison, Workload
from sglang_margingate.bench.side_by_side.report import BENCH_SCHEMA, to_dict
from sglang_margingate.gate.stats import Rate

SAME_WORKLOAD = ("prompts_digest", "max_tokens", "arrivals", "seed")
SAME_MACHINE = ("model", "device", "versions", "server_flags")


class JoinError(ValueError):
    """Results cannot be put beside this run's; one line with the reason."""


def join(path: Path, result: Comparison, workload: Workload, facts: Mapping[str, Any]) -> None:
    """Add the modes of a results file to ``result``.

    A mode that could not be measured there is left out, so that it can be measured now.

    Parameters
    ----------
    path
        ``--out`` of the earlier run.

    Raises
    ------
    JoinError
        Unreadable, or measured with another workload, model, machine, version or server flags.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        _check(path, found, to_dict(result, workload, facts, False))
        cells = [_cell(c) for c in found["cells"] if c["repeats"]]
    except OSError as error:
        raise JoinError(f"--join {path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, JoinError):
            raise
        raise JoinError(f"--join {path}: not a results file of margingate bench") from None
    clash = sorted({c.mode for c in cells} & set(result.servers))
    if clash:
        raise JoinError(f"--join {path}: {clash[0]} is in another joined file, too; name only one of them")
    kept = {c.mode for c in cells}
    result.cells += cells
    result.runs |= {k: v for k, v in found["runs"].items() if k in kept}
    result.servers |= {k: v for k, v in found["servers"].items() if k in kept}
    result.mode_flags |= {k: v for k, v in found["mode_flags"].items() if k in kept}
    result.failures |= {k: v for k, v in found["failures"].items() if k in kept}
    modes = ", ".join(dict.fromkeys(c.mode for c in cells))
    result.notes.append(f"Measured before, in {path} ({found['environment']['date']}): {modes}.")
    result.notes += [n for n in found.get("notes", []) if n not in result.notes]


def _check(path: Path, found: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if found.get("schema") != BENCH_SCHEMA:
        raise JoinError(f"--join {path}: not a results file of margingate bench")
    for part, names in (("workload", SAME_WORKLOAD), ("environment", SAME_MACHINE)):
        # Through JSON, as the file's were: tuples are lists there.
        ours = json.loads(json.dumps(here[part], default=str))
        for name in names:
            if found[part].get(name) != ours.get(name):
                raise JoinError(
                    f"--join {path}: measured with {name} {found[part].get(name)!r}, this run has {ours.get(name)!r}; "
                    "only the same work on the same machine can be compared"
                )


def _cell(found: Mapping[str, Any]) -> Cell:
    label = str(found["mode"])
    if label.partition(" (")[0] not in MODES:
        raise KeyError(label)
    missing = [m for m in METRICS for r in found["repeats"] if m not in r]
    if missing:
        raise KeyError(missing[0])
    batches = found["batches"]
    rows = Counter({int(k): int(v) for k, v in batches["by_rows"].items()})
    repeats = [{k: float("nan") if v is None else float(v) for k, v in r.items()} for r in found["repeats"]]
    return Cell(
        label,
        float(found["share"]),
        repeats,
        identical=Rate(**found["identical"]),
        triggered=Rate(**found["triggered"]),
        flips=Rate(**found["flips_of_verified"]),
        proof=BatchProof(batches["source"], batches["unit"], rows),
    )
