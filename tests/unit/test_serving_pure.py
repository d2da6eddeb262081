"""The parts of serving/ that need no running server: flags, hooks, prefill grid, packaging."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_process import SGLangProcess

from sglang_margingate.config import ConfigError, FastPathMode, Keep, MarginGateConfig, Policy, PrefillKind, Radix

ROOT = Path(__file__).parents[2]

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")


def flags(*argv: str) -> tuple[MarginGateConfig, list[str]]:
    from sglang_margingate.serving.frontdoor import parse

    config, rest, wants_help = parse(["--device", "cpu", *argv])
    assert not wants_help
    return config, rest


def test_cpu_defaults_and_embedded_model() -> None:
    config, rest = flags()
    assert config.policy is Policy.GATE
    assert config.verify_rows == 16
    assert "--disable-cuda-graph" in rest
    assert rest[rest.index("--radix-cache-backend") + 1] == "margingate"
    assert Path(rest[rest.index("--model-path") + 1]).name == "model"


def test_given_flags_win() -> None:
    _, rest = flags("--max-total-tokens", "999", "--margingate-radix", "off", "--disable-cuda-graph")
    assert rest.count("--disable-cuda-graph") == 1
    assert "65536" not in rest
    assert "--disable-radix-cache" in rest


def test_log_leaves_stock_settings_alone() -> None:
    _, rest = flags("--margingate-policy", "log")
    assert "--radix-cache-backend" not in rest
    assert "--disable-radix-cache" not in rest


def test_gpu_defaults_differ() -> None:
    from sglang_margingate.serving.frontdoor import parse

    config, rest, _ = parse(["--device", "cuda", "--model-path", "org/model"])
    assert (config.verify_rows, config.chunk) == (64, 512)
    assert "--disable-cuda-graph" not in rest
    assert rest[rest.index("--cuda-graph-backend-prefill") + 1] == "disabled"
    # Left to itself SGLang takes another attention back end on Hopper, which the gate would then refuse.
    assert rest[rest.index("--attention-backend") + 1] == "flashinfer"


def test_a_given_attention_backend_is_left_alone() -> None:
    from sglang_margingate.serving.frontdoor import parse

    gpu = ["--device", "cuda", "--model-path", "org/model"]
    for given in (["--attention-backend", "triton"], ["--decode-attention-backend=triton"]):
        assert "flashinfer" not in parse([*gpu, *given])[1]
    assert "--attention-backend" not in parse([*gpu, "--margingate-policy", "log"])[1]


@pytest.mark.parametrize(
    ("device", "given", "path"),
    [
        ("cuda", [], "canonical"),
        ("cuda", ["--margingate-fast-path", "stock"], "stock"),
        ("cuda", ["--margingate-policy", "always"], "stock"),
        ("cuda", ["--margingate-policy", "log"], "stock"),
        ("cpu", [], "stock"),
        ("cpu", ["--margingate-fast-path", "canonical"], "canonical"),
    ],
)
def test_the_fast_path_that_was_not_chosen(device: str, given: list[str], path: str) -> None:
    from sglang_margingate.serving.frontdoor import parse

    config, _, _ = parse(["--device", device, "--model-path", "org/model", *given])
    assert config.fast_path.value == path


def test_a_second_radix_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="--margingate-radix"):
        flags("--radix-cache-backend=x")


def test_sglangs_way_to_share_nothing_is_ours() -> None:
    config, rest = flags("--disable-radix-cache")
    assert config.radix is Radix.OFF
    assert rest.count("--disable-radix-cache") == 1
    assert "--radix-cache-backend" not in rest
    assert flags("--disable-radix-cache", "--margingate-radix", "off")[0] == config
    with pytest.raises(ConfigError, match="'canonical' shares prefixes"):
        flags("--disable-radix-cache", "--margingate-radix", "canonical")


def test_prefill_graphs_are_on_unless_switched_off() -> None:
    assert flags()[0].prefill_graphs
    config, given = flags("--margingate-prefill-graphs", "off")
    assert not config.prefill_graphs
    assert not MarginGateConfig.from_json(config.to_json()).prefill_graphs
    assert "--margingate-prefill-graphs" not in given
    with pytest.raises(ConfigError, match="--margingate-prefill-graphs: 1 is not true or false"):
        MarginGateConfig(prefill_graphs=1)  # type: ignore[arg-type]


def test_prefill_attention_is_chosen_on_a_gpu_only() -> None:
    from sglang_margingate.serving.frontdoor import parse

    gpu = ["--device", "cuda", "--model-path", "org/model"]
    assert parse(gpu)[0].prefill_attention is PrefillKind.AUTO
    config, given, _ = parse([*gpu, "--margingate-prefill-attention", "triton"])
    assert config.prefill_attention is PrefillKind.TRITON
    assert "--margingate-prefill-attention" not in given
    assert MarginGateConfig(prefill_attention="fa3").prefill_attention is PrefillKind.FA3  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="--margingate-prefill-attention: 'fa2' is unknown; use one of auto, triton, fa3"
    ):
        MarginGateConfig(prefill_attention="fa2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--margingate-prefill-attention: a CPU has SGLang's own attention only"):
        flags("--margingate-prefill-attention", "fa3")


def test_the_window_and_what_is_kept() -> None:
    config, _ = flags()
    assert config.window is None
    assert str(config.trace_keep) == "30d,20GB"
    config, _ = flags("--margingate-window", "32", "--margingate-trace-keep", "off")
    assert config.window == 32
    assert config.trace_keep == Keep()
    with pytest.raises(ConfigError, match="--margingate-window: 0"):
        flags("--margingate-window", "0")


def test_help_shows_ours_with_units() -> None:
    from sglang_margingate.serving.frontdoor import build_parser

    text = build_parser().format_help()
    for flag in (
        "policy",
        "threshold",
        "profile",
        "audit-rate",
        "verify-rows",
        "radix",
        "fast-path",
        "chunk",
        "trace-dir",
        "trace-keep",
        "window",
    ):
        assert f"--margingate-{flag}" in text
    assert "LOGITS" in text
    assert "(default: gate)" in text


@pytest.mark.parametrize(
    ("prefix", "prompt", "limit"),
    [(0, 150, 64), (64, 150, 64), (128, 150, 22), (150, 150, None), (100, 150, 28), (0, 10, 10), (0, 64, 64)],
)
def test_chunks_stay_on_the_grid_and_stop_at_the_prompts_end(prefix: int, prompt: int, limit: int | None) -> None:
    from sglang_margingate.runtime.prefill import PrefillRules

    assert PrefillRules(64).chunk_limit(prefix, prompt) == limit


@needs_sglang
def test_every_hook_says_why_and_until_when() -> None:
    from sglang_margingate.serving import hook_table

    every = (
        *hook_table.GATE_HOOKS,
        *hook_table.REQUEST_HOOKS,
        *hook_table.CPU_HOOKS,
        *hook_table.FAST_PATH_HOOKS,
        *hook_table.FAST_PATH_GPU_HOOKS,
        *hook_table.DECODE_GPU_HOOKS,
        *hook_table.VERIFY_CPU_HOOKS,
    )
    assert all(h.why and h.until and h.roles for h in (*every, *hook_table.VERIFY_GPU_HOOKS))
    assert len({h.target for h in every}) == len(every)


@needs_sglang
@pytest.mark.parametrize(
    ("policy", "fast_path", "names"),
    [
        ("gate", "canonical", ["FAST_PATH_GPU_HOOKS", "DECODE_GPU_HOOKS"]),
        ("gate", "stock", ["VERIFY_GPU_HOOKS", "DECODE_GPU_HOOKS"]),
        ("always", "stock", ["VERIFY_GPU_HOOKS", "DECODE_GPU_HOOKS"]),
        ("log", "stock", []),
        ("off", "stock", []),
    ],
)
def test_attention_on_a_gpu_is_touched_where_something_is_promised(
    monkeypatch: pytest.MonkeyPatch, policy: str, fast_path: str, names: list[str]
) -> None:
    from sglang_margingate.serving import hook_table

    monkeypatch.setattr(hook_table.cpu, "is_cpu_host", lambda: False)
    config = MarginGateConfig(policy=Policy(policy), fast_path=FastPathMode(fast_path))
    touched = [h for h in hook_table.wanted(config, hook_table.SCHEDULER) if ".attention." in h.target]
    expected = [h for name in names for h in getattr(hook_table, name) if ".attention." in h.target]
    assert touched == expected
    assert len({h.target for h in touched}) == len(touched), "two hooks on one place"


@needs_sglang
@pytest.mark.parametrize(
    ("policy", "fast_path", "ours"),
    [("gate", "canonical", True), ("gate", "stock", True), ("always", "stock", True), ("log", "stock", False),
     ("off", "stock", False)],
)  # fmt: skip
def test_attention_on_a_cpu_is_ours_where_something_is_promised(
    monkeypatch: pytest.MonkeyPatch, policy: str, fast_path: str, ours: bool
) -> None:
    from sglang_margingate.serving import hook_table

    monkeypatch.setattr(hook_table.cpu, "is_cpu_host", lambda: True)
    config = MarginGateConfig(policy=Policy(policy), fast_path=FastPathMode(fast_path))
    touched = [h for h in hook_table.wanted(config, hook_table.SCHEDULER) if ".attention." in h.target]
    assert touched == (list(hook_table.VERIFY_CPU_HOOKS) if ours else [])
    assert hook_table.wanted(config, hook_table.LAUNCHER) == [
        h for h in hook_table.REQUEST_HOOKS if hook_table.LAUNCHER in h.roles
    ]


@needs_sglang
@pytest.mark.parametrize(
    ("replace", "says"),
    [
        ("", "did not load"),
        ("hooks._installed = tuple(hook_table.wanted(MarginGateConfig(), hooks.role()))", "did not attach"),
        ("hooks.install([gone])", "because a test"),
    ],
    ids=["the plugin did not load", "nothing registered", "target gone"],
)
def test_a_hook_that_did_not_attach_is_refused(sglang: SGLangProcess, replace: str, says: str) -> None:
    code = f"""
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.serving import hook_table, hooks
gone = hooks.Hook("sglang.srt.plugins.nothing", "after", print, (hooks.LAUNCHER,), "a test", "never")
{replace}
try:
    hooks.check()
