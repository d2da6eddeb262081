"""What moved between SGLang's versions is found where it is, once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from types import SimpleNamespace as Some
from typing import Any

import pytest

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.serving import batches, cpu, hook_table, sgl, shape_hooks
from sglang_margingate.serving.sgl import Moved, Reader
from sglang_margingate.settings.clear import clear_settings, declared_defaults, record


def fresh(reader: Reader) -> Reader:
    """Return a reader that has not chosen yet: the process's own keeps its choice."""
    return Reader(reader.what, *reader.places)


OLD = Some(req_pool_idx=3, cache_protected_len=8, prefix_indices=[1, 2], device_indices=[1, 2, 3], kv=None)
OLD_WITH_KV = Some(**{**vars(OLD), "kv": Some(kv_committed_len=2)})
NEW = Some(prefix_len=2, device_prefix_len=3, kv=Some(req_pool_idx=3, cache_protected_len=8))
MIXED = Some(prefix_indices=[1, 2], device_indices=[1, 2, 3], kv=NEW.kv)  # 0.5.19 to 0.5.22


@pytest.mark.parametrize("thing", [OLD, OLD_WITH_KV, NEW, MIXED], ids=["0.5.17", "0.5.17-kv", "0.5.23", "0.5.20"])
def test_each_version_is_read_where_it_keeps_a_value(thing: Any) -> None:
    assert fresh(sgl.pool_index)(thing) == 3
    assert fresh(sgl.protected_len)(thing) == 8
    assert fresh(sgl.prefix_len)(thing) == 2
    assert fresh(sgl.matched_len)(thing) == 3


def test_the_first_object_decides_and_none_is_a_value() -> None:
    reader = fresh(sgl.pool_index)
    assert reader(Some(req_pool_idx=None)) is None
    assert reader(Some(req_pool_idx=4, kv=Some(req_pool_idx=5))) == 4


def test_a_value_that_is_nowhere_is_named() -> None:
    with pytest.raises(Moved, match=r"row of the table of K/V slots is at none of kv.req_pool_idx, req_pool_idx"):
        fresh(sgl.pool_index)(Some(other=1))


class Settings:
    """As 0.5.19 and later keep them: raw, with what was decided beside them."""

    def __init__(self) -> None:
        self.page_size, self.api_key = None, "k"
        self._resolved_overrides: list[tuple[str, dict[str, Any]]] = []
        self.calls = 0

    def resolve_once(self) -> None:
        self.calls += 1
        self._resolved_overrides = [("a", {"page_size": 64}), ("b", {"page_size": 1})]


class View:
    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        for _, declared in reversed(self._args._resolved_overrides):
            if name in declared:
                return declared[name]
        return getattr(self._args, name)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl, "_resolving_view", lambda: View)


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sgl, "_resolving_view", lambda: None)


@pytest.mark.usefixtures("later")
def test_settings_are_read_as_they_were_decided_on() -> None:
    args = Settings()
    assert args.page_size is None
    assert sgl.resolve(args).page_size == 1
    assert args.calls == 1
    assert sgl.resolved(args).page_size == 1
    assert args.calls == 1  # a scheduler does not decide again
    assert record(args) is args


@pytest.mark.usefixtures("first")
def test_settings_that_are_resolved_when_made_are_read_as_they_are() -> None:
    args = Some(page_size=4)
    assert sgl.resolve(args) is args


class ResolvingConfig:
    """SGLang's own view, by its name."""

    def __init__(self, args: Any) -> None:
        self._server_args = args

    def __getattr__(self, name: str) -> Any:
        return {"page_size": 1, "attention_backend": "torch_native"}.get(name, getattr(self._server_args, name))


def test_what_is_written_down_is_what_was_decided_on() -> None:
    """0.5.20 and later: the object holds None, and its fields are declared behind the view."""
    msgspec = pytest.importorskip("msgspec")
    fields = [("page_size", Any, None), ("attention_backend", Any, None), ("log_level", str, "info"), ("bs", list, [])]
    args = msgspec.defstruct("ServerArgs", fields)()
    view = ResolvingConfig(args)
    assert record(view) is args
    assert declared_defaults(view) == {"page_size": None, "attention_backend": None, "log_level": "info", "bs": []}
    shown = clear_settings(view)
    assert shown == {"attention_backend": "torch_native", "log_level": "info", "page_size": 1}
    assert "page_size" not in clear_settings(args), "the raw object says nothing of it"


