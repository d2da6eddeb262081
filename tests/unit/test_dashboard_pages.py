"""Every dashboard page on every kind of run: no page shows a traceback, and each says what is the matter."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
pytest.importorskip("plotly", reason="the dashboard's extra is not installed")
pytest.importorskip("margingate_dashboard", reason="the package is not installed (pip install -e .)")

from dashboard_app import open_app
from margingate_dashboard.ui import PAGES
from streamlit.testing.v1 import AppTest
from synthetic_runs import SyntheticSpec, write_run

SMALL = SyntheticSpec(requests=6, tokens=40)


def rewrite_manifest(run: Path, **changes: object) -> None:
    file = run / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def empty_folder(folder: Path) -> None:
    folder.mkdir()


def missing_folder(folder: Path) -> None:
    pass


def half_written(folder: Path) -> None:
    run = write_run(folder / "half", SMALL)
    last = run / "steps-0002.parquet"
    last.write_bytes(last.read_bytes()[:900])
    (run / "requests-0000.parquet").unlink()
    (run / ".steps-0003.parquet.tmp").write_bytes(b"PAR1")
    rewrite_manifest(run, closed_at=None)


def nothing_but_a_manifest(folder: Path) -> None:
    run = write_run(folder / "begun", SMALL)
    for file in run.glob("*.parquet"):
        file.unlink()


def manifest_missing(folder: Path) -> None:
    (write_run(folder / "lost", SMALL) / "manifest.json").unlink()


def manifest_garbled(folder: Path) -> None:
    (write_run(folder / "garbled", SMALL) / "manifest.json").write_text('{"schema_version": "1.')


def manifest_of_odd_types(folder: Path) -> None:
    run = write_run(folder / "odd", SMALL)
    rewrite_manifest(run, model=["a"], flags="none", versions=7, created=12, device=None)


def manifests_of_all_kinds(folder: Path) -> None:
    write_run(folder / "good", SMALL)
    texts = {
        "deep": "[" * 100_000,
        "long": '{"threshold": ' + "1" * 401 + "}",
        "nan": '{"threshold": NaN}',
        "list": "[1]",
    }
    for name, text in texts.items():
        (write_run(folder / name, SMALL) / "manifest.json").write_text(text)
    fifo = write_run(folder / "fifo", SMALL)
    (fifo / "manifest.json").unlink()
    os.mkfifo(fifo / "manifest.json")
    os.mkfifo(fifo / "steps-9999.parquet")


def all_files_damaged(folder: Path) -> None:
    for file in write_run(folder / "damaged", SMALL).glob("*.parquet"):
        file.write_bytes(b"not parquet")


def newer_schema(folder: Path) -> None:
    write_run(folder / "newer", SyntheticSpec(requests=4, tokens=30, schema_version="3.0"))


def no_flips(folder: Path) -> None:
    write_run(folder / "calm", SyntheticSpec(requests=6, tokens=40, perturbation=0.0, policy="always"))


def one_request(folder: Path) -> None:
    write_run(folder / "one", SyntheticSpec(requests=1, tokens=30, datasets=("story",), policy="always"))


def without_text(folder: Path) -> None:
    write_run(folder / "mute", SyntheticSpec(requests=6, tokens=60, text=False))


def ten_thousand_requests(folder: Path) -> None:
    write_run(folder / "many", SyntheticSpec(requests=10_000, tokens=8, slots=64, policy="always"))


def unknown_datasets(folder: Path) -> None:
    names = (
        "",
        "<script>alert(1)</script>",
        "../../etc",
        "日本語",
        "a" * 64,
        "*b* [x](http://e)",
        *(f"d{i}" for i in range(40)),
    )
    write_run(folder / "tags", SyntheticSpec(requests=92, tokens=20, datasets=names, policy="always", perturbation=0.5))


def policy_off(folder: Path) -> None:
    write_run(folder / "off", SyntheticSpec(requests=6, tokens=40, policy="off"))


def live(folder: Path) -> None:
    write_run(folder / "live", SyntheticSpec(requests=6, tokens=40, live=True))


def first_tokens_only(folder: Path) -> None:
    """Requests with one output token: nothing but prefills, no decode step at all."""
    import pyarrow.parquet as pq

    run = write_run(folder / "short", SMALL)
    for file in sorted(run.glob("steps-*.parquet")):
        table = pq.read_table(file)
        pq.write_table(table.filter(table["prefill"]), file)


def nulls_wherever_possible(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = write_run(folder / "nulls", SMALL)
    for file in run.glob("*.parquet"):
        table = pq.read_table(file)
        for index, column in enumerate(table.schema):
            if column.name not in ("request", "request_id", "step", "token", "time", "position"):
                table = table.set_column(index, column, pa.nulls(table.num_rows, column.type))
        pq.write_table(table, file)


def two_runs(folder: Path) -> None:
    write_run(folder / "a", SMALL)
    write_run(folder / "b", SyntheticSpec(requests=6, tokens=40, policy="off"))


def two_runs_without_common_requests(folder: Path) -> None:
    write_run(folder / "a", SMALL)
    one_request(folder)
    shutil.copytree(folder / "one", folder / "copy")


SCENARIOS: list[Callable[[Path], None]] = [
    empty_folder, missing_folder, half_written, nothing_but_a_manifest, manifest_missing, manifest_garbled,
    manifest_of_odd_types, manifests_of_all_kinds, all_files_damaged, newer_schema, no_flips, one_request, without_text, ten_thousand_requests,
    unknown_datasets, policy_off, live, first_tokens_only, nulls_wherever_possible, two_runs,
    two_runs_without_common_requests,
]  # fmt: skip


@pytest.mark.parametrize("make", SCENARIOS, ids=lambda f: f.__name__)
def test_no_page_shows_a_traceback(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "traces"
    make(folder)
    at = open_app(folder, monkeypatch).run()
    for page in PAGES.values():
        at.switch_page(page).run()
        assert not at.exception, f"{page}: {[e.value for e in at.exception]}"
        said = [*(c.value for c in at.caption), *(w.value for w in at.warning)]
        assert not any(tmp_path.name in text.replace("\\", "") for text in said), "where it lies is nobody's business"
        errors = [e.value for e in at.error]
        if make is newer_schema and page != "runs.py":
            assert "3\\.0" in errors[0]
            assert "upgrade" in errors[0]
        else:
            assert not errors, f"{page}: {errors}"


def shown(at: AppTest) -> str:
    """Return all HTML of the page."""
    return "\n".join(e.proto.body if hasattr(e.proto, "body") else str(e.value) for e in at.get("html"))


def with_column(at: AppTest, column: str) -> list[pd.DataFrame]:
    return [t.value for t in at.dataframe if column in t.value.columns]


def tables(at: AppTest, column: str) -> list[pd.DataFrame]:
    """Return the page's tables that begin with this column."""
    return [t.value for t in at.dataframe if t.value.columns[0] == column]


