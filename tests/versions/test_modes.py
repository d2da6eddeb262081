"""What the gate leaves to others, on every tested SGLang: without it the test fails, the fast path alone passes, retraction."""

from __future__ import annotations

from pathlib import Path

import pytest
from served_versions import CONCURRENCY, PROMPTS, TOKENS, VERSIONS, identical, serving

from sglang_margingate.bench.servers.client import Prompt, run_alone, run_together

versions = pytest.mark.parametrize("version", VERSIONS)


@versions
def test_without_a_gate_answers_depend_on_the_batch(version: str, prompts: list[Prompt], tmp_path: Path) -> None:
    with serving(version, "--margingate-policy", "log", log=tmp_path / "server.log") as server:
        alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
        server.client.flush_cache()
        together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
        same = identical(f"SGLang {version} log, together", alone, together)
    if same == PROMPTS:  # this CPU's kernels may not flip by themselves: inject what others do
        flags = ["--margingate-policy", "log"]
        with serving(
            version, *flags, log=tmp_path / "flips" / "server.log", MARGINGATE_TEST_FLIP_RATE="0.01"
        ) as server:
            together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
        same = identical(f"SGLang {version} log with injected flips, together", alone, together)
    assert same < PROMPTS
    assert {c.margingate["guarantee"] for c in together} == {"none"}
    assert sum(c.margingate["verified"] for c in together) == 0


@versions
def test_the_canonical_fast_path_needs_no_verify(version: str, prompts: list[Prompt], tmp_path: Path) -> None:
    flags = ["--margingate-policy", "gate", "--margingate-fast-path", "canonical"]
    with serving(version, *flags, log=tmp_path / "server.log") as server:
        alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
        server.client.flush_cache()
        together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
        warm = run_together(server.client, prompts[::-1], CONCURRENCY, max_new_tokens=TOKENS)[::-1]
        assert max(c.margingate["max_batch_rows"] for c in together) >= 8, "no batch formed, so the test proves nothing"
    assert identical(f"SGLang {version} canonical, together", alone, together) == PROMPTS
    assert identical(f"SGLang {version} canonical, warm and in reverse", alone, warm) == PROMPTS
    assert {c.margingate["guarantee"] for c in (*alone, *together, *warm)} == {"structural"}
    assert sum(c.margingate["verified"] for c in together) == 0


@versions
def test_a_retracted_request_goes_on_with_the_same_tokens(version: str, prompts: list[Prompt], tmp_path: Path) -> None:
    flags = ["--margingate-policy", "gate", "--margingate-fast-path", "stock", "--margingate-threshold", "0.5"]
    retract = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "12"}
    with serving(version, *flags, log=tmp_path / "server.log", **retract) as server:
        alone = run_alone(server.client, prompts, max_new_tokens=TOKENS)
        together = run_together(server.client, prompts, CONCURRENCY, max_new_tokens=TOKENS)
    assert sum(c.margingate["retractions"] for c in together) > 0, "nothing was retracted, so the test proves nothing"
    assert identical(f"SGLang {version} gate with retractions, together", alone, together) == PROMPTS
    assert {c.margingate["guarantee"] for c in together} == {"gated"}
