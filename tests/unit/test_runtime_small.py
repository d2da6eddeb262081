"""Name spaces of the radix cache, and the faults that tests put in."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch

from sglang_margingate.config import ConfigError, MarginGateConfig, Policy, Radix
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.runtime import faults
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.namespaces import namespace, opened_gated, uses_backend
from sglang_margingate.runtime.prefill import PrefillRules

# ---- name spaces --------------------------------------------------------------------------------------------------------


def test_name_spaces_keep_apart_what_must_not_share() -> None:
    names = {
        namespace(True, None), namespace(False, None), namespace(True, "key"), namespace(False, "key"),
        namespace(True, None, "lora"), namespace(True, None, None, 1), namespace(True, '["gated", 0, null, null]'),
    }  # fmt: skip
    assert len(names) == 7
    assert {name for name in names if opened_gated(name)} == {n for n in names if n.startswith('["gated"')}
    assert namespace(False, None, None, 1) == namespace(False, None), "ungated columns are shared as SGLang does"
    assert namespace(True, "keylora", "lora") == '["gated", 0, "lora", "key"]'
    assert namespace(True, "") == namespace(True, None) == '["gated", 0, null, null]'
    assert namespace(False, None, None, 1) == '["ungated", 0, null, null]'
    assert not opened_gated(None)


def test_which_configurations_bring_a_radix_cache() -> None:
    assert uses_backend(MarginGateConfig(radix=Radix.CANONICAL))
    assert uses_backend(MarginGateConfig(radix=Radix.PROMPT_ONLY))
    assert not uses_backend(MarginGateConfig(radix=Radix.OFF))
    assert not uses_backend(MarginGateConfig(policy=Policy.LOG))


# ---- faults -------------------------------------------------------------------------------------------------------------


def test_faults_are_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TestKnobs().active == []
    monkeypatch.setenv("MARGINGATE_TEST_POISON", "3")
    monkeypatch.setenv("MARGINGATE_TEST_SHARE", "1")
    knobs = TestKnobs()
    assert knobs.active == ["poison_every", "trigger_by_share"]
    assert knobs.changes_steps
    assert [step for step in range(10) if knobs.corrupts(step, 1)] == [3, 6, 9]
    monkeypatch.setenv("MARGINGATE_TEST_POISON", "often")
    with pytest.raises(ConfigError, match=r"^MARGINGATE_TEST_POISON: 'often' is not a number$"):
        TestKnobs()


def test_flips_are_drawn_where_there_is_a_batch() -> None:
    knobs = TestKnobs(flip_rate=0.5)
    assert not any(knobs.corrupts(step, 1) for step in range(100))
    assert 20 < sum(knobs.corrupts(step, 2) for step in range(100)) < 80
    assert TestKnobs(flip_rate=1.0).corrupts(0, 2)
    assert not TestKnobs(poison_every=3).corrupts(0, 2), "the prefill's token is left alone"
    assert [TestKnobs(only_rank=name).hits(1) for name in ("", "0", "1")] == [True, False, True]
    drawn = [TestKnobs().draws("r", step, 0.25) for step in range(400)]
    assert 60 < sum(drawn) < 140
    assert drawn == [TestKnobs().draws("r", step, 0.25) for step in range(400)]


class Pool:
    """Two layers' columns of four slots."""

    def __init__(self) -> None:
        self.columns = [torch.arange(8.0).view(4, 2), torch.ones(4, 2)]

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        return [column[slots] for column in self.columns]

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        for own, given in zip(self.columns, columns):
            own[slots] = given


def test_a_spoilt_row_chooses_its_runner_up_and_writes_another_column() -> None:
    logits, pool = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]]), Pool()
    before = [column.clone() for column in pool.columns]
    greedy = SimpleNamespace(draw=None)
    rows = [SimpleNamespace(index=k, step=3 + k, state=greedy) for k in range(2)]
    faults.spoil(TestKnobs(poison_every=3), rows, logits, torch.tensor([2, 0]), pool)
    assert logits.argmax(-1).tolist() == [2, 0]
    assert 0 < logits[0, 2] - logits[0, 1] < 1e-6
    for column, was in zip(pool.columns, before):
        assert (column - was).tolist() == [[0, 0], [0, 0], [0.25, 0.25], [0, 0]]
    faults.spoil(TestKnobs(poison_every=3), rows[:1], logits, None, pool)
    faults.spoil(TestKnobs(poison_every=3), rows[:1], logits, torch.tensor([2, 0]), None)
    assert logits.argmax(-1).tolist() == [2, 0], "twice swapped and swapped back"


def test_a_digest_is_that_of_the_columns_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, slots = Pool(), torch.tensor([3, 1])
    wanted = hashlib.sha256(b"".join(column[slots].numpy().tobytes() for column in pool.columns)).hexdigest()
    assert faults.column_digest(pool, slots) == wanted
    assert not faults.wants_digest()
    monkeypatch.setenv("MARGINGATE_KV_DIGEST", "1")
    assert faults.wants_digest()


def test_faults_of_layers_attention_and_sums_change_what_they_should() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    reduce = faults.split_reduce(lambda part: part.clone(), 2)
    assert torch.equal(reduce(x), x), "more rows than the fault has"
    assert torch.equal(reduce(x[0]), x[0])
    torch.testing.assert_close(reduce(x[:2]), x[:2], rtol=2e-2, atol=2e-2)

    backend = SimpleNamespace(forward_decode=lambda q: q.clone())
    faults.split_attention(backend, 2)
    assert torch.equal(backend.forward_decode(x), x)
    assert not torch.equal(backend.forward_decode(x[:2]), x[:2])
    torch.testing.assert_close(backend.forward_decode(x[:2]), x[:2], rtol=1e-2, atol=1e-2)

    model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)})
    given = torch.randn(3, 4)
    alone = model["second"](given)
    assert faults.leak_companions(model, "ond") == "second"
    assert torch.allclose(model["second"](given), alone + alone.mean(0, keepdim=True) * 0.01)
    with pytest.raises(ConfigError, match=r"^MARGINGATE_TEST_BREAK: no layer's name ends with 'third'$"):
        faults.leak_companions(model, "third")


def test_a_row_that_is_alone_is_not_spoilt_by_chance() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    alone = [SimpleNamespace(index=0, step=3, state=SimpleNamespace(draw=None))]
    faults.spoil(TestKnobs(flip_rate=1.0), alone, logits, None, None)
    assert logits.tolist() == [[1.0, 3.0, 2.0]]
    both = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    faults.spoil(TestKnobs(flip_rate=1.0), alone, both, None, None)
    assert both.argmax(-1).tolist() == [2, 1], "one row of two, and the other left alone"


def test_a_chunk_ends_at_the_grid_and_at_the_prompts_end() -> None:
    rules = PrefillRules(64)
    assert [rules.chunk_limit(prefix, 150) for prefix in (0, 1, 63, 64, 128, 149)] == [64, 63, 1, 64, 22, 1]
    assert [rules.chunk_limit(prefix, 150) for prefix in (150, 151)] == [None, None], (
        "behind the prompt any number is fine"
    )


def test_steps_that_trigger_by_share_are_drawn_with_a_seed_of_their_own() -> None:
    drawn = [step for step in range(40) if TestKnobs().draws("r", step, 0.25)]
    assert drawn == [step for step in range(40) if AuditSampler(0.25, seed=1).draw("r", step)]
    assert drawn != [step for step in range(40) if AuditSampler(0.25).draw("r", step)], "an audit draws others"
