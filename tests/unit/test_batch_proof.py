"""What is said of batches: what was seen, and null where nothing was."""

from __future__ import annotations

from collections import Counter

from sglang_margingate.bench.servers.gauges import BatchProof


def test_without_a_sample_no_largest_batch_is_claimed() -> None:
    assert BatchProof("/metrics num_running_reqs", "samples").to_dict()["largest"] is None
    assert BatchProof().to_dict() == {"source": "", "unit": "steps", "largest": None, "by_rows": {}}


def test_the_largest_is_the_largest_seen() -> None:
    proof = BatchProof("x", by_rows=Counter({1: 4}))
    proof.add(BatchProof("x", by_rows=Counter({7: 2, 1: 1})))
    assert proof.to_dict() == {"source": "x", "unit": "steps", "largest": 7, "by_rows": {"1": 5, "7": 2}}
    assert (proof.total, proof.batched) == (7, 2)
