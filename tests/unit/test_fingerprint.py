"""The fingerprint: equal for what gives equal bits, another one for whatever may change them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import pytest
import torch

from sglang_margingate.canonical.classes import Classes, FastPath, Trial
from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses, RowSizes
from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.status import Runtime
from sglang_margingate.serving.setup import _decided
from sglang_margingate.settings import fingerprint
from sglang_margingate.settings.fingerprint import Fingerprint, differing, model_facts, parts_of, weights_digest


def graphs(decode: str = "full", prefill: str = "disabled", sizes: tuple[int, ...] = (1, 2)) -> Any:
    """As SGLang resolves its graph settings."""
    return Some(decode=Some(backend=decode, bs=list(sizes)), prefill=Some(backend=prefill, bs=[]))


@dataclasses.dataclass
class Args:
    """Some settings of SGLang's, with its own defaults."""

    port: int = 30000
    random_seed: int = 1
    model_path: str = "a"
    mem_fraction_static: float = 0.8
    page_size: int = 1
    kv_cache_dtype: str = "auto"
    enable_fp32_lm_head: bool = False
    quantization_param_path: str | None = None
    chat_template: str | None = None
    reasoning_parser: str | None = None
    preferred_sampling_params: str | None = None
    dp_size: int = 1
    tp_size: int = 1
    cuda_graph_config: Any = dataclasses.field(default_factory=graphs)


def a_model(seed: int = 0, names: tuple[str, str] = ("up", "down")) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.add_module(names[0], torch.nn.Linear(8, 16))
    model.add_module(names[1], torch.nn.Linear(16, 8).bfloat16())
    model.register_buffer("scale", torch.tensor(2.0))
    return model


def a_path(
    labels: dict[int, int | None] | None = None, seconds: float = 1.0, file: str = "a", **trial: Any
) -> FastPath:
    layer = LayerClasses("x", (4, 4), 1, labels or {1: 0, 2: 0})
    sizes = RowSizes((1, 2))
    return FastPath(Classes(InvarianceMap([layer], {}, seconds, file), sizes, sizes, sizes, 2), Trial(**trial))


def parts(
    config: MarginGateConfig | None = None, args: Args | None = None, fast: FastPath | None = None
) -> dict[str, Any]:
    model = model_facts(torch.bfloat16, Some(to_dict=lambda: {"rope": 1, "_name_or_path": "here"}), None)
    return parts_of(config or MarginGateConfig(), args or Args(), model, "cpu", fast or a_path())


def test_weights_are_told_apart_by_bits_names_types_and_shapes() -> None:
    found = weights_digest(a_model())
    assert weights_digest(a_model()) == found
    other = a_model()
    with torch.no_grad():
        other.down.weight[3, 5] = torch.nextafter(other.down.weight[3, 5], torch.tensor(9.0).bfloat16())
    buffer = a_model()
    buffer.scale += 1
    swapped = a_model(names=("down", "up"))
    assert len({found, *(weights_digest(m) for m in (other, buffer, swapped, a_model(1), a_model().float()))}) == 6


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_digest(a_model())
    monkeypatch.setattr(fingerprint, "BLOCK_BYTES", 64)
    assert weights_digest(a_model()) == whole


def test_what_a_restart_or_a_replica_changes_is_in_no_part() -> None:
    again = parts(
        MarginGateConfig(trace_dir="elsewhere", map_dir="/other", audit_rate=0.5),
        Args(port=1, random_seed=2, model_path="b", mem_fraction_static=0.5, dp_size=2), a_path(seconds=9.0, file="b"),
    )  # fmt: skip
    assert parts() == again
    assert differing(parts(), again) == []


