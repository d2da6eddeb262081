"""Figures are pure functions of frames: each draws what it is given, and says why where there is nothing to draw."""

from __future__ import annotations

import gc

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("plotly", reason="the dashboard's extra is not installed")
pytest.importorskip("margingate_dashboard", reason="the package is not installed (pip install -e .)")

import plotly.graph_objects as go
from margingate_dashboard import states, theme, ui, warmup
from margingate_dashboard.bins import margin_bins
from margingate_dashboard.figures import compare, flips, latency, margins, overview, request, runs, tuning
from margingate_dashboard.figures.common import on_row, relaid, safe, stacked
from plotly.subplots import make_subplots
from synthetic_runs import SyntheticSpec, make_frames

from sglang_margingate.gate.calibration import trade_off, transfer_matrix
from sglang_margingate.gate.policy import OUTCOMES


@pytest.fixture(scope="module")
def steps() -> pd.DataFrame:
    frame = make_frames(SyntheticSpec(requests=12, tokens=80, policy="always", perturbation=0.2))[0]
    return frame.assign(state=states.classify(frame), triggered=states.triggered(frame))


def names(fig: go.Figure) -> list[str]:
    return [t.name for t in fig.data]


def says(fig: go.Figure) -> str:
    return " ".join(a.text for a in fig.layout.annotations)


def test_states_are_distinct_without_colour() -> None:
    assert len({s.symbol for s in theme.STATES}) == len({s.mark for s in theme.STATES}) == len(theme.STATES) == 6
    assert [s.name for s in theme.STATES] == list(OUTCOMES), "the words of the gate itself"


def test_over_time_counts_every_decode_step_once(steps: pd.DataFrame) -> None:
    table = overview.over_time(steps, bins=10)
    decode = ~steps["prefill"]
    assert table["steps"].sum() == decode.sum()
    assert table["triggered"].sum() == (steps["triggered"] & decode).sum()
    assert (table["rows_mean"] <= table["rows_max"]).all()
    fig = overview.events(table)
    assert "repaired" in names(fig)
    assert "missed" in names(fig)


def test_one_step_and_none_are_drawn(steps: pd.DataFrame) -> None:
    overview.events(overview.over_time(steps[~steps["prefill"]].iloc[:1]))
    assert "No decode steps" in says(overview.events(overview.over_time(steps.iloc[:0])))


def test_guarantees_are_counts_of_all() -> None:
    requests = pd.DataFrame({"guarantee": ["gated", "gated", "none", None, "<b>new</b>"]})
    assert names(overview.guarantees(requests)) == ["gated 2 / 5", "none 2 / 5", "&lt;b&gt;new&lt;/b&gt; 1 / 5"]
    assert "finished" in says(overview.guarantees(requests.iloc[:0]))


@pytest.mark.parametrize("scale", ["log", "linear"])
@pytest.mark.parametrize("log_counts", [True, False])
def test_margins_are_drawn_by_dataset(steps: pd.DataFrame, scale: str, log_counts: bool) -> None:
    margin, flipped = np.sort(steps["margin"].to_numpy()), np.sort(steps["margin"][steps["flipped"]].to_numpy())
    stable = {"a": margin, "b": margin[:50]}
    fig = margins.histogram(
        stable, {"a": flipped, "b": flipped[:0]}, margin_bins(margin, scale), scale, 0.5, log_counts
    )
    assert names(fig) == ["not flipped", "flipped", "not flipped"]
    assert fig.data[0].customdata[:-1, 0].sum() == margin.size
    assert f"{flipped.size:,} flipped" in says(fig)
    assert "tau = 0.5" in says(fig)
    places = {a.text.split()[0]: (a.y, a.yanchor) for a in fig.layout.annotations}
    assert places.pop("tau")[1] == "top", "inside the plot"
    assert set(places.values()) == {(1, "bottom")}, (
        "what stands above a plot can neither meet tau nor be struck through"
    )


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1e6])
def test_any_threshold_can_be_drawn(threshold: float) -> None:
    values = np.arange(100) / 16
    for scale in ("log", "linear"):
        margins.histogram({"a": values}, {"a": values[:0]}, margin_bins(values, scale), scale, threshold).to_json()