except hooks.HookError as error:
    print("refused:", error)
"""
    done = sglang.run(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused:" in done.stdout
    assert says in done.stdout


@needs_sglang
def test_layers_that_the_probe_does_not_know_are_named(sglang: SGLangProcess) -> None:
    code = """
import torch
from sglang_margingate.serving.layers.kinds import unknown_layers
plain = torch.nn.Sequential(torch.nn.Embedding(4, 4), torch.nn.LayerNorm(4))
assert unknown_layers(plain) == []
odd = torch.nn.Sequential(plain, torch.nn.Conv1d(4, 4, 3))
print(unknown_layers(odd))
odd.lm_head = plain
print(unknown_layers(odd))
"""
    done = sglang.run(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "['1 (Conv1d)']",
        "['1 (Conv1d)', 'lm_head (Sequential without a weight or a logits processor)']",
    ]


@needs_sglang
@pytest.mark.parametrize(("fp32", "method"), [(False, "matmul"), (True, "matmul in fp32")])
def test_the_probe_multiplies_through_the_servers_own_head(sglang: SGLangProcess, fp32: bool, method: str) -> None:
    """With --enable-fp32-lm-head the head has another map, of what is really run."""
    code = f"""
import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang_margingate.canonical.layer_probe import probe_layers
from sglang_margingate.serving.layers.kinds import layer_kinds
processor = LogitsProcessor.__new__(LogitsProcessor)
torch.nn.Module.__init__(processor)
processor.use_fp32_lm_head, processor.rl_on_policy_target = {fp32}, None
model = torch.nn.Module()
model.logits_processor, model.lm_head = processor, torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
(kind,) = layer_kinds(model)
x = torch.randn(3, 64).bfloat16()
print(kind.describe(), kind.apply(x, None).dtype, torch.equal(kind.apply(x, None), processor._compute_lm_head(x, model.lm_head)))
print(sorted(probe_layers([kind], [1, 2, 3], {{}}).layers[0].labels))
"""
    done = sglang.run(code)
    assert done.returncode == 0, done.stderr[-2000:]
    dtype = "torch.float32" if fp32 else "torch.bfloat16"
    assert done.stdout.splitlines() == [f"bfloat16, {method}, no bias {dtype} True", "[1, 2, 3]"]


@needs_sglang
@pytest.mark.parametrize(("rows", "notes"), [(16, 0), (17, 1)])
def test_a_prefill_that_really_left_the_class_is_noted(monkeypatch: pytest.MonkeyPatch, rows: int, notes: int) -> None:
    import torch

    from sglang_margingate.canonical.classes import Classes
    from sglang_margingate.canonical.invariance import InvarianceMap, RowSizes
    from sglang_margingate.runtime.prefill import Chunk, PrefillRules
    from sglang_margingate.runtime.view import SHAPE
    from sglang_margingate.serving import shape_hooks

    sizes = RowSizes((8, 16))
    monkeypatch.setattr(shape_hooks, "_classes", Classes(InvarianceMap([]), sizes, sizes, sizes, 8))
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False), input_ids=torch.zeros(rows), extend_seq_lens_cpu=[rows]
    )

    def layers(*_: object) -> None:
        shape_hooks.linear(lambda _m, _l, x: x, None, None, torch.zeros(rows, 2))

    shape_hooks.run_eagerly(layers, None, batch)
    why_not = PrefillRules(64, isolated=False).why_not_canonical(Chunk(0, 7, 7), 2, getattr(batch, SHAPE))
    assert (why_not is not None) == bool(notes)


def test_rooms_do_not_shadow_packages() -> None:
    """SGLang imports Hugging Face's `kernels`; our folder of that name must stay a plain folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    names = ("kernels", "dashboard", "tests", "traces")
    code = f"import importlib.util as u; print(*[s.origin for s in map(u.find_spec, {names}) if s and s.origin], sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [origin for origin in done.stdout.splitlines() if Path(origin).is_relative_to(ROOT)]


