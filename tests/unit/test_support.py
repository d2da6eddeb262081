"""What is refused, what is noted and what is neutral: versions, plugins, variables and every setting of SGLang."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang_process import SGLangProcess

from sglang_margingate.config import ConfigError, MarginGateConfig, Policy, Radix
from sglang_margingate.settings import support
from sglang_margingate.settings.clear import SET, clear_settings
from sglang_margingate.settings.neutral import NEUTRAL
from sglang_margingate.settings.rules import RULES
from sglang_margingate.settings.support import OVERRIDE, check_host, check_model, check_server_args

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

GATE = MarginGateConfig()
UNTESTED = MarginGateConfig(allow_untested=True)
LOG = MarginGateConfig(policy=Policy.LOG)


@pytest.fixture(scope="module")
def fields(sglang: SGLangProcess) -> dict[str, Any]:
    """Return SGLang's settings with their defaults."""
    return sglang.value(
        "import dataclasses\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "print(json.dumps({f.name: None if f.default is dataclasses.MISSING else f.default"
        " for f in dataclasses.fields(ServerArgs)}))"
    )


def args(fields: dict[str, Any], **given: Any) -> SimpleNamespace:
    """Return settings as a CPU server has them, but for those given."""
    plain = {**fields, "model_path": "m", "device": "cpu", "attention_backend": "torch_native", "radix_cache_backend": "margingate"}  # fmt: skip
    return SimpleNamespace(**{**plain, **given})


@needs_sglang
def test_every_setting_of_sglang_is_in_exactly_one_list(fields: dict[str, Any]) -> None:
    """A setting in none is one that nobody has read: find out what it does, then write it down."""
    listed = Counter([name for group in NEUTRAL for name in group.fields] + [n for rule in RULES for n in rule.fields])
    assert sorted(set(fields) - set(listed)) == []
    assert [name for name, times in listed.items() if times > 1] == []
    assert all(group.why for group in NEUTRAL)
    assert all(rule.why for rule in RULES)


@needs_sglang
def test_the_defaults_of_this_machine_pass(fields: dict[str, Any]) -> None:
    assert check_server_args(args(fields), GATE) == []


HOLES = [
    ({"enable_streaming_session": True}, "--enable-streaming-session"),
    ({"torchao_config": "int8wo"}, "--torchao-config int8wo"),
    ({"quantization": "awq"}, "--quantization awq"),
    ({"dtype": "float16"}, "--dtype float16"),
    ({"dtype": "float32"}, "--dtype float32"),
    ({"enable_lora": True}, "--enable-lora"),
    ({"attention_backend": "triton"}, "--attention-backend triton"),
    ({"device": "cuda", "attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, "--decode-attention-backend fa3"),
    ({"page_size": 16}, "--page-size 16"),
    ({"nnodes": 2}, "--nnodes 2"),
    ({"tp_size": 4, "disable_custom_all_reduce": True}, "--disable-custom-all-reduce"),
    ({"tp_size": 2, "enable_mscclpp": True}, "--enable-mscclpp"),
    ({"tp_size": 2, "enable_torch_symm_mem": True}, "--enable-torch-symm-mem"),
    ({"tp_size": 2, "enable_nccl_nvls": True}, "--enable-nccl-nvls"),
    ({"tp_size": 2, "flashinfer_allreduce_fusion_backend": "auto"}, "--flashinfer-allreduce-fusion-backend"),
    ({"tp_size": 2, "enable_symm_mem": True}, "--enable-symm-mem"),
    ({"tp_size": 2, "enable_dp_attention": True}, "--enable-dp-attention"),
    ({"pp_size": 2}, "--pp-size 2"),
    ({"ep_size": 2}, "--ep-size 2"),
    ({"enable_hisparse": True}, "--enable-hisparse"),
    ({"enable_deterministic_inference": True}, "--margingate-policy log"),
    ({"bf16_gemm_backend": "cutedsl"}, "--bf16-gemm-backend cutedsl"),
    ({"enable_fused_qk_norm_rope": True}, "--enable-fused-qk-norm-rope"),
    ({"sampling_backend": "ascend"}, "--sampling-backend ascend"),
    ({"forward_hooks": [{"name": "x"}]}, "--forward-hooks"),
    ({"enable_mixed_chunk": True}, "--enable-mixed-chunk"),
    ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
    ({"radix_cache_backend": "other"}, "--margingate-radix"),
    ({"disable_radix_cache": True}, "--margingate-radix off"),
    ({"enable_return_hidden_states": True}, "--enable-return-hidden-states"),
    ({"load_format": "gguf"}, "--load-format gguf"),
]  # fmt: skip


@needs_sglang
@pytest.mark.parametrize(("given", "names"), HOLES, ids=[next(reversed(g)) + f"={n}" for g, n in HOLES])
def test_a_setting_that_was_not_tested_is_refused_or_noted(
    fields: dict[str, Any], given: dict[str, Any], names: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_server_args(args(fields, **given), GATE)
    assert names in str(caught.value)
    assert OVERRIDE in str(caught.value)
    assert "\n" not in str(caught.value)
    notes = check_server_args(args(fields, **given), UNTESTED)
    assert len(notes) == 1
    assert notes[0].startswith("--")
    assert check_server_args(args(fields, **given), LOG) == []


@needs_sglang
@pytest.mark.parametrize(
    "given",
    [
        {"enable_fp32_lm_head": True}, {"max_running_requests": 8}, {"skip_tokenizer_init": True}, {"tp_size": 1}, {"tp_size": 4}, {"dp_size": 2},
        {"tp_size": 2, "disable_custom_all_reduce": True}, {"enable_mscclpp": True}, {"load_balance_method": "total_tokens"},
        {"sampling_backend": "flashinfer"}, {"grammar_backend": "none"}, {"dtype": "bfloat16"}, {"api_key": "k"},
        {"disable_overlap_schedule": True},
    ],
)  # fmt: skip
def test_a_neutral_setting_passes(fields: dict[str, Any], given: dict[str, Any]) -> None:
    assert check_server_args(args(fields, **given), GATE) == []


@needs_sglang
@pytest.mark.parametrize("policy", [Policy.LOG, Policy.GATE, Policy.ALWAYS])
@pytest.mark.parametrize("name", ["tokenizer_worker_num", "detokenizer_worker_num", "grpc_port"])
def test_what_loses_the_checks_of_requests_is_never_served(fields: dict[str, Any], name: str, policy: Policy) -> None:
    config = MarginGateConfig(policy=policy, allow_untested=True)
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-") + " 2"):
        check_server_args(args(fields, **{name: 2}), config)


@needs_sglang
def test_graphs_are_judged_as_resolved(fields: dict[str, Any]) -> None:
    def graphs(decode: str, prefill: str) -> SimpleNamespace:
        config = SimpleNamespace(decode=SimpleNamespace(backend=decode), prefill=SimpleNamespace(backend=prefill))
        return args(fields, device="cuda", attention_backend="flashinfer", cuda_graph_config=config)

    assert check_server_args(graphs("full", "disabled"), GATE) == []
    for decode, prefill in (("full", "tc_piecewise"), ("full", "full"), ("breakable", "disabled")):
        with pytest.raises(ConfigError, match="--cuda-graph-backend-prefill disabled"):
            check_server_args(graphs(decode, prefill), GATE)


@needs_sglang
def test_the_radix_settings_go_with_ours(fields: dict[str, Any]) -> None:
    off = args(fields, radix_cache_backend=None, disable_radix_cache=True)
    assert check_server_args(off, MarginGateConfig(radix=Radix.OFF)) == []
    stock = args(fields, radix_cache_backend=None)
    assert "stock" in check_server_args(stock, MarginGateConfig(radix=Radix.STOCK))[0]


@needs_sglang
def test_more_than_one_is_counted(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\(1 more like it\)"):
        check_server_args(args(fields, pp_size=2, page_size=16), GATE)


@dataclasses.dataclass
class NewerClass:
    """A later ``ServerArgs``."""

    device: str = "cpu"
    attention_backend: str = "torch_native"
    radix_cache_backend: str = "margingate"
    chunked_prefill_size: int = 2048
    enable_megakernel: bool = False
    paged_experts: list[int] = dataclasses.field(default_factory=list)


class NewerStruct(msgspec.Struct):
    """The same as msgspec has it, which SGLang uses from 0.5.20 on."""

    device: str = "cpu"
    attention_backend: str = "torch_native"
    radix_cache_backend: str = "margingate"
    chunked_prefill_size: int = 2048
    enable_megakernel: bool = False
    paged_experts: list[int] = msgspec.field(default_factory=list)


@pytest.mark.parametrize("newer", [NewerClass, NewerStruct])
def test_a_setting_of_a_newer_sglang_is_refused_off_its_default(newer: Any) -> None:
    assert check_server_args(newer(), GATE) == []
    with pytest.raises(ConfigError, match=r"--enable-megakernel: what it changes was not reviewed.*Leave it out"):
        check_server_args(newer(enable_megakernel=True), GATE)
    assert len(check_server_args(newer(enable_megakernel=True, paged_experts=[1]), UNTESTED)) == 2
    assert clear_settings(newer(paged_experts=[1]))["paged_experts"] == SET
    assert "paged_experts" not in clear_settings(newer())


RESOLVED = [
    ([], None),
    (["--margingate-radix", "off"], None),
    (["--disable-radix-cache"], None),
    (["--enable-fp32-lm-head", "--margingate-fast-path", "canonical"], None),
    (["--enable-streaming-session"], "--enable-streaming-session"),
    (["--cuda-graph-config", '{"prefill": {"backend": "breakable"}}'], "--cuda-graph-backend-prefill disabled"),
    (["--dtype", "half"], "--dtype half"),
]


@pytest.fixture(scope="module")
def resolved(sglang: SGLangProcess) -> list[Any]:
    """Return what the checks say of each command line of RESOLVED."""
    code = """
from sglang.srt.server_args import prepare_server_args
from sglang_margingate.serving.frontdoor import parse
from sglang_margingate.settings.support import check_server_args
found = []
for argv in json.loads(sys.argv[1]):
    try:
        config, flags, _ = parse(["--device", "cpu", *argv])
        found.append(check_server_args(prepare_server_args(flags), config))
    except ValueError as error:
        found.append(str(error))
print(json.dumps(found))
"""
    return sglang.value(code, json.dumps([argv for argv, _ in RESOLVED]))


@needs_sglang
@pytest.mark.parametrize("i", range(len(RESOLVED)), ids=[" ".join(argv)[:40] for argv, _ in RESOLVED])
def test_what_sglang_resolves_is_what_is_checked(resolved: list[Any], i: int) -> None:
    says = RESOLVED[i][1]
    assert resolved[i] == [] if says is None else says in resolved[i]


def model(**given: Any) -> SimpleNamespace:
    plain: dict[str, Any] = {
        "device": "cpu", "dtype": "torch.bfloat16", "is_hybrid_swa": False, "model": object(),
        "model_config": SimpleNamespace(hf_config=SimpleNamespace(), is_multimodal=False),
        "token_to_kv_pool": type("MHATokenToKVPool", (), {})(),
    }  # fmt: skip
    return SimpleNamespace(**{**plain, **given})


def of_kind(quantization: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a model whose configuration has these fields."""
    hf = SimpleNamespace(**fields)
    return {"model_config": SimpleNamespace(hf_config=hf, is_multimodal=False, quantization=quantization)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"dtype": "torch.float16"}, "float16.*--dtype bfloat16"),
        ({"model": type("TransformersForCausalLM", (), {})()}, "transformers"),
        ({"model_config": SimpleNamespace(hf_config=SimpleNamespace(), is_multimodal=True)}, "images"),
        (of_kind(num_experts=8, architectures=["GrokForCausalLM"]), "GrokForCausalLM.*num_experts=8"),
        (of_kind(quantization_config={"quant_method": "awq"}), "4 bits .awq.*atomics"),
        ({"token_to_kv_pool": type("MLATokenToKVPool", (), {})()}, "MLATokenToKVPool"),
    ],
)
def test_a_model_that_was_not_tested(given: dict[str, Any], says: str) -> None:
    assert check_model(model(), GATE) == []
    with pytest.raises(ConfigError, match=says):
        check_model(model(**given), GATE)
    assert len(check_model(model(**given), UNTESTED)) == 1


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 7\.5.*8\.0"):
        check_model(model(device="cuda"), GATE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert check_model(model(device="cuda"), GATE) == []


def hide_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the SGLang that another test imported, parts and whole, until this test has ended."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder with a tested SGLang in front of the path, alone with its metadata."""
    hide_sglang(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    add(tmp_path, "0.5.17")
    return tmp_path


def add(folder: Path, version: str | None, package: bool = True) -> None:
    if package:
        (folder / "sglang").mkdir(parents=True)
        (folder / "sglang" / "__init__.py").write_text("")
    if version is not None:
        info = folder / f"sglang-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")


def test_a_tested_sglang_passes(site: Path) -> None:
    assert check_host(GATE) == []


@pytest.mark.parametrize(
    ("packages", "says"),
    [
        ([("other", "0.5.99", True)], r"SGLang 0\.5\.99 .*tested: 0\.5\.17"),
        ([("bare", None, True)], "two SGLangs.*bare"),
        ([("info", "0.5.20", False)], "two SGLangs.*0.5.20"),
    ],
)
def test_another_sglang_is_refused_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, packages: list[tuple[str, str | None, bool]], says: str
) -> None:
    for name, version, package in packages:
        add(site / name, version, package)
        monkeypatch.setattr(sys, "path", [str(site / name), *sys.path])
    for config in (GATE, LOG):
        with pytest.raises(ConfigError, match=says) as caught:
            check_host(config)
        assert OVERRIDE in str(caught.value)
        assert "0.5.17" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(check_host(UNTESTED)) == 1
    assert check_host(MarginGateConfig(policy=Policy.OFF)) == []


@pytest.mark.parametrize(
    ("metadata", "wheel", "fits"),
    [
        ("Requires-Python: >=3.10", "Tag: py3-none-any", True),
        ("Requires-Python: >=3.99", "Tag: py3-none-any", False),
        ("", "Tag: cp38-cp38-manylinux_2_34_x86_64", False),
        ("", f"Tag: cp3{sys.version_info.minor}-cp3{sys.version_info.minor}-manylinux_2_34_x86_64", True),
        ("", "", True),
    ],
)
def test_an_overlay_of_another_python_is_refused_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, metadata: str, wheel: str, fits: bool
) -> None:
    add(site / "overlay", "0.5.20", True)
    info = site / "overlay" / "sglang-0.5.20.dist-info"
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.20\n{metadata}\n")
    info.joinpath("WHEEL").write_text(f"Wheel-Version: 1.0\n{wheel}\n")
    monkeypatch.setattr(sys, "path", [str(site / "overlay"), *sys.path])
    if fits:
        assert check_host(GATE) == []
        return
    with pytest.raises(
        ConfigError, match=r"SGLang 0\.5\.20 in .*another Python than this 3\..*tested: 0\.5\.17"
    ) as caught:
        check_host(GATE)
    assert OVERRIDE in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(check_host(UNTESTED)) == 1


def test_sglang_without_metadata_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_sglang(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="not installed"):
        check_host(GATE)
    add(tmp_path, None)
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="no metadata"):
        check_host(GATE)


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("SGLANG_FORCE_FUSED_OP_BACKEND", "torch", ""),
        ("SGLANG_ENABLE_TORCH_COMPILE", "1", "0"),
        ("SGLANG_OPT_USE_JIT_NORM", "false", "true"),
        ("SGLANG_OPT_BF16_FP32_GEMM_ALGO", "deepgemm", "cublas"),
        ("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "true", "False"),
    ],
)
def test_variables_that_choose_kernels(
    site: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, fine: str
) -> None:
    monkeypatch.setenv(name, fine)
    assert check_host(GATE) == []
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}.*{OVERRIDE}"):
        check_host(GATE)
    assert len(check_host(UNTESTED)) == 1
    assert check_host(LOG) == []


def test_a_variable_that_loses_the_checks_of_requests(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_GRPC_PORT", "9000")
    for config in (LOG, UNTESTED):
        with pytest.raises(ConfigError, match=r"SGLANG_GRPC_PORT=9000.*Unset it"):
            check_host(config)


def test_a_plugin_of_others(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [SimpleNamespace(name="margingate"), SimpleNamespace(name="stranger")]
    monkeypatch.setattr(support.metadata, "entry_points", lambda group: entries)
    with pytest.raises(ConfigError, match=r"stranger.*SGLANG_PLUGINS=margingate"):
        check_host(GATE)
    assert "stranger" in check_host(UNTESTED)[0]
    monkeypatch.setenv("SGLANG_PLUGINS", "margingate")
    assert check_host(GATE) == []


@needs_sglang
def test_the_variables_of_the_table_exist(sglang: SGLangProcess) -> None:
    """A mistyped name would never be refused."""
    from sglang_margingate.settings.rules import ENVIRONMENT

    code = """
from sglang.srt.environ import envs
print(json.dumps(sorted(dir(type(envs)))))
"""
    known = {*sglang.value(code), "SGLANG_USE_CPU_ENGINE"}  # read before SGLang's own list exists
    assert [name for rule in ENVIRONMENT for name in rule.names if name not in known] == []