def test_nothing_to_draw_is_said() -> None:
    nothing = np.zeros(0)
    assert "No decode steps" in says(
        margins.histogram({"a": nothing}, {"a": nothing}, margin_bins(nothing), "log", 0.5)
    )
    assert "No decode steps" in says(margins.effect({"a": (nothing, nothing, nothing)}, 0.5))
    assert "No flip" in says(flips.bars(flips.by_bucket(np.zeros(3, int), np.zeros(3, int), ["a"]), "x"))
    assert "No step was verified" in says(latency.verify_cost(latency.quantiles(np.zeros(0, int), nothing)))
    assert "No request" in says(latency.distribution({"gate": np.array([np.nan])}, "x", "ms"))
    assert "No matched" in says(compare.still_identical(pd.DataFrame({"dataset": []})))
    assert "no recorded steps" in says(request.margins(pd.DataFrame()))
    assert "finished" in says(request.waterfall(pd.Series(dtype=float)))
    unseen = pd.Series({"e2e_ms": 50.0, "prefill_ms": 5.0, "ttft_ms": np.nan, "verify_ms": 0.0, "hold_ms": 0.0})
    assert "not known" in says(request.waterfall(unseen)), "a first token that nobody saw did not come at once"


def test_a_requests_margins_have_a_trace_per_state(steps: pd.DataFrame) -> None:
    mine = steps[steps["request_id"] == "rid-00000"].assign(shown="x")
    fig = request.margins(mine, selected=3, log=True)
    present = {theme.STATES[s].name for s in mine["state"]}
    assert {str(n).split()[0] for n in names(fig) if n} - {"threshold", "batch"} == present


def test_tuning_figures(steps: pd.DataFrame) -> None:
    decode = steps[~steps["prefill"]]
    sample = (decode["margin"].to_numpy(), decode["flipped"].to_numpy())
    table = trade_off(*sample)
    fig = tuning.trade_off({"a": table}, {"a": table.iloc[-1]})
    assert "chosen threshold" in names(fig)
    axis = fig.layout.yaxis
    assert [float(text) for text in axis.ticktext] == pytest.approx(list(axis.tickvals)), "0.2 must not read 2"
    assert axis.tickvals[0] < 100 * table["miss_upper"].min() < axis.tickvals[-1]
    matrix = transfer_matrix({"a": sample, "b": sample})
    cells = tuning.transfer(matrix).data[0].text
    assert len(cells) == len(cells[0]) == 2


def test_still_identical_starts_at_all_and_ends_at_the_rest() -> None:
    table = pd.DataFrame(
        {
            "dataset": ["a"] * 4,
            "tokens_a": [9] * 4,
            "tokens_b": [9] * 4,
            "first": pd.array([None, 2, 5, None], dtype="Int64"),
        }
    )
    trace = compare.still_identical(table).data[0]
    assert list(trace.y) == [100, 75, 50, 50]
    assert trace.name == "a (2 / 4)"


def test_a_number_that_all_requests_share_gets_no_axis_of_millionths() -> None:
    for value in (0.0, 12.5):
        fig = latency.distribution({"off": np.full(9, value)}, "Overhead by request", "%")
        drawn = fig.data[0]
        assert sum(drawn.y) == 9
        assert drawn.width[0] * len(drawn.width) == pytest.approx(max(1.0, value / 10))


def test_a_long_name_leaves_its_bar_the_width() -> None:
    for name in ("2026-01-05T09-00-00-a-model-with-a-name-of-fifty-five-x", "b"):
        table = pd.DataFrame(
            {
                "run": [name],
                "rates of": ["gate"],
                "decode steps": [10],
                "verified": [2],
                "overhead": [1.5],
                "flips": [1],
            }
        )
        for fig in runs.price(table).values():
            assert fig.layout.margin.l <= 62, "names stand above their bars"
            assert all(len(a.text) <= runs.LONGEST + len(" · gate") for a in fig.layout.annotations)