def test_sizes_of_graphs_and_how_far_a_map_goes_are_in_no_part() -> None:
    """A larger batch or chunk has more sizes of the same classes, numbered in another order."""
    few = parts(fast=a_path({1: 0, 2: 1, 64: 1}, graphs=RowSizes((1, 2))))
    more = a_path({1: 3, 2: 0, 64: 0, 96: 3, 128: 0}, graphs=RowSizes((1, 2, 4)), prefill_graphs=RowSizes((1,)))
    assert differing(few, parts(args=Args(cuda_graph_config=graphs(sizes=(1, 2, 4))), fast=more)) == []
    beyond = Classes(more.classes.map, RowSizes((1, 2, 96)), RowSizes((1, 2, 128)), RowSizes((1, 2)), 2)
    assert differing(few, parts(fast=FastPath(beyond, more.trial))) == []


def test_another_class_is_another_part() -> None:
    one = a_path({1: 0, 2: 1, 64: 1})
    for name, sizes, told in (
        ("decode", (2, 64), "[1], here [2]"), ("prefill", (1,), "[2], here [1]"), ("head", (), "1, here "),
    ):  # fmt: skip
        other = dataclasses.replace(one.classes, **{name: RowSizes(sizes)})
        (found,) = differing(parts(fast=one), parts(fast=FastPath(other, one.trial)))
        assert found.startswith(f"classes.{name}_class: {told}")


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"config": MarginGateConfig(policy=Policy.ALWAYS)}, "margingate.policy: gate, here always"),
        ({"config": MarginGateConfig(chunk=96)}, "margingate.chunk: "),
        ({"fast": a_path({1: 0, 2: None})}, "classes.map: "),
        ({"args": Args(cuda_graph_config=graphs("disabled"))}, "sglang.cuda_graph_backend_decode: full, here disabled"),
        (
            {"args": Args(cuda_graph_config=graphs(prefill="full"))},
            "sglang.cuda_graph_backend_prefill: disabled, here full",
        ),
        ({"args": Args(tp_size=2)}, "sglang.tp_size: 1, here 2"),
        ({"args": Args(page_size=16)}, "sglang.page_size: 1, here 16"),
        ({"args": Args(enable_fp32_lm_head=True)}, "sglang.enable_fp32_lm_head: False, here True"),
        ({"args": Args(quantization_param_path="/secret")}, "sglang.quantization_param_path: nothing, here <"),
        ({"fast": a_path({1: 0, 2: 1})}, "classes.map: "),
        ({"fast": a_path(decode_ok=True)}, "classes.decode_ok: False, here True"),
        ({"fast": a_path(prefill_attention="fa3")}, "classes.prefill_attention: sglang, here fa3"),
        ({"args": Args(chat_template="chatml")}, "sglang.chat_template: nothing, here <"),
        ({"args": Args(reasoning_parser="qwen3")}, "sglang.reasoning_parser: nothing, here <"),
        ({"args": Args(preferred_sampling_params="{}")}, "sglang.preferred_sampling_params: nothing, here <"),
    ],
)
def test_another_setting_is_named(other: dict[str, Any], line: str) -> None:
    found, *more = differing(parts(), parts(**other))
    assert all(line == "classes.map: " and each.startswith("classes.") for each in more), (
        "another map has other classes"
    )
    assert found.startswith(line)
    assert "secret" not in found
    one, two = (Fingerprint(p, lambda: "w").value for p in (parts(), parts(**other)))
    assert one != two
    assert one.startswith("mg-")


