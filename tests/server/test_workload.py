"""``margingate bench --workload`` with real servers on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_margingate.cli import main


def test_closed_load_on_stock_and_canonical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.json"
    words = [
        "bench",
        "--workload",
        "closed:8,sessions:3:2:40",
        "--requests",
        "12",
        "--max-tokens",
        "24",
        "--repeats",
        "2",
    ]
    words += ["--modes", "stock,canonical", "--goodput", "60000:60000", "--trace-dir", str(tmp_path / "traces")]
    assert main([*words, "-o", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["complete"]
    cells = {(c["mode"], c["load"]): c for c in found["cells"]}
    assert list(cells) == [(m, load) for load in ("closed:8", "sessions:3:2:40") for m in ("stock", "canonical")]
    for load in ("closed:8", "sessions:3:2:40"):
        ours, stock = cells["canonical", load], cells["stock", load]
        assert ours["identical"] == ours["promised"] == {"numerator": 24, "denominator": 24}
        assert stock["identical"]["denominator"] == 24
        assert stock["promised"]["denominator"] == 0
        assert len(ours["ratio_to_first"]) > 5
        for cell in (ours, stock):
            assert cell["batches"]["largest"] >= 3, "batches formed"
            for r in cell["rounds"]:
                assert r["requests"] == 12
                assert r["goodput"] == 1.0
                assert r["decode_steps"] > 0
                assert "gpu_busy" not in r
    assert max(r["cached_tokens"] for r in cells["stock", "sessions:3:2:40"]["rounds"]) > 0
    assert found["alone"]["canonical"]["batches"] | {"by_rows": 0} == {
        "source": "/margingate/status batch_rows", "unit": "steps", "largest": 1, "by_rows": 0
    }  # fmt: skip
    assert found["alone"]["canonical"]["cached_tokens"] == 0
    assert found["servers"]["stock"]["pool_tokens"] == 65536
    capsys.readouterr()
    words = ["bench", "--workload", "closed:70", "--requests", "70", "--modes", "stock", "-o", str(out)]
    assert main([*words, "--", "--max-running-requests", "8"]) == 2
    assert "the server stock runs at most 8 requests at once; ask for 8" in capsys.readouterr().err