def test_runs_show_price(steps: pd.DataFrame) -> None:
    table = pd.DataFrame(
        {
            "run": ["a", "b"],
            "rates of": ["gate", "off"],
            "decode steps": [10, 10],
            "verified": [2, 0],
            "overhead": [1.5, None],
            "flips": [1, 0],
        }
    )
    found = runs.price(table)
    assert list(found["verified"].data[0].x) == [20.0]
    assert list(found["overhead"].data[0].x) == [1.5]
    assert [n.text for fig in found.values() for n in fig.layout.annotations] == ["a · gate"] * 2
    assert not any(fig.data for fig in runs.price(table.iloc[1:]).values())


def test_a_logarithmic_axis_has_whole_labels() -> None:
    values = np.geomspace(0.02, 300, 50)
    axis = latency.ecdf({"gate": values}, "t", "ms").layout.xaxis
    named = dict(zip(axis.tickvals, axis.ticktext))
    assert (axis.type, named[0.2], named[0.05], named[200.0], named[5000.0]) == ("log", "0.2", "0.05", "200", "5000")
    assert latency.ecdf({"gate": np.array([0.0, 1.0])}, "t", "ms").layout.xaxis.type is None, "it has no zero"


def test_every_figure_names_itself_for_screen_readers(steps: pd.DataFrame) -> None:
    assert overview.events(overview.over_time(steps)).layout.meta["title"]


@pytest.mark.parametrize(
    ("rows", "spacing", "heights"), [(1, 0.1, None), (2, 0.09, None), (3, 0.075, [0.38, 0.34, 0.28])]
)
def test_plots_above_each_other_stand_where_plotly_puts_them(
    rows: int, spacing: float, heights: list[float] | None
) -> None:
    theirs = make_subplots(rows=rows, cols=1, shared_xaxes=True, vertical_spacing=spacing, row_heights=heights).layout
    ours = stacked(rows, spacing, heights)
    for row in range(1, rows + 1):
        for axis in (f"{name[:1]}axis{name[1:]}" for name in on_row(row).values()):
            wanted = theirs[axis].to_plotly_json()
            assert ours[axis].pop("domain") == pytest.approx(wanted.pop("domain"))
            assert ours[axis] == wanted


def test_further_settings_leave_the_others_and_the_figure_itself_alone() -> None:
    first = go.Figure(go.Bar(x=[1], y=[2]), {"xaxis": {"title": {"text": "x"}, "range": [0, 1]}, "barmode": "stack"})
    before = first.to_json()
    second = relaid(first, {"xaxis": {"title": {"standoff": 3}, "range": [0, 9]}}, {"height": 200})
    assert second.layout.xaxis.title.text == "x"
    assert (second.layout.xaxis.title.standoff, second.layout.barmode, second.layout.height) == (3, "stack", 200)
    assert list(second.layout.xaxis.range) == [0, 9]
    assert first.to_json() == before


def test_readers_of_both_themes_share_a_figure() -> None:
    values = np.arange(100) / 16
    kept = margins.histogram({"a": values}, {"a": values[:3]}, margin_bins(values, "log"), "log", 0.5)
    before = kept.to_json()
    light, dark = ui.inked(kept, False), ui.inked(kept, True)
    assert kept.to_json() == before
    for fig, ink, tau in ((light, "#555B66", ui.THRESHOLD_INKS[0]), (dark, "#A9AFBA", ui.THRESHOLD_INKS[1])):
        assert fig.layout.xaxis.tickfont.color == fig.layout.yaxis.title.font.color == fig.layout.font.color == ink
        assert [n.font.color for n in fig.layout.annotations] == [None, tau]
        assert fig.layout.xaxis.title.text == kept.layout.xaxis.title.text


def test_names_cannot_carry_markup() -> None:
    assert safe('<a href="x">') == '&lt;a href="x"&gt;'


def test_what_is_loaded_beside_the_first_page_is_not_gone_through_again() -> None:
    """Streamlit collects garbage after every run of a page; a thousand listed runs would idle at several percent of a core."""
    before = gc.get_freeze_count()
    try:
        warmup.load()
        assert gc.get_freeze_count() > before + 10_000
    finally:
        gc.unfreeze()