def test_an_empty_folder_says_how_to_make_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = open_app(tmp_path, monkeypatch).run()
    assert "launch_server" in shown(at)


def test_a_broken_manifest_marks_its_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests_of_all_kinds(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    table = at.dataframe[0].value
    status = dict(zip(table["run"], table["status"]))
    assert status.pop("good") == "made up"
    assert set(status.values()) == {"broken"}
    said = " ".join(c.value for c in at.caption)
    assert all(word in said for word in ("nested too deeply", "401 characters", "NaN", "found list", "FIFO"))


def test_a_newer_run_is_listed_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_schema(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    assert at.dataframe[0].value["status"].tolist() == ["unreadable"]
    assert any("upgrade" in c.value for c in at.caption)


@pytest.mark.parametrize("name", ["../secret", "/etc", "a/../b", "%2e%2e", "b\x00"])
def test_a_link_cannot_leave_the_trace_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "traces"
    write_run(tmp_path / "secret", SMALL)
    write_run(folder / "a", SMALL)
    at = open_app(folder, monkeypatch).run()
    for script in (p for p in PAGES.values() if p != "runs.py"):
        at.query_params["run"] = name
        at.query_params["other"] = name
        at.switch_page(script).run()
        assert not at.exception, script
        assert not at.error, script
        assert any("There is no run named" in w.value for w in at.warning), script
        assert "secret" not in shown(at), script
        assert not at.dataframe, f"{script}: another run's numbers stand under the name of the one that was asked for"
        assert 'class="mg-card"' not in shown(at), script
        offered = any("newest" in m.value or "Runs in this folder" in m.value for m in at.markdown)
        assert offered, f"{script}: what there is, is not offered"


def test_swapping_two_runs_keeps_the_filters_and_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_runs(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    for key, value in (("run", "a"), ("other", "b"), ("dataset", "story")):
        at.query_params[key] = value
    at.switch_page("compare.py").run()
    next(b for b in at.button if b.label == "Swap a and b").click().run()
    assert ["".join(at.query_params[k]) for k in ("run", "other", "dataset")] == ["b", "a", "story"]
    assert not at.exception
    at.query_params["other"] = "nobody"
    at.run()
    assert any("There is no run named “nobody”" in w.value for w in at.warning)
    next(b for b in at.button if b.label == "a").click().run()
    assert "".join(at.query_params["other"]) == "a"
    assert not at.warning


def test_a_symbolic_link_cannot_leave_the_trace_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "traces"
    write_run(tmp_path / "secret", SMALL)
    write_run(folder / "a", SMALL)
    (folder / "linked").symlink_to(tmp_path / "secret")
    at = open_app(folder, monkeypatch).run()
    assert at.dataframe[0].value["run"].tolist() == ["a"]


def test_links_open_run_request_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_runs(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    for key, value in (("run", "b"), ("request", "rid-00004"), ("step", "7")):
        at.query_params[key] = value
    at.switch_page("request.py").run()
    assert at.selectbox(key="run_box").value == "b"
    assert at.selectbox(key="request_box").value == 5
    assert at.number_input[0].value == 7
    assert "step 7 of request rid-00004, run b" in at.code[0].value


def test_what_is_selected_in_a_table_stands_in_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_runs(tmp_path)
    shutil.rmtree(tmp_path / "a")
    write_run(tmp_path / "a", SyntheticSpec(requests=12, tokens=80, policy="always"))
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["run"] = "a"
    at.switch_page("flips.py").run()
    flips = tables(at, "number")[0]

    def said() -> str:
        return next(c.value for c in at.code if c.value.startswith("MarginGate"))

    first, last = flips.iloc[0], flips.iloc[-1]
    assert f"step {first['step']} of request {first['request']}" in said(), "the first, where none is named"
    at.query_params["flip"] = f"{last['number']}-{last['step']}"
    at.run()
    assert f"step {last['step']} of request {last['request']}" in said()
    for nonsense in ("", "9999-1", "<b>", f"{last['number']}"):
        at.query_params["flip"] = nonsense
        at.run()
        assert f"step {first['step']} of request {first['request']}" in said()
        assert not at.exception
    at.query_params["cell"] = "99:all batches"
    at.query_params["selected"] = ["a", "no such run"]
    at.switch_page("runs.py").run()
    assert not at.exception
    assert not at.error
    assert [t.label for t in at.text_input if t.label == "Note"] == ["Note"], "one of them is here"


@pytest.mark.parametrize("live", [True, False])
def test_one_id_of_several_requests_a_health_check_and_one_without_a_row(
    live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    run = write_run(tmp_path / "r", SyntheticSpec(requests=6, tokens=20, live=live))
    for file in run.glob("*.parquet"):
        frame = pq.read_table(file).to_pandas()
        names = {1: "same", 2: "same", 3: "HEALTH_CHECK_1", 4: "lost"}
        frame["request_id"] = [names.get(n, i) for n, i in zip(frame["request"], frame["request_id"].astype(str))]
        frame = frame[frame["request"] < 4] if file.name.startswith("requests") else frame
        frame.astype({"request_id": "category"}).to_parquet(file)
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["request"] = "same"
    at.switch_page("request.py").run()
    box = at.selectbox(key="request_box")
    assert box.value == 2, "the newest of them"
    assert sum("same (request" in o for o in box.options) == 2
    assert not any("HEALTH_CHECK" in o for o in box.options)
    at.query_params["request"], at.query_params["number"] = "same", "1"
    at.run()
    assert at.selectbox(key="request_box").value == 1
    at.selectbox(key="request_box").set_value(4).run()
    said = " ".join(h.proto.body for h in at.get("html"))
    assert (">running<" in said, ">no row<" in said) == (live, not live)


@pytest.mark.parametrize(
    ("request_id", "said"),
    [
        ("rid-00003", (">Temperature<", ">0.8<", "seed 1003; the margin is that of logits plus noise")),
        ("rid-00000", ("greedy",)),
    ],
)
def test_a_request_says_how_its_tokens_were_chosen(
    request_id: str, said: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "r", SMALL)
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["request"] = request_id
    at.switch_page("request.py").run()
    html = " ".join(h.proto.body for h in at.get("html"))
    assert all(words in html for words in said)


@pytest.mark.parametrize(
    ("request_id", "step"), [("nobody", "0"), ("rid-00001", "999999"), ("rid-00001", "-1"), ("<b>", "x")]
)
def test_links_to_what_is_not_there_fall_back(
    request_id: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_runs(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["request"], at.query_params["step"] = request_id, step
    at.switch_page("request.py").run()
    assert not at.exception
    assert not at.error
    if request_id == "rid-00001":
        assert at.selectbox(key="request_box").value == 2
        assert 'class="mg-card"' in shown(at)
        return
    assert any("is not in this run" in w.value for w in at.warning)
    assert 'class="mg-card"' not in shown(at), (
        "another request's numbers stand under the name of the one that was asked for"
    )
    assert not at.dataframe
    assert not at.get("plotly_chart")


def test_a_request_that_a_filter_hides_is_said_to_be_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", SyntheticSpec(requests=8, tokens=40, mix=("gate", "log"), sampled=1))
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["policy"], at.query_params["request"] = "log", "rid-00000"
    at.switch_page("request.py").run()
    assert [w.value for w in at.warning] == ["Request “rid\\-00000” is hidden by the filters in the sidebar."]
    assert 'class="mg-card"' not in shown(at)
    at.multiselect(key="policy_box").set_value([]).run()
    assert not at.warning
    assert 'class="mg-card"' in shown(at)


def test_logits_and_bounds_are_written_by_one_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's and the browser's rounding make two numbers of 0.015625, unless both are asked for six digits.

    And the browser rounds a bound to the nearest: it gets it rounded up to the places that it shows.
    """
    write_run(tmp_path / "a", SyntheticSpec(requests=24, tokens=80, mix=("always", "gate"), perturbation=0.3))
    write_run(tmp_path / "b", SyntheticSpec(requests=24, tokens=80, policy="log", live=True))
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["run"], at.query_params["other"], at.query_params["step"] = "a", "b", "3"
    seen = set()
    for page in PAGES.values():
        at.switch_page(page).run()
        for table in at.dataframe:
            settings = json.loads(table.proto.columns)
            for name, column in table.value.items():
                if not pd.api.types.is_float_dtype(column.dtype):
                    continue
                form = settings.get(name, {}).get("type_config", {}).get("format")
                if re.search(r"margin|threshold|from the sample", str(name)):
                    seen.add(str(name))
                    assert form == "%.6g", f"{page}: {name}"
                if "at most" in str(name):
                    seen.add(str(name))
                    assert form == "%.4f%%", f"{page}: {name}"
                    known = column.dropna().to_numpy()
                    assert known * 1e4 == pytest.approx((known * 1e4).round(), abs=1e-5), f"{page}: {name}"
    assert {"margin", "threshold", "lowest margin", "margin_a", "from the sample", "missed at most (95%)"} <= seen
    assert "differ at most (95%)" in seen


def test_untrusted_text_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every field that users, models or other writers fill, and in the run's own name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    attack = '<img src=x onerror="alert(1)">'
    run = write_run(tmp_path / "<img src=x>", SyntheticSpec(requests=6, tokens=40, policy="always", perturbation=0.5))
    for file in run.glob("*.parquet"):
        table = pq.read_table(file)
        for name in ("token_text", "prompt_text", "request_id", "dataset", "guarantee_note", "finish_reason", "repair"):
            if name in table.column_names:
                index = table.column_names.index(name)
                table = table.set_column(index, name, pa.array([attack] * table.num_rows))
        pq.write_table(table, file)
    layers = [{"name": attack, "shape": [8, 8], "count": 1, "classes": [[1, 4, attack]]}]
    rewrite_manifest(
        run, model=attack, device=attack, policy=attack, notes=[attack], live=attack,
        self_test={"passed": False, "broken_layer": attack},
        invariance={"decode_ok": True, "decode_rows": attack, "prefill": attack, "map": {"layers": layers}},
    )  # fmt: skip
    marks = [{"request": 1, "step": 3, "text": attack}, {"request": 1, "step": None, "text": attack}]
    (run / "notes.json").write_text(json.dumps({"note": attack, "tags": [attack], "marks": marks}))
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["timeline"] = "true"
    for page in PAGES.values():
        at.query_params["step"] = "3"
        at.switch_page(page).run()
        assert not at.exception
        assert not at.error
        assert "<img" not in shown(at)
        assert [
            m.value for m in [*at.markdown, *at.caption, *at.warning] if re.search(r"(?<!\\)<img", m.value)
        ] == [], page
        for chart in at.get("plotly_chart"):
            spec = json.loads(chart.proto.spec)
            assert "<img" not in json.dumps({"layout": spec["layout"], "data": spec["data"]}), page


def test_the_threshold_slider_takes_effect_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", SyntheticSpec(requests=12, tokens=100, policy="always"))
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("margins.py").run()
    before = at.dataframe[0].value["would trigger"].sum()
    at.slider(key="tau").set_value(0.125).run()
    after = at.dataframe[0].value["would trigger"].sum()
    assert 0 < after < before
    assert "0.125" in shown(at)


def test_the_dataset_filter_changes_every_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_runs(tmp_path)
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("overview.py").run()
    assert set(at.dataframe[0].value["dataset"]) == {"arith", "code", "story"}
    at.multiselect(key="dataset_box").set_value(["code"]).run()
    assert at.dataframe[0].value["dataset"].tolist() == ["code"]


def test_a_long_answer_is_turned_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", SyntheticSpec(requests=1, tokens=2400, slots=1, policy="always", seed=5))
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("request.py").run()

    def first() -> int:
        return int(re.findall(r'data-step="(\d+)"', shown(at))[0])

    def press(label: str) -> None:
        next(b for b in at.button if b.label == label).click().run()

    assert first() == 0
    press("Later tokens")
    assert first() == 800
    press("Earlier tokens")
    assert first() == 0
    del at.query_params["tokens"]
    at.query_params["step"] = "900"
    at.run()
    assert first() == 800, "a selected step brings its own page"
    press("Earlier tokens")
    assert first() == 0
    assert "".join(at.query_params["tokens"]) == "0", "the page of tokens stands in the address"
    at.number_input[0].set_value(1300).run()
    assert first() == 800
    assert "tokens" not in at.query_params
    at.selectbox(key="tokens_box").set_value(0).run()
    assert (first(), "".join(at.query_params["tokens"])) == (0, "0")
    for asked, shown_first in (("800", 800), ("799", 0), ("999999", 800), ("x", 0), ("-1", 0)):
        linked = open_app(tmp_path, monkeypatch).run()
        linked.query_params["tokens"] = asked
        linked.switch_page("request.py").run()
        assert int(re.findall(r'data-step="(\d+)"', shown(linked))[0]) == shown_first, asked


def test_what_is_found_by_id_stands_in_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", SyntheticSpec(requests=24, tokens=40))
    at = open_app(tmp_path, monkeypatch).run()
    for key, value in (("request", "rid-00004"), ("step", "7")):
        at.query_params[key] = value
    at.switch_page("request.py").run()
    at.text_input(key="find").set_value("rid-0001").run()
    box = at.selectbox(key="request_box")
    assert len(box.options) == 10
    assert box.value in range(11, 21)
    assert "".join(at.query_params["find"]) == "rid-0001"
    assert not {"request", "step"} & set(at.query_params), "it names a request that is not shown any more"
    linked = open_app(tmp_path, monkeypatch).run()
    linked.query_params["find"] = "rid-0001"
    linked.switch_page("request.py").run()
    assert linked.text_input(key="find").value == "rid-0001"
    assert linked.selectbox(key="request_box").value == box.value
    assert linked.selectbox(key="request_box").options == box.options
    linked.query_params["request"] = "rid-00004"
    linked.run()
    assert linked.selectbox(key="request_box").value == 5, "the address says which one is shown"
    linked.text_input(key="find").set_value("").run()
    assert linked.selectbox(key="request_box").value == 5
    assert "find" not in linked.query_params


def test_another_order_leads_to_its_own_first_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    run = write_run(tmp_path / "a", SyntheticSpec(requests=12, tokens=40))
    rows = pd.concat([pq.read_table(f).to_pandas() for f in run.glob("requests-*.parquet")])
    slowest = int(rows.sort_values("e2e_ms")["request"].iloc[-1])
    other = int(rows["request"][rows["request"] != slowest].iloc[0])
    at = open_app(tmp_path, monkeypatch).run()
    at.query_params["request"], at.query_params["number"] = f"rid-{other - 1:05d}", str(other)
    at.query_params["order"] = "slowest"
    at.switch_page("request.py").run()
    assert at.selectbox(key="request_box").value == other, "what the address names stays"
    next(b for b in at.button if b.label.startswith("Go to the first by")).click().run()
    assert at.selectbox(key="request_box").value == slowest
    assert "request" not in at.query_params


@pytest.mark.parametrize(("page", "param"), [("requests", "picked"), ("latency", "worst")])
def test_a_picked_request_stands_in_the_address(
    page: str, param: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", SyntheticSpec(requests=6, tokens=40, policy="always"))
    at = open_app(tmp_path, monkeypatch).run()

    def opens() -> list[str]:
        return [link.proto.label for link in at.get("page_link") if link.proto.label.endswith("in Request")]

    at.switch_page(f"{page}.py").run()
    assert not opens()
    for asked, labels in (("3", ["Open rid\\-00002 in Request"]), ("999", []), ("<b>", [])):
        at.query_params[param] = asked
        at.run()
        assert not at.exception
        assert opens() == labels, asked


def test_a_live_run_tells_its_newest_flips_and_a_closed_one_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SyntheticSpec(requests=12, tokens=80, policy="always", live=True)
    write_run(tmp_path / "a", spec)
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("overview.py").run()
    assert len(with_column(at, "fast token")[0]) == 8
    rewrite_manifest(tmp_path / "a", closed_at="2026-01-05T09:05:00+00:00")
    at.run()
    assert not with_column(at, "fast token")


def test_an_annotation_is_kept_listed_and_shown_beside_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = "<img src=x> seen with a [batch](http://e) of 7"
    two_runs(tmp_path)
    (tmp_path / "b" / "notes.json").write_text(json.dumps({"note": "n", "tags": ["t"]}))
    at = open_app(tmp_path, monkeypatch).run()
    for key, value in (("run", "b"), ("request", "rid-00004"), ("step", "7")):
        at.query_params[key] = value
    at.switch_page("request.py").run()
    next(t for t in at.text_input if t.label == "Words").set_value(attack)
    at.button[[b.label for b in at.button].index("Save")].click().run()
    assert not at.exception
    found = json.loads((tmp_path / "b" / "notes.json").read_text())
    assert found == {"note": "n", "tags": ["t"], "marks": [{"request": 5, "step": 7, "text": attack}]}
    at.switch_page("overview.py").run()
    row = with_column(at, "annotation")[0].iloc[0]
    assert (row["number"], row["request"], row["step"], row["annotation"]) == (5, "rid-00004", 7, attack)
    assert "number=5" in row["open"]
    at.switch_page("requests.py").run()
    said = with_column(at, "annotation")[0].set_index("number")["annotation"]
    assert said[5] == f"step 7: {attack}"
    assert said.drop(5).isna().all()
    at.switch_page("request.py").run()
    next(t for t in at.text_input if t.label == "Words").set_value("")
    at.button[[b.label for b in at.button].index("Save")].click().run()
    assert json.loads((tmp_path / "b" / "notes.json").read_text())["marks"] == []


def test_an_annotation_that_cannot_be_saved_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_run(tmp_path / "a", SMALL)
    monkeypatch.setattr("margingate_dashboard.facts.notes.write_note", full)
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("request.py").run()
    next(t for t in at.text_input if t.label == "Words").set_value("x")
    at.button[[b.label for b in at.button].index("Save")].click().run()
    assert "No space left on device" in at.error[0].value


@pytest.mark.parametrize("where", ["margingate_dashboard.whatif.outcome", "margingate_dashboard.whatif.make_sample"])
def test_even_a_bug_shows_one_line(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    write_run(tmp_path / "a", SMALL)
    monkeypatch.setattr(where, broken)
    at = open_app(tmp_path, monkeypatch).run()
    at.switch_page("margins.py").run()
    assert not at.exception
    assert "could not be shown" in at.error[0].value


def test_runs_and_overview_count_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Path(__file__).resolve().parents[2] / "traces" / "sample"
    if sample.is_dir():
        shutil.copytree(sample, tmp_path / "a")
    else:
        write_run(tmp_path / "a", SMALL)
    at = open_app(tmp_path, monkeypatch).run()
    listed = tables(at, "open")[0].iloc[0]
    at.switch_page("overview.py").run()
    table = tables(at, "dataset")[0]
    table = table[table["policy"] == listed["rates of"]]
    assert listed["decode steps"] == table["decode steps"].sum()
    assert listed["triggers"] == table["low margins"].sum()
    assert listed["flips"] == table["flips"].sum()
