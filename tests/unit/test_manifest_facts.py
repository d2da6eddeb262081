"""The manifest says how a run was served and holds no secret of the server."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_process import SGLangProcess

from sglang_margingate.config import MarginGateConfig
from sglang_margingate.settings.clear import SET, clear_settings, clear_value, without_credentials
from sglang_margingate.settings.manifest import run_facts, server_facts

MARKER = "s3cr3t"


def facts(config: MarginGateConfig, args: Any) -> dict[str, Any]:
    return run_facts(config, args, server_facts(args, "torch.bfloat16"), [])


def args(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"model_path": "org/model", "device": "cpu", "attention_backend": "torch_native", **given})


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_no_setting_of_sglang_can_carry_a_secret_into_the_manifest(sglang: SGLangProcess) -> None:
    """Every setting that is not a number is given a secret, in the forms that a text, a list or an object could have."""
    code = f"""
import copy, dataclasses
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.serving.frontdoor import parse
from sglang_margingate.settings import manifest
from sglang_margingate.settings.manifest import run_facts, server_facts
from sglang_margingate.settings.support import check_server_args
manifest.versions = dict  # they read files, and thousands of times what no setting changes
config, flags, _ = parse(["--device", "cpu", "--margingate-allow-untested"])
plain = prepare_server_args(flags)
MARKER = {MARKER!r}
forms = [MARKER, "http://user:" + MARKER + "@host/x?token=" + MARKER, {{MARKER: MARKER}}, [MARKER], [{{"k": MARKER}}]]
absolute = ("tokenizer_worker_num", "detokenizer_worker_num", "smg_grpc_mode", "grpc_mode", "grpc_port", "sidecar", "use_ray",
            "encoder_only")
tried, leaks = 0, []
for form in forms:
    for field in dataclasses.fields(ServerArgs):
        if field.name in ("device", "cuda_graph_config", "chunked_prefill_size", "model_path"):
            continue  # looked into by the checks themselves; the model is named on purpose, see below
        args = copy.copy(plain)
        object.__setattr__(args, field.name, form)  # the object is closed once it is resolved
        notes = [] if field.name in absolute else check_server_args(args, config)
        tried += 1
        text = json.dumps([run_facts(config, args, server_facts(args, "torch.bfloat16"), []), notes])
        if MARKER in text:
            leaks.append(field.name)
print(json.dumps([tried, leaks]))
"""
    tried, leaks = sglang.value(code)
    assert tried > 2000
    assert leaks == []


def test_what_was_set_is_said_without_its_value() -> None:
    given = clear_settings(
        args(api_key=MARKER, tp_size=2, dtype="bfloat16", enable_metrics=True, revision=None, host="h")
    )
    assert given == {
        "api_key": SET, "attention_backend": "torch_native", "device": "cpu", "dtype": "bfloat16", "enable_metrics": True,
        "host": SET, "model_path": SET, "tp_size": 2,
    }  # fmt: skip


def test_a_name_that_is_not_listed_is_a_text_like_any_other() -> None:
    assert clear_value("dtype", "float16") == "float16"
    assert clear_value("dtype", MARKER) == SET
    assert clear_value("dtype", [MARKER]) == clear_value("dtype", {"k": MARKER}) == SET
    assert clear_value("quantization", f"awq {MARKER}") == SET


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("org/model", "org/model"),
        ("/models/a@b", "/models/a@b"),
        (f"https://user:{MARKER}@host/m", "https://host/m"),
        (f"s3://{MARKER}@bucket/m?key={MARKER}", "s3://bucket/m"),
        (f"https://a@b:{MARKER}@host", "https://host"),
    ],
)
def test_the_model_is_named_without_credentials(given: str, shown: str) -> None:
    assert without_credentials(given) == shown
    found = facts(MarginGateConfig(), args(model_path=given))
    assert found["model_path"] == shown
    assert MARKER not in json.dumps(found)


def test_test_knobs_stand_in_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert facts(MarginGateConfig(), args())["test_knobs"] == []
    monkeypatch.setenv("MARGINGATE_TEST_FLIP_RATE", "0.2")
    assert facts(MarginGateConfig(), args())["test_knobs"] == ["flip_rate"]


def test_our_own_settings_stand_whole() -> None:
    ours = facts(MarginGateConfig(trace_dir="/t"), args())["flags"]["margingate"]
    assert (ours["trace_dir"], ours["trace_keep"], ours["policy"]) == ("/t", "30d,20GB", "gate")
