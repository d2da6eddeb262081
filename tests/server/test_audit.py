"""The audit's bound on missed flips is said aloud: log, metric, guarantee."""

from __future__ import annotations

import requests

from sglang_margingate.bench.servers.client import Prompt
from sglang_margingate.bench.servers.process import Server


def test_a_bound_above_the_limit_costs_the_guarantee_and_is_said(audit_server: Server, prompts: list[Prompt]) -> None:
    """So few audited steps cannot show so small a share, though none of them flipped; before any, nothing is shown at all."""
    done = [audit_server.client.generate(p, 16).margingate for p in prompts[:3]]
    metrics = requests.get(audit_server.base_url + "/metrics", timeout=300).text
    assert sum(d["audited"] for d in done) > 0
    assert [d["guarantee"] for d in done] == ["none"] * 3
    assert all("--margingate-max-miss" in d["guarantee_note"] for d in done)
    assert audit_server.log_path.read_text().count("claim no guarantee") == 1
    assert "margingate_missed_bound{" in metrics
