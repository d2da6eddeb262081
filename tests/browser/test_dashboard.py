"""The dashboard in a real Chromium: every page, the threshold, the way from a flip to its request, links, exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from _pytest.fixtures import FixtureRequest
from pages_in_browser import (
    cards,
    copied_link,
    faint,
    keep,
    overlaps,
    problems_of,
    row_of,
    visit,
    wait_drawn,
)

PAGES = ("runs", "overview", "requests", "request", "margins", "flips", "latency", "tuning", "compare")

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
@pytest.mark.parametrize("name", PAGES)
def test_each_page_opens(tab: Any, address: str, name: str, request: FixtureRequest) -> None:
    visit(tab, address, name, "?run=sample")
    assert tab.locator("[data-testid=stException]").count() == 0
    assert tab.locator("[data-testid=stAlertContentError]").count() == 0
    assert faint(tab) == {}, "text below the contrast of WCAG's level AA"
    above = tab.evaluate(
        """() => {
            const foot = [...document.querySelectorAll('[data-testid=stMain] [data-testid=stPopover]')].at(-1);
            const shown = [...document.querySelectorAll('[data-testid=stPlotlyChart], [data-testid=stDataFrame]')];
            return shown.filter(e => !foot || e.getBoundingClientRect().bottom > foot.getBoundingClientRect().top).length;
        }"""
    )
    assert above == 0, "Export stands at the foot of every page"
    keep(tab, f"{name}-{request.node.callspec.params['tab']}")


def test_tuning_exports_a_profile_that_the_server_reads(tab: Any, address: str, tmp_path: Path) -> None:
    from sglang_margingate.gate.profile import load_profile

    visit(tab, address, "tuning", "?run=calibration")
    keep(tab, "tuning-calibration")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Download the profile").click()
    file = tmp_path / "profile.json"
    download.value.save_as(file)
    assert set(load_profile(file).datasets) == {"arith", "code", "story"}


def test_dragging_the_threshold_takes_effect_at_once(tab: Any, address: str) -> None:
    visit(tab, address, "margins", "?run=calibration")
    before = cards(tab)
    thumb = tab.get_by_role("slider").first
    box = thumb.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 160, y, steps=8)
    tab.mouse.up()
    tab.wait_for_function(
        "old => document.querySelector('.mg-card .value').textContent !== old", arg=before["Threshold (tau)"]
    )
    wait_drawn(tab, "Margins")
    after = cards(tab)
    assert float(after["Threshold (tau)"]) > float(before["Threshold (tau)"])
    assert float(after["Would trigger"].rstrip("%")) > float(before["Would trigger"].rstrip("%"))
    assert int(after["Flips missed"]) <= int(before["Flips missed"])
    assert f"tau={after['Threshold (tau)']}" in copied_link(tab), "a part of the page that ran alone is in the link"
    keep(tab, "margins-dragged")


def test_the_threshold_moves_by_keyboard(tab: Any, address: str) -> None:
    visit(tab, address, "margins", "?run=calibration")
    before = cards(tab)["Threshold (tau)"]
    tab.get_by_role("slider").first.focus()
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_function("old => document.querySelector('.mg-card .value').textContent !== old", arg=before)
    assert float(cards(tab)["Threshold (tau)"]) < float(before)


def test_a_flip_leads_to_its_request(tab: Any, address: str) -> None:
    visit(tab, address, "flips", "?run=calibration")
    tab.get_by_role("link", name="Open in Request").click()
    wait_drawn(tab, "Request")
    query = dict(re.findall(r"(\w+)=([^&]+)", tab.url))
    assert query["run"] == "calibration"
    selected = tab.locator(".mg-strip .t.sel")
    assert selected.get_attribute("data-step") == query["step"]
    assert re.search(r"repaired|missed|flipped", selected.get_attribute("class"))
    assert (
        f"step {query['step']} of request {query['request']}"
        in tab.locator("[data-testid=stCode]").first.text_content()
    )
    keep(tab, "request-from-flip")


def test_a_token_tells_its_story_on_hover_and_focus(tab: Any, address: str) -> None:
    visit(tab, address, "request", "?run=sample")
    if not tab.locator(".mg-strip .t.repaired, .mg-strip .t.missed").count():
        visit(tab, address, "request", "?run=calibration")
    token = tab.locator(".mg-strip .t.repaired, .mg-strip .t.missed").first
    box = token.bounding_box()
    below = {"x": max(300, box["x"] - 150), "y": box["y"] + 40, "width": 300, "height": 80}
    before = tab.screenshot(clip=below)
    token.hover()
    shown = "e => getComputedStyle(e, '::after').display"
    assert token.evaluate(shown) == "block"
    assert tab.screenshot(clip=below) != before, "the hover text is not where the token is"
    tip = token.get_attribute("data-tip")
    for word in ("margin", "threshold", "second token", "verify token", "K/V change", "batch"):
        assert word in tip
    keep(tab, "request-hover", whole=False)
    tab.mouse.move(0, 0)
    tab.keyboard.press("Tab")
    token.focus()
    assert token.evaluate(shown) == "block"


def test_next_flip_walks_through_the_response(tab: Any, address: str) -> None:
    visit(tab, address, "request", "?run=calibration")
    tab.get_by_role("button", name="Next flip").click()
    tab.wait_for_url(re.compile(r"step=\d+"))
    wait_drawn(tab, "Request")
    assert tab.locator(".mg-strip .t.sel").count() == 1


def test_a_deep_link_opens_run_request_and_step(tab: Any, address: str) -> None:
    visit(tab, address, "request", "?run=calibration&request=rid-00004&step=7")
    assert tab.locator(".mg-strip .t.sel").get_attribute("data-step") == "7"
    assert "rid-00004" in tab.url


def test_switching_pages_keeps_the_run(tab: Any, address: str) -> None:
    visit(tab, address, "overview", "?run=stock")
    tab.locator("[data-testid=stSidebar] [data-testid=stPageLink-NavLink]", has_text="Margins").click()
    wait_drawn(tab, "Margins")
    assert "run=stock" in tab.url


@pytest.mark.parametrize("name", ["../..", "%2Fetc", "..%2Fsample"])
def test_a_link_cannot_leave_the_trace_folder(tab: Any, address: str, name: str) -> None:
    tab.goto(f"{address}/overview?run={name}")
    wait_drawn(tab, "Overview")
    tab.get_by_text("There is no run named").wait_for()
    assert tab.locator(".mg-card").count() == 0, "numbers of another run"


@pytest.mark.parametrize("name", PAGES)
def test_text_of_users_and_models_is_never_run(tab: Any, address: str, name: str) -> None:
    visit(tab, address, name, "?run=hostile")
    tab.wait_for_timeout(300)
    assert tab.title() != "attacked"
    assert tab.locator("[data-testid=stMain] img[src='x']").count() == 0


def test_a_figure_is_saved_as_png_and_html(tab: Any, address: str, tmp_path: Path) -> None:
    visit(tab, address, "overview", "?run=sample")
    tab.locator("[data-testid=stPlotlyChart]").first.hover()
    with tab.expect_download() as download:
        tab.locator(".modebar-btn[data-title^='Download plot']").first.click()
    png = tmp_path / "figure.png"
    download.value.save_as(png)
    assert png.read_bytes().startswith(b"\x89PNG")
    tab.get_by_role("button", name="Export").click()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="over-time.html").click()
    page = tmp_path / "figure.html"
    download.value.save_as(page)
    assert "plotly" in page.read_text()[:2_000_000].lower()
    with tab.expect_download() as download:
        tab.get_by_role("button", name="datasets.parquet").click()
    table = tmp_path / "table.parquet"
    download.value.save_as(table)
    assert table.read_bytes().startswith(b"PAR1")


@pytest.mark.parametrize("tab", ["light", "dark"], indirect=True)
@pytest.mark.parametrize("run", ["sample", "hostile"])
def test_the_report_opens_from_disk(
    tab: Any, trace_dir: Path, tmp_path: Path, run: str, request: FixtureRequest
) -> None:
    from sglang_margingate.report import write_report

    report = write_report(trace_dir / run, tmp_path / "report.html")
    with problems_of(tab) as problems:
        tab.goto(report.as_uri())
        tab.wait_for_selector(".js-plotly-plot .main-svg")
    assert not problems
    assert tab.title() != "attacked"
    if run == "sample":
        keep(tab, f"report-{request.node.callspec.params['tab']}", whole=False)


def test_a_live_run_is_followed(tab: Any, address: str, trace_dir: Path) -> None:
    import json
    import shutil
    from datetime import datetime, timezone

    from playwright.sync_api import expect

    whole, live = trace_dir / "calibration", trace_dir / "live"
    live.mkdir()
    try:
        manifest = json.loads((whole / "manifest.json").read_text())
        del manifest["closed_at"]
        manifest["heartbeat"] = datetime.now(timezone.utc).isoformat()
        (live / "manifest.json").write_text(json.dumps(manifest))
        shutil.copy(whole / "steps-0000.parquet", live)
        visit(tab, address, "overview", "?run=live")
        tab.locator(".mg-chip.live").wait_for()
        tab.get_by_text("Newest flips").wait_for()
        before = tab.locator(".mg-card .sub").nth(1).text_content()
        manifest["heartbeat"] = datetime.now(timezone.utc).isoformat()
        (live / "manifest.json").write_text(json.dumps(manifest))
        shutil.copy(whole / "steps-0001.parquet", live)
        tab.wait_for_function("old => document.querySelectorAll('.mg-card .sub')[1]?.textContent !== old", arg=before)
        manifest["closed_at"] = datetime.now(timezone.utc).isoformat()
        (live / "manifest.json").write_text(json.dumps(manifest))
        tab.locator(".mg-chip.live").wait_for(state="detached")
        # The chip is at the head of the page: what stands below it goes when the script that left it out has ended.
        expect(tab.get_by_text("Newest flips"), "nothing new comes any more").to_have_count(0)
    finally:
        shutil.rmtree(live)


def test_a_click_in_the_margin_plot_selects_the_step(tab: Any, address: str) -> None:
    visit(tab, address, "request", "?run=calibration")
    point = tab.locator(".scatterlayer .trace:has(path.point) .points").nth(1).locator("path.point").first
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_url(re.compile(r"step=\d+"))
    wait_drawn(tab, "Request")
    step = re.search(r"step=(\d+)", tab.url).group(1)
    assert tab.locator(".mg-strip .t.sel").get_attribute("data-step") == step


def test_back_goes_back_once(tab: Any, address: str) -> None:
    visit(tab, address, "overview", "?run=sample")
    for name in ("Flips", "Margins"):
        tab.locator("[data-testid=stSidebar] [data-testid=stPageLink-NavLink]", has_text=name).click()
        wait_drawn(tab, name)
        assert "run=sample" in tab.url
    for name in ("Flips", "Overview"):
        tab.go_back()
        wait_drawn(tab, name)


def test_a_filter_stands_in_the_link_and_goes_along(tab: Any, address: str) -> None:
    visit(tab, address, "overview", "?run=sample&policy=always")
    assert cards(tab)["Requests finished"] == "54"
    assert "sample" in tab.title()
    tab.locator("[data-testid=stSidebar] [data-testid=stPageLink-NavLink]", has_text="Latency").click()
    wait_drawn(tab, "Latency")
    assert "policy=always" in tab.url
    tab.reload()
    wait_drawn(tab, "Latency")
    assert "54 / 54" in tab.locator(".mg-card .sub").all_text_contents()[3]


def test_runs_has_an_address_and_saves_its_table(tab: Any, address: str, tmp_path: Path) -> None:
    tab.goto(f"{address}/runs")
    wait_drawn(tab, "Runs")
    assert tab.locator("[role=dialog]").count() == 0
    assert "gate 30 / 30" in tab.locator(".mg-result").text_content(), "the main result is on the first screen"
    tab.get_by_role("button", name="Export").click()
    tab.wait_for_timeout(4_000)  # longer than a look at the folder: the links must outlive it
    with tab.expect_download() as download:
        tab.get_by_role("button", name="runs.csv").click()
    download.value.save_as(tmp_path / "runs.csv")
    assert "calibration" in (tmp_path / "runs.csv").read_text()


def test_a_cell_of_the_identity_view_opens_two_answers(tab: Any, address: str) -> None:
    visit(tab, address, "overview", "?run=sample")
    box = tab.locator("[data-testid=stDataFrame]").first.bounding_box()
    tab.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 52)
    tab.locator(".mg-two .mg-strip").nth(1).wait_for()
    wait_drawn(tab, "Overview")
    keep(tab, "identity-cell")


def test_a_token_and_keys_select_a_step_and_the_panel_says_why(tab: Any, address: str) -> None:
    visit(tab, address, "request", "?run=sample")
    tab.locator(".mg-strip .t[data-step='3']").click()
    tab.wait_for_url(re.compile(r"step=3(&|$)"))
    tab.keyboard.press("n")  # at once: the page of step 3 is not drawn yet
    tab.locator(".mg-strip .t.sel.repaired").wait_for()
    wait_drawn(tab, "Request")
    tab.get_by_text("the verify's own shape").first.wait_for()
    flip = re.search(r"step=(\d+)", tab.url).group(1)
    tab.keyboard.press("n")
    tab.wait_for_function("old => document.querySelector('.mg-strip .t.sel')?.dataset.step !== old", arg=flip)
    wait_drawn(tab, "Request")
    tab.keyboard.press("p")
    tab.wait_for_function("old => document.querySelector('.mg-strip .t.sel')?.dataset.step === old", arg=flip)
    keep(tab, "request-why")


def test_requests_are_found_by_their_words(tab: Any, address: str) -> None:
    visit(tab, address, "requests", "?run=sample&flipped=true")
    touched = int(cards(tab)["Requests"])
    assert 0 < touched == int(cards(tab)["With a flip"])
    visit(tab, address, "requests", "?run=sample&text=beaver")
    assert 0 < int(cards(tab)["Requests"]) < 153
    tab.mouse.click(*row_of(tab, 0, 1))
    tab.wait_for_url(re.compile(r"picked=\d+"))
    wait_drawn(tab, "Requests")
    link = copied_link(tab)
    assert {"run=sample", "text=beaver"} < set(link[link.index("?") + 1 :].split("&"))
    opens = tab.get_by_role("link", name="in Request")
    label = opens.text_content()
    tab.goto(link)
    wait_drawn(tab, "Requests")
    assert opens.text_content() == label, "the copied link shows the same"


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_it_all(tab: Any, address: str, name: str) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    visit(tab, address, name, "?run=calibration" + ("&other=stock" if name == "compare" else ""))
    tab.wait_for_function("document.querySelector('[data-testid=stMain]').scrollWidth <= 390")
    tab.wait_for_timeout(500)
    covered = tab.evaluate(
        """() => [...document.querySelectorAll('.js-plotly-plot')].filter(plot => {
            const legend = plot.querySelector('.legend'), titles = [...plot.querySelectorAll('.xtitle, .x2title, .x3title')];
            return legend && titles.some(t => t.getBoundingClientRect().bottom > legend.getBoundingClientRect().top + 2);
        }).length"""
    )
    assert covered == 0, "a legend lies on an axis"
    assert overlaps(tab) == [], "titles of axes lie on each other"
