"""More of the dashboard in a real Chromium: two runs compared, thresholds by hand, the timeline and the map, annotations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages_in_browser import cards, keep, overlaps, visit, wait_drawn

pytestmark = pytest.mark.browser


def test_two_runs_stand_side_by_side_and_change_places(tab: Any, address: str) -> None:
    visit(tab, address, "compare", "?run=calibration&other=stock")
    assert {"Identical sequences", "Diverged", "Tokens before divergence"} <= set(cards(tab))
    strips = tab.locator(".mg-two .mg-strip")
    strips.nth(1).wait_for()
    assert strips.count() == 2
    assert tab.locator(".mg-two .mg-strip .t.diverged").count() == 2, "the first difference is marked in both"
    assert tab.locator(".mg-two .mg-strip .t.again").count() > 0, (
        "where they meet again is told from what is on one side only"
    )
    tab.get_by_role("button", name="Swap a and b").click()
    tab.wait_for_url(re.compile(r"run=stock"))
    wait_drawn(tab, "Compare")
    assert "other=calibration" in tab.url
    assert "stock" in tab.locator(".mg-chip").first.text_content()
    keep(tab, "compare-swapped")


def test_a_run_that_is_not_there_leads_to_one_that_is(tab: Any, address: str) -> None:
    visit(tab, address, "overview", "?run=renamed")
    tab.get_by_role("button", name="canonical").click()
    tab.wait_for_url(re.compile(r"run=canonical"))
    wait_drawn(tab, "Overview")
    assert "canonical" in tab.locator(".mg-chip").first.text_content(), "the address says what is shown"


def test_a_comparison_of_two_models_is_warned_of(tab: Any, address: str) -> None:
    visit(tab, address, "compare", "?run=sample&other=calibration")
    tab.get_by_text("These runs differ in model").wait_for()


def test_thresholds_set_by_hand_stand_in_the_link(tab: Any, address: str) -> None:
    visit(tab, address, "tuning", "?run=calibration&taus=arith:2.5")
    box = tab.get_by_label("arith", exact=True)
    assert float(box.input_value()) == 2.5
    assert "to 2.5" in tab.locator(".mg-card .sub").first.text_content()
    box.fill("3.25")
    box.press("Enter")
    tab.wait_for_url(re.compile(r"taus=arith(%3A|:)3\.25"))
    wait_drawn(tab, "Tuning")
    assert "to 3.25" in tab.locator(".mg-card .sub").first.text_content()


def test_the_timeline_and_the_map_open_from_a_link(tab: Any, address: str, trace_dir: Path) -> None:
    visit(tab, address, "overview", "?run=canonical&timeline=true")
    titles = tab.locator(".js-plotly-plot .gtitle").all_text_contents()
    for title in ("Batch timeline", "Invariance map", "Policy gate, so far"):
        assert any(title in t for t in titles), title
    layers = json.loads((trace_dir / "canonical" / "manifest.json").read_text())["invariance"]["map"]["layers"]
    shown = tab.locator(".js-plotly-plot .ytick text").all_text_contents()
    assert {layer["name"] for layer in layers} <= set(shown)
    assert overlaps(tab) == []
    keep(tab, "overview-canonical")


def test_an_annotation_is_written_where_it_is_looked_at(tab: Any, address: str, trace_dir: Path) -> None:
    visit(tab, address, "request", "?run=canonical&request=rid-00004&step=7")
    tab.get_by_text("Annotation of step 7").click()
    tab.get_by_label("Words").fill("odd <b>here</b>")
    tab.get_by_role("button", name="Save").click()
    tab.get_by_text("Annotation of step 7: odd <b>here</b>").wait_for()
    marks = json.loads((trace_dir / "canonical" / "notes.json").read_text())["marks"]
    assert marks == [{"request": 5, "step": 7, "text": "odd <b>here</b>"}]
    visit(tab, address, "overview", "?run=canonical")
    tab.get_by_role("heading", name="Annotations").wait_for()
    keep(tab, "annotations")
