"""Several passes of one verify, without a model: each job gets its newest row's answer, and its own column's change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_margingate.runtime.verifier import KvAccess, Verifier, VerifyJob, best_five

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


class Engine:
    """A row's logits peak at its token; its pass adds (layer + 1) times its position / 100 to its K column."""

    device = "cpu"

    def __init__(self, pool: Pool, table: torch.Tensor, rows: int) -> None:
        self.pool, self.table, self.kv, self.rows = pool, table, KvAccess.of(pool), rows
        self.buffer = torch.empty(rows, VOCAB)

    def prepare(self, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
        assert len(tokens) == self.rows
        slots = self.table[torch.tensor(pools), torch.tensor(positions)].long()
        slots[real:] = 0
        return SimpleNamespace(out_cache_loc=slots, positions=torch.tensor(positions), tokens=torch.tensor(tokens))

    def run(self, batch: Any) -> torch.Tensor:
        for layer in range(LAYERS):
            change = (layer + 1) * batch.positions[:, None, None] / 100
            self.pool.k[layer][batch.out_cache_loc] += change
        # Every pass writes the same buffer, as a CUDA graph does.
        return self.buffer.copy_(torch.nn.functional.one_hot(batch.tokens, VOCAB).float())


@pytest.mark.parametrize("m", [4, 5, 64])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 1, 4, 2], [9], [1, 7, 1], [4, 4], [1] * 9])
def test_answers_and_changes_belong_to_their_jobs(m: int, lengths: list[int]) -> None:
    slots = len(lengths) * TABLE + 1
    table = 1 + torch.randperm(slots - 1, generator=torch.Generator().manual_seed(1)).view(len(lengths), TABLE)
    pool = Pool(slots)
    verifier = Verifier(Engine(pool, table, m), m)
    jobs = [
        VerifyJob(r, [(r + 5 + k, 10 * r % VOCAB + k) for k in range(n)], shadow=r % 2 == 1)
        for r, n in enumerate(lengths)
    ]
    was = pool.k.clone()
    result = verifier.verify(jobs)
    assert result.passes == verifier.counters.passes >= -(-sum(lengths) // m)
    assert result.rows == sum(lengths)
    assert result.logits.argmax(1).tolist() == [job.rows[-1][1] for job in jobs]
    for job, delta in zip(jobs, result.kv_delta):
        position = job.rows[-1][0]
        assert delta == pytest.approx((position / 100, 2 * position / 100), rel=1e-3)
        own = table[job.pool_index, [p for p, _ in job.rows]]
        changed = (pool.k[:, own] != was[:, own]).any()
        assert bool(changed) is not job.shadow, "a shadow verify puts its columns back"


def test_what_audits_stage_is_bounded() -> None:
    """64 audited windows of M columns would otherwise stage gigabytes outside SGLang's memory."""
    requests, m = 6, 4
    slots = requests * TABLE + 1
    table = 1 + torch.arange(slots - 1).view(requests, TABLE)
    engine = Engine(Pool(slots), table, m)
    staged: list[int] = []
    columns, original = engine.kv.columns, engine.kv.columns.staging

    def staging(count: int) -> torch.Tensor:
        staged.append(count)
        return original(count)

    columns.staging = staging  # type: ignore[method-assign]
    jobs = [VerifyJob(r, [(r + k, k) for k in range(1, 4)], shadow=r != 2) for r in range(requests)]
    result = Verifier(engine, m).verify(jobs)
    assert max(staged) <= m
    assert sum(staged) == 5 * 3
    assert result.logits.argmax(1).tolist() == [3] * requests
    assert result.rows == requests * 3


def test_the_best_five_stand_in_the_order_of_argmax() -> None:
    logits = torch.zeros(2, 40)
    logits[0, [7, 3, 30]] = 2.0
    logits[1] = torch.arange(40.0)
    tied, rising = best_five(logits)
    assert tied[0][:3] == [3, 7, 30]
    assert tied[0][0] == int(logits[0].argmax())
    assert rising[0] == [39, 38, 37, 36, 35]
    assert rising[1][0] - rising[1][4] == pytest.approx(4.0, abs=1e-4)


def test_columns_are_read_and_written_layer_by_layer() -> None:
    buffers = {("k", layer): torch.arange(8.0).view(4, 2) + 10 * layer for layer in (3, 4)}
    buffers |= {("v", layer): torch.arange(8.0).view(4, 2) + 100 * layer for layer in (3, 4)}
    pool = SimpleNamespace(
        start_layer=3, layer_num=2, get_key_buffer=lambda layer: buffers["k", layer],
        get_value_buffer=lambda layer: buffers["v", layer],
    )  # fmt: skip
    access, slots = KvAccess.of(pool), torch.tensor([2, 0])
    assert list(access.layers) == [3, 4]
    read = access.read(slots)
    wanted = [buffers[kind, layer][[2, 0]] for layer in (3, 4) for kind in ("k", "v")]
    assert [column.tolist() for column in read] == [column.tolist() for column in wanted]
    access.write(slots, [column + 1 for column in read])
    assert [column.tolist() for column in access.read(slots)] == [(column + 1).tolist() for column in wanted]
    assert buffers["k", 3][1].tolist() == [32.0, 33.0], "other slots are left alone"


def test_a_pass_is_padded_with_rows_that_write_slot_0() -> None:
    asked: list[tuple[Any, ...]] = []
    engine: Any = SimpleNamespace(
        kv=None, prepare=lambda *batch: asked.append(batch), run=lambda _: torch.arange(8.0).view(4, 2)
    )
    verifier = Verifier(engine, 4)
    assert verifier.forward([7, 8], [5, 6], [50, 60]).tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert asked == [([7, 8, 0, 0], [5, 6, 0, 0], [50, 60, 0, 0], 2)]
    assert (verifier.counters.passes, verifier.counters.rows, verifier.counters.padded_rows) == (1, 2, 2)
    with pytest.raises(ValueError, match=r"^5 rows do not fit a pass of 4$"):
        verifier.forward([1] * 5, [1] * 5, [1] * 5)
