"""Do a trace's columns fit each other? Pure: frames in, problems out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONE = "lone"
"""Request ids of requests that ran alone begin so."""


def in_prefill_class(layers: list[dict[str, Any]], rows: int, apart: Sequence[str] = ()) -> bool:
    """Return whether ``rows`` share the class of the largest probed size in every layer but the one that makes logits.

    Layers that are padded by themselves, ``apart``, are left out where others are not: the trace has the widest rows alone.
    """
    for layer in layers:
        if layer["name"].endswith(("lm_head", "embed_tokens")) or layer["name"] in apart:
            continue
        labels = {label for first, last, label in layer["classes"] if first <= rows <= last}
        if labels != {layer["classes"][-1][2]}:
            return False
    return True


def column_problems(
    steps: Any, requests: Any, invariance: dict[str, Any], tolerance: float | None, graphs: bool
) -> tuple[list[str], dict[str, Any]]:
    """Return what does not fit, and the numbers behind it.

    Parameters
    ----------
    steps, requests
        The run's rows (schema 2).
    invariance
        The status page's ``invariance``: captured sizes, and the map.
    tolerance
        Of the lone requests' median step_ms against tpot_ms; None: there are none.
    graphs
        Decode runs in CUDA graphs, so its padded rows are captured sizes.
    """
    decode = steps[~steps["prefill"].astype(bool)]
    prefill = steps[steps["prefill"].astype(bool)]
    seen = decode.dropna(subset=["padded_rows"])
    sizes = sorted({int(m) for m in seen["padded_rows"]})
    facts: dict[str, Any] = {
        "decode_steps": len(decode),
        "padded_sizes": sizes,
        "padded_unequal": int((seen["padded_rows"] != seen["batch_rows"]).sum()),
        "lone": [],
    }
    problems = []
    if not len(seen):
        problems.append("no decode step has padded rows")
    elif not facts["padded_unequal"]:
        problems.append("padded_rows is batch_rows everywhere")
    if (seen["padded_rows"] < seen["batch_rows"]).any():
        problems.append("padded_rows is less than batch_rows")
    captured = sorted(set(invariance["graph_rows"].values()) | set(invariance["graph_sizes"]))
    if graphs and (odd := sorted(set(sizes) - set(captured))):
        problems.append(f"padded_rows {odd[:5]} are no rows of captured layers {captured[:8]}")
    layers = invariance["map"]["layers"]
    inside = prefill[prefill["canonical"].astype(bool)].dropna(subset=["padded_rows"])
    outside = sorted(
        {int(m) for m in inside["padded_rows"] if not in_prefill_class(layers, int(m), invariance["prefill_apart"])}
    )
    if outside and invariance["batched_prefill"]:
        problems.append(f"prefills of {outside[:5]} rows say canonical, but the map has them in another class")
    problems += _times(steps, requests)
    if tolerance is not None:
        problems += _lone(steps, requests, tolerance, facts)
    return problems, facts


def _times(steps: Any, requests: Any) -> list[str]:
    out = []
    back = sum(not rows["time"].is_monotonic_increasing for _, rows in steps.groupby("request"))
    if back:
        out.append(f"time goes back within {back} requests")
    first = steps.groupby("request")["time"].min()
    arrived = requests.set_index("request")["time"]
    both = first.index.intersection(arrived.index)
    if (first[both] < arrived[both]).any():
        out.append("a first token is older than its request's arrival")
    told = requests.dropna(subset=["ttft_ms"])
    if (told["ttft_ms"] <= 0).any() or (told["ttft_ms"] > told["e2e_ms"]).any():
        out.append("ttft_ms is not between 0 and e2e_ms")
    many = told.dropna(subset=["tpot_ms"])
    many = many[many["output_tokens"] > 1]
    sums = many["ttft_ms"] + many["tpot_ms"] * (many["output_tokens"] - 1)
    if ((sums / many["e2e_ms"] - 1).abs() > 0.02).any():
        out.append("ttft_ms + tpot_ms for each token after the first is not e2e_ms")
    return out


def _lone(steps: Any, requests: Any, tolerance: float, facts: dict[str, Any]) -> list[str]:
    """Hold the median device time of a lone request's decode steps against the time between its tokens."""
    out = []
    lone = requests[requests["request_id"].str.startswith(LONE)]
    if lone.empty:
        return ["no request ran alone"]
    for _, row in lone.iterrows():
        own = steps[(steps["request"] == row["request"]) & ~steps["prefill"].astype(bool)]
        ratio = float(own["step_ms"].median() / row["tpot_ms"])
        facts["lone"].append(round(ratio, 3))
        if abs(ratio - 1) > tolerance:
            out.append(f"{row['request_id']}: median step_ms is {ratio:.2f} of tpot_ms")
        if (own["batch_rows"] != 1).any():
            out.append(f"{row['request_id']} was not alone")
    return out
