"""The dashboard's launcher and the report: flags, one-line errors, nothing said to anybody."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from synthetic_runs import SyntheticSpec, write_run

from sglang_margingate import dashboard, report


def test_it_binds_to_this_machine_and_reports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
    started: list[list[str]] = []

    def start(program: str, arguments: list[str], env: dict[str, str]) -> None:
        started.append(arguments)
        assert env["MARGINGATE_TRACE_DIR"] == str(tmp_path / "none yet")
        raise SystemExit(0)

    monkeypatch.setattr(dashboard.os, "execve", start)
    monkeypatch.setattr(dashboard.os, "name", "posix")
    with pytest.raises(SystemExit):
        dashboard.main(["--trace-dir", str(tmp_path / "none yet")])
    line = " ".join(started[0])
    assert "--server.address 127.0.0.1 --server.port 8501" in line
    assert "--browser.gatherUsageStats false" in line
    assert "--server.showEmailPrompt false" in line


@pytest.mark.parametrize("flags", [["--port", "0"], ["--port", "70000"], ["--trace-dir", __file__]])
def test_bad_flags_are_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("streamlit", reason="the dashboard's extra is not installed")
    assert dashboard.main(flags) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_without_streamlit_the_fix_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    assert dashboard.main([]) == 2
    message = capsys.readouterr().err
    assert "pip install 'sglang-margingate[dashboard]'" in message
    assert len(message.strip().splitlines()) == 1


def test_the_launcher_imports_neither_streamlit_nor_sglang() -> None:
    code = "import sys, sglang_margingate.dashboard, sglang_margingate.report; print([m for m in ('streamlit', 'sglang', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    pytest.importorskip("plotly", reason="the dashboard's extra is not installed")
    import synthetic_runs as synthetic

    return Path(
        synthetic.write_run(tmp_path / "traces" / "a", synthetic.SyntheticSpec(requests=8, tokens=60, perturbation=0.3))
    )


def test_the_report_is_one_file_that_loads_nothing(run: Path, tmp_path: Path) -> None:
    text = report.write_report(run, tmp_path / "deep" / "report.html").read_text()
    assert text.count("<script>/**\n* plotly.js") <= 1
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="?https?:', body)
    assert "Content-Security-Policy" in text
    for part in (
        "Trigger rate",
        "decode steps",
        "Guarantee",
        "Margins by dataset",
        "Flips",
        "Worst requests",
        "mg-strip",
    ):
        assert part in text
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["report.html"]


def test_the_report_counts_every_flip_and_says_of_what(tmp_path: Path) -> None:
    """Its table is cut off; its sentence is not, and counts steps where a flip can be seen."""
    from margingate_dashboard.tables import MOST_FLIPS

    spec = SyntheticSpec(requests=100, tokens=120, mix=("always", "log"), perturbation=3.0)
    run = write_run(tmp_path / "a", spec)
    steps = pd.concat([pq.read_table(f).to_pandas() for f in run.glob("steps-*.parquet")])
    decode = steps[~steps["prefill"]]
    flips, verified = int(decode["flipped"].sum()), int((decode["reason"].astype(str) != "none").sum())
    assert flips > MOST_FLIPS
    text = report.write_report(run, tmp_path / "r.html").read_text()
    assert f"{flips:,} confirmed flips in {verified:,} verified steps, highest margin first, first 300." in text


def test_two_runs_are_one_report_and_a_folder_is_a_bundle(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    for name, policy in (("a", "gate"), ("b", "log")):
        write_run(traces / name, SyntheticSpec(requests=12, tokens=40, policy=policy))
    text = report.write_report(traces / "a", tmp_path / "pair.html", traces / "b").read_text()
    for part in (
        "a (a) and b (b)",
        "Identical answers",
        "Matched requests",
        "policy a",
        "in ms",
    ):
        assert part in text
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="?https?:', body)
    (traces / "c").mkdir()
    (traces / "c" / "manifest.json").write_text('{"schema_version": "9.0"}')
    index = report.write_report(traces, tmp_path / "site")
    assert index.name == "index.html"
    assert sorted(p.name for p in index.parent.iterdir()) == ["a.html", "b.html", "index.html"]
    assert 'href="a.html"' in index.read_text()
    assert "9.0" in index.read_text(), "what could not be read is named"
    assert index.stat().st_size < 100_000, "an index carries no plotting library"
    assert report.main([str(traces), "-o", str(tmp_path / "x.html")]) == 2


def test_the_report_speaks_of_each_policy(tmp_path: Path) -> None:
    run = write_run(tmp_path / "m", SyntheticSpec(requests=24, tokens=40, mix=("log", "gate", "always"), sampled=2))
    text = report.write_report(run, tmp_path / "m.html").read_text()
    for part in (
        "Policy gate:",
        "By policy",
        "not observed",
        "Latency by policy",
        "Thresholds that this run would give",
    ):
        assert part in text
    assert re.search(r'<td class="n">[\d.]+%</td>', text), "percentages say so"
    assert re.search(r'<td class="n">[\d.]+ ms</td>', text)


def test_a_bound_in_the_report_is_rounded_up() -> None:
    from margingate_dashboard.report import parts

    text = parts.table(pd.DataFrame({"missed at most (95%)": [58.6331, 0.76905], "trigger rate": [58.6331, 0.76905]}))
    assert re.findall(r"([\d.]+)%<", text) == ["58.64", "58.63", "0.77", "0.77"]


def test_report_errors_are_one_line(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nothing")]) == 2
    assert report.main([str(run), "-o", str(run / "manifest.json" / "x.html")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_a_half_written_run_is_reported_with_a_note(run: Path, tmp_path: Path) -> None:
    last = sorted(run.glob("steps-*.parquet"))[-1]
    last.write_bytes(last.read_bytes()[:500])
    (run / "requests-0000.parquet").unlink()
    text = report.write_report(run, tmp_path / "r.html").read_text()
    assert "Note: " in text
    assert str(run.parent) not in text, "where it lay is nobody's business"


@pytest.mark.parametrize("manifest", ['{"totals": "x"}', "[1]", "", "{"])
def test_one_bad_manifest_among_many_costs_no_report(manifest: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the dashboard's extra is not installed")
    for name in ("a", "bad", "c"):
        write_run(tmp_path / "traces" / name, SyntheticSpec(requests=4, tokens=20))
    (tmp_path / "traces" / "bad" / "manifest.json").write_text(manifest)
    index = report.write_report(tmp_path / "traces", tmp_path / "out").read_text()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.html", "bad.html", "c.html", "index.html"]
    assert re.search(r"<td>bad</td><td>broken</td>", index)
    assert re.search(r"<td>a</td><td>closed</td>", index)
    two = report.write_report(tmp_path / "traces" / "a", tmp_path / "two.html", tmp_path / "traces" / "bad")
    assert "Matched requests" in two.read_text()
