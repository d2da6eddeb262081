"""Several passes of one verify, without a model: each job gets its newest row's answer, and its own column's change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_margingate.serving.verifier import EagerVerifier, VerifyJob

LAYERS, TABLE = 2, 20
VOCAB = 64


class Pool:
    """K/V pool of two layers, one head of 8."""

    start_layer, layer_num = 0, LAYERS

    def __init__(self, slots: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k, self.v = (torch.randn(LAYERS, slots, 1, 8, generator=generator) for _ in range(2))

    def get_key_buffer(self, layer: int) -> torch.Tensor:
        return self.k[layer]

    def get_value_buffer(self, layer: int) -> torch.Tensor:
        return self.v[layer]


class Verifier(EagerVerifier):
    """A row's logits peak at its token; its pass adds (layer + 1) times its position / 100 to its K column."""

    def forward_batch(self, pool_indices: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
        assert len(tokens) == self.rows
        slots = self._slots_of(list(zip(pool_indices, positions)))
        slots[real:] = 0
        return SimpleNamespace(out_cache_loc=slots, positions=torch.tensor(positions), tokens=torch.tensor(tokens))

    def _run(self, batch: Any) -> Any:
        for layer in range(LAYERS):
            change = (layer + 1) * batch.positions[:, None, None] / 100
            self.model_runner.token_to_kv_pool.k[layer][batch.out_cache_loc] += change
        logits = torch.nn.functional.one_hot(batch.tokens, VOCAB).float()
        if not hasattr(self, "buffer"):
            self.buffer = torch.empty_like(logits)
        self.buffer.copy_(logits)  # every pass writes the same buffer, as a CUDA graph does
        return SimpleNamespace(next_token_logits=self.buffer)


@pytest.mark.parametrize("m", [4, 5, 64])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 4, 2], [9], [1, 7, 1], [4, 4], [1] * 9])
def test_answers_and_changes_belong_to_their_jobs(m: int, lengths: list[int]) -> None:
    slots = len(lengths) * TABLE + 1
    table = 1 + torch.randperm(slots - 1, generator=torch.Generator().manual_seed(1)).view(len(lengths), TABLE)
    pool = Pool(slots)
    runner = SimpleNamespace(
        token_to_kv_pool=pool, req_to_token_pool=SimpleNamespace(req_to_token=table), device="cpu"
    )  # fmt: skip
    verifier = Verifier(runner, m)
    jobs = [
        VerifyJob(r, [(r + 5 + k, 10 * r % VOCAB + k) for k in range(n)], shadow=r % 2 == 1)
        for r, n in enumerate(lengths)
    ]
    was = pool.k.clone()
    result = verifier.verify(jobs)
    assert result.passes == verifier.counters.passes == -(-sum(lengths) // m)
    assert result.rows == sum(lengths)
    assert result.logits.argmax(1).tolist() == [job.rows[-1][1] for job in jobs]
    for job, delta in zip(jobs, result.kv_delta):
        position = job.rows[-1][0]
        assert delta == pytest.approx((position / 100, 2 * position / 100), rel=1e-3)
        own = table[job.pool_index, [p for p, _ in job.rows]]
        changed = (pool.k[:, own] != was[:, own]).any()
        assert bool(changed) is not job.shadow, "a shadow verify puts its columns back"
