"""More of the dashboard in a real Chromium: two runs compared, thresholds by hand, the timeline and the map, annotations."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages_in_browser import cards, copied_link, keep, overlaps, row_of, visit, wait_drawn

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


def test_the_chosen_flip_stands_in_the_link_and_back_returns_to_it(tab: Any, address: str) -> None:
    visit(tab, address, "flips", "?run=calibration")
    shown = tab.locator("p", has_text=re.compile(r"^Step \d+ of request"))
    first = shown.text_content()
    tab.mouse.click(*row_of(tab, 0, 2))
    tab.wait_for_url(re.compile(r"flip=\d+-\d+"))
    wait_drawn(tab, "Flips")
    step = re.search(r"flip=\d+-(\d+)", tab.url).group(1)
    tab.wait_for_function("old => !document.body.innerText.includes(old)", arg=first)
    second = shown.text_content()
    assert second.startswith(f"Step {step} of request")
    tab.reload()
    wait_drawn(tab, "Flips")
    assert shown.text_content() == second, "the link leads to the same flip"
    tab.go_back()
    tab.wait_for_function("old => document.body.innerText.includes(old)", arg=first)
    assert "flip=" not in tab.url


def test_the_chosen_pair_and_cell_stand_in_the_link(tab: Any, address: str) -> None:
    visit(tab, address, "compare", "?run=calibration&other=stock")
    first = tab.locator(".mg-two .mg-strip").first.text_content()
    last = tab.locator("[data-testid=stDataFrame]").count() - 1
    tab.mouse.click(*row_of(tab, last, 1))
    tab.wait_for_url(re.compile(r"pair=\d+-\d+"))
    tab.wait_for_function("old => document.querySelector('.mg-two .mg-strip')?.textContent !== old", arg=first)
    wait_drawn(tab, "Compare")
    strips = tab.locator(".mg-two .mg-strip").first.text_content()
    visit(tab, address, "compare", tab.url[tab.url.index("?") :])
    assert tab.locator(".mg-two .mg-strip").first.text_content() == strips
    visit(tab, address, "overview", "?run=sample&cell=0:all+batches")
    assert tab.locator(".mg-two .mg-strip").count() == 2
    assert tab.locator(".mg-two h4").nth(1).text_content().startswith("gate")
    visit(tab, address, "overview", "?run=sample&cell=9:all+batches")
    assert tab.locator(".mg-two").count() == 0, "there is no such cell"


def test_a_note_and_tags_are_written_beside_a_run_that_is_selected(tab: Any, address: str, trace_dir: Path) -> None:
    visit(tab, address, "runs", "?selected=stock")
    try:
        tab.get_by_label("Note", exact=True).fill("the <i>other</i> engine")
        tab.get_by_label("Tags", exact=True).fill("baseline, nightly")
        tab.get_by_role("button", name="Save").click()
        # The click is a message: the page that stands there until it is read is drawn, too.
        while not (trace_dir / "stock" / "notes.json").exists():
            tab.wait_for_timeout(100)
        wait_drawn(tab, "Runs")
        note = json.loads((trace_dir / "stock" / "notes.json").read_text())
        assert (note["note"], note["tags"]) == ("the <i>other</i> engine", ["baseline", "nightly"])
        visit(tab, address, "compare", "?run=calibration")
        assert "(b)" in tab.locator("[data-testid=stSelectbox]").nth(1).text_content()
        assert "stock" in tab.locator(".mg-two h4").nth(1).text_content(), (
            "the baseline is what others are compared with"
        )
        assert "other=stock" in copied_link(tab), "the link says which one, whatever the baseline is tomorrow"
    finally:
        (trace_dir / "stock" / "notes.json").unlink(missing_ok=True)


def test_the_report_of_two_runs_opens_from_disk(tab: Any, trace_dir: Path, tmp_path: Path) -> None:
    from sglang_margingate.report import write_report

    file = write_report(trace_dir / "calibration", tmp_path / "pair.html", trace_dir / "stock")
    tab.goto(file.as_uri())
    text = tab.locator("body").inner_text()
    for part in (
        "calibration (a) and stock (b)",
        "Matched requests",
        "Time of matched requests",
        "Requests that diverge",
    ):
        assert part in text
    assert tab.locator("table").count() >= 3


def test_the_first_run_of_an_empty_folder_appears_by_itself(tab: Any, empty: tuple[str, Path], trace_dir: Path) -> None:
    url, folder = empty
    visit(tab, url, "overview")
    tab.get_by_text("No runs here yet").wait_for()
    shutil.copytree(trace_dir / "canonical", folder / "first")
    tab.locator(".mg-chip", has_text="first").wait_for()
    wait_drawn(tab, "Overview")
    assert cards(tab)["Requests finished"] == "24"
