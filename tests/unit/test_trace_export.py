"""Exports of a run: CSV and Chrome trace."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from sglang_margingate.trace import Run, TraceError, TraceWriter, export_chrome_trace, export_csv, read_run
from sglang_margingate.trace.export import chrome_events, harmless


@pytest.fixture
def run(tmp_path: Path) -> Run:
    base = {"dataset": "arith", "margin": 0.5, "threshold": float("nan"), "batch_rows": 2, "prefill": False}
    rows = []
    for number, rid, at in ((1, "a", 100.0), (2, "b", 100.005)):
        base = {**base, "request": number}
        rows.append({**base, "request_id": rid, "step": 0, "time": at, "prefill": True, "step_ms": 10.0})
        rows.append({**base, "request_id": rid, "step": 1, "time": at + 0.004, "step_ms": 4.0})
        flip = {"verify_ms": 2.0, "flipped": True, "repaired": True, "reason": "margin", "verify_token": 3}
        rows.append({**base, "request_id": rid, "step": 2, "time": at + 0.010, "step_ms": 5.0, **flip, "hold_ms": 1.0})
    names = sorted({k for r in rows for k in r})
    with TraceWriter(tmp_path, {"model": "m"}) as w:
        w.add_steps({n: [r.get(n) for r in rows] for n in names})
        w.add_request({"request": 1, "request_id": "a", "time": 99.985, "output_tokens": 3})
    return read_run(w.path)


def test_csv(run: Run, tmp_path: Path) -> None:
    files = export_csv(run, tmp_path / "out" / "csv")
    back = pd.read_csv(files[0])
    assert list(back.columns) == list(run.steps.columns)
    assert back["step"].tolist() == [0, 1, 2, 0, 1, 2]
    assert pd.read_csv(files[1])["request_id"].tolist() == ["a"]


def test_a_cell_that_a_spreadsheet_would_run_is_text(run: Run, tmp_path: Path) -> None:
    attacks = ['=HYPERLINK("http://x")', "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "plain", None]
    columns = {
        "text": pd.array(attacks, dtype="str"),
        "object": attacks,
        "category": pd.Categorical(attacks),
        "number": [-1.5] * len(attacks),
    }
    found = harmless(pd.DataFrame(columns))
    for name in ("text", "object", "category"):
        assert [None if pd.isna(v) else v for v in found[name]] == [f"'{a}" for a in attacks[:6]] + ["plain", None]
    assert found["number"].tolist() == columns["number"]
    run.requests["request_id"] = "=cmd|' /C calc'!A0"
    run.steps["request_id"] = pd.Categorical(["=1"] * len(run.steps))
    for file in export_csv(run, tmp_path / "out"):
        assert pd.read_csv(file)["request_id"].str.startswith("'=").all()


def test_two_requests_with_one_id_have_a_track_each(run: Run, tmp_path: Path) -> None:
    run.steps["request_id"] = pd.Categorical(["same"] * len(run.steps))
    events = json.loads(export_chrome_trace(run, tmp_path / "t.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert [n for n in names if "held" not in n] == ["same (request 1)", "same (request 2)"]


def test_chrome_trace(run: Run, tmp_path: Path) -> None:
    file = export_chrome_trace(run, tmp_path / "trace.json")
    events = json.loads(file.read_text())["traceEvents"]
    names = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    assert set(names) == {"a", "a (held)", "b", "b (held)"}
    track = [e for e in events if e["ph"] == "X" and e["tid"] == names["a"]]
    assert [(e["name"], e["ts"], e["dur"]) for e in track] == [
        ("prefill", 5_000.0, 10_000.0),
        ("decode", 15_000.0, 4000.0),
        ("decode", 20_000.0, 3000.0),
        ("verify", 23_000.0, 2000.0),
    ]
    assert next(e["ts"] for e in events if e["name"] == "arrived") == 0.0, "before its first slice, at its own time"
    assert track[3]["args"]["flipped"] is True
    assert [e["dur"] for e in events if e["ph"] == "X" and e["tid"] == names["a (held)"]] == [1000.0]
    assert sum(e["name"] == "flip" for e in events) == 2
    assert all(e["ts"] >= 0 for e in events if "ts" in e)


def test_waiting_for_a_companions_verify_is_no_verify(run: Run, tmp_path: Path) -> None:
    run.steps["reason"] = "none"
    events = json.loads(export_chrome_trace(run, tmp_path / "t.json").read_text())["traceEvents"]
    assert not any(e["name"] == "verify" for e in events)
    assert any(e["name"] == "wait for others' verify" for e in events)


def test_chosen_requests_and_an_empty_run(run: Run, tmp_path: Path) -> None:
    file = export_chrome_trace(run, tmp_path / "trace.json", request_ids=["b"])
    assert '"name": "a"' not in file.read_text()
    run.steps = run.steps.iloc[:0]
    assert len(json.loads(export_chrome_trace(run, tmp_path / "none.json").read_text())["traceEvents"]) == 1


def test_missing_columns_and_bad_path(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="cannot write"):
        export_chrome_trace(run, tmp_path / "file" / "x.json")
    with pytest.raises(TraceError, match="cannot write CSV"):
        export_csv(run, tmp_path / "file")
    run.steps = run.steps.drop(columns=["step_ms"])
    with pytest.raises(TraceError, match="'step_ms'"):
        export_chrome_trace(run, tmp_path / "x.json")


def test_every_event_of_a_request_field_by_field(run: Run) -> None:
    """Perfetto shows what has these names and nothing else, and is silent about the rest."""
    shown = {"token": None, "margin": 0.5, "threshold": None, "reason": None, "batch_rows": 2}
    last = {**shown, "step": 2, "reason": "margin"}
    verified = {**last, "flipped": True, "repaired": True}

    def slice_(name: str, tid: int, ts: float, dur: float, args: dict[str, object]) -> dict[str, object]:
        return {"ph": "X", "pid": 1, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args}

    def mark(name: str, ts: float, args: dict[str, object]) -> dict[str, object]:
        return {"ph": "i", "s": "t", "pid": 1, "tid": 2, "name": name, "ts": ts, "args": args}

    assert list(chrome_events(run, ["a"])) == [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": run.path.name}},
        {"ph": "M", "pid": 1, "tid": 2, "name": "thread_name", "args": {"name": "a"}},
        {"ph": "M", "pid": 1, "tid": 3, "name": "thread_name", "args": {"name": "a (held)"}},
        mark("arrived", 0.0, {}),
        slice_("prefill", 2, 5_000.0, 10_000.0, {**shown, "step": 0}),
        slice_("decode", 2, 15_000.0, 4_000.0, {**shown, "step": 1}),
        slice_("decode", 2, 20_000.0, 3_000.0, last),
        slice_("verify", 2, 23_000.0, 2_000.0, verified),
        mark("flip", 25_000.0, verified),
        slice_("hold", 3, 25_000.0, 1_000.0, {"step": 2}),
    ]
    assert [e["tid"] for e in chrome_events(run) if e["name"] == "thread_name"] == [2, 3, 4, 5]


def test_times_are_thousandths_of_a_microsecond_and_slices_never_overlap(run: Run) -> None:
    run.steps["step_ms"] = [10.0, 9.0, 5.0] * 2  # the second step says it began before the first had ended
    run.steps["verify_ms"] = [0.0, 0.0, 1.23456789] * 2
    track = [e for e in chrome_events(run, ["a"]) if e["ph"] == "X" and e["tid"] == 2]
    assert [(e["ts"], e["dur"]) for e in track] == [
        (5_000.0, 10_000.0), (15_000.0, 4_000.0), (20_000.0, 3_765.432), (23_765.432, 1_234.568),
    ]  # fmt: skip
    run.steps["verify_ms"] = [0.0, 0.0, 50.0] * 2
    track = [e for e in chrome_events(run, ["a"]) if e["ph"] == "X" and e["tid"] == 2]
    assert [(e["ts"], e["dur"]) for e in track[2:]] == [(20_000.0, 0.0), (20_000.0, 5_000.0)], (
        "a verify is part of its step"
    )


def test_an_arrival_after_the_first_slice_is_marked_where_it_was(run: Run) -> None:
    run.requests["time"] = run.requests["time"] + pd.Timedelta(milliseconds=10)
    assert next(e["ts"] for e in chrome_events(run) if e["name"] == "arrived") == 5_000.0
    run.requests = run.requests.drop(columns=["time"])
    assert not [e for e in chrome_events(run) if e["name"] == "arrived"]


def test_a_step_that_was_neither_held_nor_timed_has_no_second_track(run: Run) -> None:
    run.steps = run.steps.assign(hold_ms=float("nan"), step_ms=float("nan"), verify_ms=float("nan"))
    events = list(chrome_events(run, ["b"]))
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"] == ["b"]
    assert [e["dur"] for e in events if e["ph"] == "X"] == [0.0, 0.0, 0.0]


def test_folders_are_made_and_files_written_over(run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        assert export_chrome_trace(run, tmp_path / "a" / "b" / "t.json").exists()
        assert all(file.exists() for file in export_csv(run, tmp_path / "c" / "d"))


def test_tracks_are_in_the_order_in_which_requests_began(run: Run) -> None:
    run.steps = pd.concat([run.steps[run.steps["request"] == 2], run.steps[run.steps["request"] == 1]])
    names = [
        e["args"]["name"] for e in chrome_events(run) if e["name"] == "thread_name" and "held" not in str(e["args"])
    ]
    assert names == ["b", "a"]