def test_the_plugin_is_inert_without_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_margingate.serving import plugin

    monkeypatch.delenv("MARGINGATE_CONFIG", raising=False)
    monkeypatch.setattr(plugin, "_loaded", False)
    plugin.load()
    assert plugin._loaded is False


def test_test_knobs_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_margingate.runtime.faults import TestKnobs

    for name in ("POISON", "FLIP_RATE", "SHARE", "BREAK"):
        monkeypatch.delenv(f"MARGINGATE_TEST_{name}", raising=False)
    assert TestKnobs().active == []
    monkeypatch.setenv("MARGINGATE_TEST_POISON", "x")
    with pytest.raises(ConfigError, match="MARGINGATE_TEST_POISON"):
        TestKnobs()


def test_what_stands_at_the_start_is_not_collected_again() -> None:
    from sglang_margingate.serving.hooks import spare_collector

    standing: list[Any] = [[]]
    standing[0].append(standing)  # a circle: the collector's business, were it looked at
    before, gone = gc.get_freeze_count(), weakref.WeakSet()
    try:
        spare_collector()
        assert gc.get_freeze_count() > before
        assert not any(thing is standing for thing in gc.get_objects())

        class Thing:
            def __init__(self) -> None:
                self.itself = self

        gone.add(Thing())
        gc.collect()
        assert not gone, "what is made later is collected as before"
    finally:
        gc.unfreeze()
