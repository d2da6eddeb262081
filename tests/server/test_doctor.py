"""The doctor on real servers: what holds, and an ungated server that fails it."""

from __future__ import annotations

import json
from pathlib import Path

from sglang_margingate.bench.servers.process import Server
from sglang_margingate.cli import main


def test_a_canonical_server_beside_an_ungated_one(canonical_server: Server, log_server: Server, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    words = ["--base-url", canonical_server.base_url, "--control-url", log_server.base_url, "-o", str(out)]
    assert main(["doctor", *words, "--prompts", "18", "--max-tokens", "64", "--parts", "machine,identity,control"]) == 0
    document = json.loads(out.with_suffix(".json").read_text())
    parts = {part["part"]: part for part in document["parts"]}
    assert document["subject"]["name"] == "the embedded model, 7.6 M parameters"
    assert "self-test passed" in parts["ours"]["said"]
    assert parts["identity"]["details"]["guarantees"] == {"structural": 54}
    assert parts["identity"]["details"]["batches"]["largest"] >= 8
    assert parts["stock"]["said"].startswith("serves: policy log")
    assert parts["control"]["details"]["prompts"]["changed"] > 0
    assert "layers.0" in out.read_text(), "the map is part of the report"
