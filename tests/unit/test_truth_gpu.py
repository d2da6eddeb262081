"""What tests/gpu/truth.py holds against columns and neighbours: its pure parts, on rows made by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

GPU = Path(__file__).resolve().parents[1] / "gpu"
LAYERS = [
    {"name": "model.layers.0.mlp.down_proj", "classes": [[1, 120, 0], [121, 128, 1], [129, 191, 0], [192, 512, 2]]},
    {"name": "lm_head", "classes": [[1, 16, 0], [17, 512, 1]]},
]
INVARIANCE = {
    "graph_sizes": [1, 24, 32, 64], "graph_rows": {"1": 49, "24": 24, "32": 32, "64": 64}, "prefill_apart": [],
    "batched_prefill": True, "map": {"layers": LAYERS},
}  # fmt: skip


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


columns, neighbours = load("truth_columns"), load("truth_neighbours")


def run(**change: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two requests of three steps: one in a batch, one that ran alone at 10 ms a step."""
    at = pd.to_datetime([100, 110, 120, 200, 210, 220], unit="ms", utc=True)
    steps: dict[str, Any] = {
        "request": [1, 1, 1, 2, 2, 2], "prefill": [True, False, False] * 2, "canonical": [True] * 6, "time": list(at),
        "batch_rows": [1, 3, 3, 1, 1, 1], "padded_rows": [300.0, 24.0, 24.0, 200.0, 24.0, 24.0],
        "step_ms": [20.0, 9.5, 9.5, 20.0, 9.6, 9.4],
    }  # fmt: skip
    requests: dict[str, Any] = {
        "request": [1, 2], "request_id": ["a", "lone-0"], "time": pd.to_datetime([80, 180], unit="ms", utc=True),
        "ttft_ms": [20.0, 20.0], "tpot_ms": [10.0, 10.0], "e2e_ms": [40.0, 40.0], "output_tokens": [3, 3],
    }  # fmt: skip
    for name, value in change.items():
        where, column = name.split("__")
        (steps if where == "steps" else requests)[column] = value
    return pd.DataFrame(steps), pd.DataFrame(requests)


def test_columns_that_fit_are_left_alone() -> None:
    problems, facts = columns.column_problems(*run(), INVARIANCE, 0.15, True)
    assert problems == []
    assert facts["padded_sizes"] == [24]
    assert facts["padded_unequal"] == 4
    assert facts["lone"] == [0.95]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps__padded_rows": [300, 3, 3, 200, 1, 1]}, "padded_rows is batch_rows everywhere"),
        ({"steps__padded_rows": [300, 2, 24, 200, 24, 24]}, "padded_rows is less than batch_rows"),
        (
            {"steps__padded_rows": [300, 25, 24, 200, 24, 24]},
            "padded_rows [25] are no rows of captured layers [1, 24, 32, 49, 64]",
        ),
        ({"steps__padded_rows": [100, 24, 24, 200, 24, 24]}, "prefills of [100] rows say canonical"),
        ({"steps__padded_rows": [None] * 6}, "no decode step has padded rows"),
        ({"steps__step_ms": [20, 9, 9, 20, 5, 5]}, "lone-0: median step_ms is 0.50 of tpot_ms"),
        ({"steps__batch_rows": [1, 3, 3, 1, 2, 2]}, "lone-0 was not alone"),
        ({"requests__request_id": ["a", "b"]}, "no request ran alone"),
        ({"requests__ttft_ms": [0.0, 20.0]}, "ttft_ms is not between 0 and e2e_ms"),
        ({"requests__e2e_ms": [40.0, 80.0]}, "is not e2e_ms"),
        ({"requests__time": pd.to_datetime([105, 180], unit="ms", utc=True)}, "older than its request's arrival"),
        (
            {"steps__time": list(pd.to_datetime([100, 120, 110, 200, 210, 220], unit="ms", utc=True))},
            "goes back within 1",
        ),
    ],
)
def test_columns_that_do_not_fit_are_named(change: dict[str, Any], said: str) -> None:
    problems, _ = columns.column_problems(*run(**change), INVARIANCE, 0.15, True)
    assert any(said in text for text in problems), problems


def test_the_prefill_class_is_that_of_the_largest_size_in_every_layer_but_the_head() -> None:
    inside = {rows for rows in (16, 100, 125, 191, 192, 512) if columns.in_prefill_class(LAYERS, rows)}
    assert inside == {192, 512}


def answer(tokens: list[int], label: str = "structural", rows: int = 8, retractions: int = 0) -> dict[str, Any]:
    mine = {"guarantee": label, "max_batch_rows": rows, "retractions": retractions}
    return {"output_ids": tokens, "meta_info": {"margingate": mine}}


def test_identical_structural_chaotic_sequences_pass() -> None:
    alone = [answer(list(range(k, k + 300))) for k in range(3)]
    found = neighbours.compared(alone, alone)
    assert (found["same"], found["of"], found["labels"]) == (3, 3, ["structural"])
    assert neighbours.scoring_problems({"8": found}) == []
    assert neighbours.retracted_problems({**found, "neighbour_retractions": 1}) == []


def test_each_way_to_fail_is_named() -> None:
    alone = [answer(list(range(300))), answer([1, 2, 3])]
    found = neighbours.compared(alone, [answer([0, 9]), answer([1, 2, 3], "gated", 2, 1)])
    said = " | ".join([*neighbours.scoring_problems({"33": found}),
                       *neighbours.retracted_problems({**found, "neighbour_retractions": 0})])  # fmt: skip
    assert "batch 33: 1/2 identical, first differing at [1]" in said
    assert "labels ['gated', 'structural']" in said
    assert "batch 33: largest 8" in said
    assert "the neighbour was not retracted" in said
    assert "1 of the sequences were retracted themselves" in said
    assert "only 3 distinct tokens" in " ".join(neighbours.claims(neighbours.compared(alone[1:], alone[1:]), "x"))


def test_prompts_are_the_same_every_time_and_as_long_as_the_shape_says() -> None:
    shape = neighbours.Shape(vocab=1000, lengths=(225, 900))
    one, two = (neighbours.Chaos("http://x", shape) for _ in range(2))
    assert [one.sequence(k) for k in range(24)] == [two.sequence(k) for k in range(24)]
    assert (len(one.sequence(0)), len(one.sequence(23))) == (225, 900)