def test_a_batch_built_by_hand_gets_its_columns_bound() -> None:
    said: list[Any] = []
    plan = Some(bind=lambda batch, translator: said.append((batch, translator)))
    new = Some(own_plan=lambda batch: plan)
    old = Some(rebind_write_loc=said.append)
    sgl.bind_columns(Some(), "first")
    sgl.bind_columns(Some(kv_index_translator=old), "second")
    sgl.bind_columns(Some(kv_index_translator=new), "third")
    assert said == ["second", ("third", new)]


def test_decode_sizes_are_read_and_written_where_the_runners_look(monkeypatch: pytest.MonkeyPatch) -> None:
    given, published = Some(decode=Some(bs=[1, 2])), Some(decode=Some(bs=[1, 2, 4]))
    context = ModuleType("sglang.srt.runtime_context")
    context.get_exec = lambda: Some(graph=Some(cuda_graph_config=published))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", context)
    runner: Any = Some(server_args=Some(cuda_graph_config=given), req_to_token_pool=Some(size=8))
    monkeypatch.setattr(sgl, "_resolving_view", lambda: None)
    assert sgl.graph_config(runner) is given
    monkeypatch.setattr(sgl, "_resolving_view", lambda: View)
    assert sgl.graph_config(runner) is published
    published.decode.backend = "full"
    assert shape_hooks._wanted_sizes(runner) == [1, 2, 4]


def sampling(**told: Any) -> batches.BatchSampling:
    """Return how a greedy batch is sampled, with what a version tells beside it."""
    plain = {"is_all_greedy": True, "grammars": None, "logit_bias": None, "acc_additive_penalties": None}
    info = Some(**plain, acc_scaling_penalties=None, penalizer_orchestrator=None, has_custom_logit_processor=False,
                return_sampling_masks=None, **told.pop("info", {}))  # fmt: skip
    batch = Some(sampling_info=info, out_cache_loc=None, return_logprob=False, ngram_embedding_info=None)
    sampler = type("Sampler", (), {"__module__": "sglang.srt.layers.sampler"})()
    output = Some(next_token_logits=None, auxiliary_device_output="of the last forward")
    found = batches.BatchSampling(None, Some(sampler=sampler, **told), output, batch, [])
    assert (output.auxiliary_device_output is None) is found.plain_argmax
    return found


def test_greedy_batches_skip_the_sampler_only_where_nobody_looks_on() -> None:
    assert sampling().plain_argmax
    assert sampling(sampling_observer=Some(is_active=lambda _: False)).plain_argmax
    assert not sampling(sampling_observer=Some(is_active=lambda _: True)).plain_argmax
    assert not sampling(info={"has_watermark_candidates": True}).plain_argmax


def test_an_argmax_is_not_enough_where_somebody_looks_on() -> None:
    plain, marked = Some(), Some(has_watermark_candidates=True)
    observer = Some(is_active=lambda info: info is plain)
    assert sgl.only_samples(Some(), plain)
    assert sgl.only_samples(Some(sampling_observer=None), plain)
    assert not sgl.only_samples(Some(), marked)
    assert not sgl.only_samples(Some(sampling_observer=observer), plain)
    assert sgl.only_samples(Some(sampling_observer=observer), Some(has_watermark_candidates=False))
    output = Some(auxiliary_device_output="of the last forward")
    sgl.forget_observation(output)
    assert output.auxiliary_device_output is None
    old = Some()
    sgl.forget_observation(old)
    assert not hasattr(old, "auxiliary_device_output")


@pytest.mark.parametrize(
    ("branch", "needed"), [('if logits.device.type == "cpu":', False), ("raise RuntimeError", True)]
)
def test_grammars_are_hooked_only_where_sglang_has_no_cpu_branch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: str, needed: bool
) -> None:
    folder = tmp_path / "sglang" / "srt" / "constrained"
    folder.mkdir(parents=True)
    (folder / "xgrammar_backend.py").write_text(branch)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda _: Some(submodule_search_locations=[str(tmp_path / "sglang")])
    )
    monkeypatch.setattr(cpu, "is_cpu_host", lambda: True)
    cpu.grammars_need_a_gpu.cache_clear()
    wanted = {hook.target for hook in hook_table.wanted(MarginGateConfig(), hook_table.SCHEDULER)}
    cpu.grammars_need_a_gpu.cache_clear()
    assert ("sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask" in wanted) is needed
    assert "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__" in wanted


def test_prompt_log_probabilities_are_computed_in_one_way() -> None:
    fused, old = Some(enable_fast_input_logprobs=True), Some()
    for processor in (fused, old):
        sgl.one_way_to_prompt_logprobs(Some(logits_processor=Some(input_logprob_processor=processor)))
    sgl.one_way_to_prompt_logprobs(Some())
    assert not fused.enable_fast_input_logprobs
    assert vars(old) == {}