def test_a_template_counts_by_what_it_holds(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.jinja", "same.jinja", "other.jinja")]
    for file, text in zip(files, ("{{ a }}", "{{ a }}", "{{ b }}")):
        file.write_text(text)
    one, same, other = (parts(args=Args(chat_template=str(file))) for file in files)
    assert one == same
    assert [line.split(":")[0] for line in differing(one, other)] == ["sglang.chat_template"]


def test_what_log_probabilities_are_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts()
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    assert differing(before, parts()) == ["sglang.SGLANG_RETURN_ORIGINAL_LOGPROB: nothing, here 1"]


def test_environment_variables_that_choose_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    (found,) = differing(before, parts())
    assert found == "machine.ONEDNN_MAX_CPU_ISA: nothing, here AVX512_CORE"


def test_tokenizer_and_configuration_count_wherever_they_lie() -> None:
    def facts(
        words: str = "a", template: str = "t", rope: int = 1, path: str = "here", inner: int = 1
    ) -> dict[str, Any]:
        tokenizer = Some(backend_tokenizer=Some(to_str=lambda: words), chat_template=template)
        whence = {"_name_or_path": path, "transformers_version": path}
        about = {"rope": rope, **whence, "text_config": {"heads": inner, **whence}, "parts": [{"heads": 2, **whence}]}
        return model_facts(torch.bfloat16, Some(to_dict=lambda: about), tokenizer)

    assert facts() == facts(path="there")
    others = [facts(words="b"), facts(template="u"), facts(rope=2), facts(inner=2)]
    assert len({str(facts()), *map(str, others)}) == 5
    slow = model_facts(torch.bfloat16, None, Some(get_vocab=lambda: {"a": 1}))
    assert slow["tokenizer"] != model_facts(torch.bfloat16, None, Some(get_vocab=lambda: {"a": 2}))["tokenizer"]


def test_a_configuration_that_holds_itself_is_read_once() -> None:
    class Config:
        def to_dict(self) -> dict[str, Any]:
            return {"rope": 1, "quantization_config": {"bits": 8, "hf_config": self}}

        def __str__(self) -> str:
            raise TypeError("Object of type Config is not JSON serializable")

    class Other(Config):
        def to_dict(self) -> dict[str, Any]:
            return {"rope": 1, "quantization_config": {"bits": 4, "hf_config": self}}

    one, same, other = (model_facts(torch.bfloat16, of(), None) for of in (Config, Config, Other))
    assert one == same != other


def test_schedulers_may_replay_prefills_at_other_sizes_but_choose_nothing_else_alone() -> None:
    def decided(**trial: Any) -> dict[str, Any]:
        return _decided(MarginGateConfig(), a_path(**trial))

    assert decided(prefill_graphs=RowSizes((192, 256))) == decided(prefill_graphs=RowSizes((256,)))
    assert decided(prefill_attention="fa3") != decided(prefill_attention="triton")
    assert decided(decode_ok=True) != decided(decode_ok=False)


def test_changed_weights_change_it_and_released_ones_are_not_read() -> None:
    model = a_model()
    reads: list[str] = []

    def weights() -> str:
        reads.append(weights_digest(model))
        return reads[-1]

    manifest: dict[str, Any] = {}
    config = MarginGateConfig()
    metrics: Any = Metrics(False, "m")
    recorder: Any = Some(structural_flips=0)
    assert Recorder is not None
    found = Fingerprint({"machine": "m"}, weights)
    labels = Labels(config, recorder, metrics)
    labels.fingerprint = first = found.value
    unused: Any = None
    runtime = Runtime(
        config, unused, labels, unused, unused, unused, metrics, fingerprint=found,
        writer=Some(update_manifest=lambda **fields: manifest.update(fields)),
    )  # fmt: skip
    model.up.weight.data += 1
    runtime.weights_changed("an update")
    second = labels.fingerprint
    assert second not in (None, first)
    assert manifest["fingerprint"] == found.to_dict()
    assert found.parts["weights"] == weights_digest(model)
    runtime.weights_changed("a release of memory", readable=False)
    assert (found.parts["weights"], len(reads)) == ("released", 2)
    assert found.parts["changes"] == ["an update", "a release of memory"]
    assert len({first, second, labels.fingerprint}) == 3


def test_weights_that_cannot_be_read_leave_no_old_fingerprint() -> None:
    answers = iter(["good"])
    found = Fingerprint({}, lambda: next(answers))
    before = found.value
    found.changed("an update that failed")
    assert found.parts["weights"] == "unreadable (StopIteration)"
    assert found.value != before


def test_no_part_holds_a_path(tmp_path: Path) -> None:
    config = MarginGateConfig(trace_dir=str(tmp_path), map_dir=str(tmp_path))
    assert str(tmp_path) not in str(parts(config, Args(model_path=str(tmp_path))))
