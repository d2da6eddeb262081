"""What of SGLang's settings may be written down: values that cannot hold a secret.

Numbers and truth values can be shown. A text is shown only where it is one of the names listed here; any other value that
somebody set is recorded as :data:`SET`, because a key, a path with a token or an address with a password looks like any text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

SET = "<set>"
"""Stands for a value that was set and is not shown."""

_DTYPES = "auto half float16 bfloat16 float float32"
_ATTENTION = "flashinfer torch_native triton fa3 fa4 flex_attention intel_amx trtllm_mha cutlass_mla flashmla trtllm_mla wave aiter"

CLEAR: dict[str, frozenset[str]] = {
    name: frozenset(values.split())
    for name, values in {
        "dtype": _DTYPES,
        "kv_cache_dtype": "auto bfloat16 bf16 fp8_e5m2 fp8_e4m3 fp4_e2m1",
        "device": "cpu cuda xpu hpu npu musa",
        "attention_backend": _ATTENTION,
        "prefill_attention_backend": _ATTENTION,
        "decode_attention_backend": _ATTENTION,
        "sampling_backend": "flashinfer pytorch ascend",
        "grammar_backend": "xgrammar outlines llguidance none",
        "radix_cache_backend": "margingate",
        "quantization": "awq fp8 gptq marlin gptq_marlin awq_marlin bitsandbytes gguf modelopt modelopt_fp8 modelopt_fp4 "
        "w8a8_int8 w8a8_fp8 moe_wna16 mxfp4 compressed-tensors unquant",
        "load_format": "auto pt safetensors npcache dummy sharded_state presharded gguf bitsandbytes mistral layered flash_rl "
        "remote remote_instance fastsafetensors private runai_streamer",
        "model_impl": "auto sglang transformers mindspore",
        "tokenizer_mode": "auto slow",
        "schedule_policy": "lpm random fcfs dfs-weight lof priority routing-key",
        "retraction_policy": "length priority",
        "radix_eviction_policy": "lru lfu slru priority",
        "bf16_gemm_backend": "auto cutedsl torch",
        "fp8_gemm_runner_backend": "auto deep_gemm flashinfer_trtllm cutlass triton aiter",
        "fp4_gemm_runner_backend": "auto flashinfer_cudnn flashinfer_cutlass flashinfer_trtllm flashinfer_cutedsl marlin",
        "moe_runner_backend": "auto deep_gemm triton triton_kernel flashinfer_trtllm flashinfer_cutlass cutlass marlin",
        "moe_a2a_backend": "none deepep mooncake",
        "cuda_graph_backend_decode": "full breakable tc_piecewise disabled",
        "cuda_graph_backend_prefill": "full breakable tc_piecewise disabled",
        "cuda_graph_tc_compiler": "eager inductor",
        "disaggregation_mode": "null prefill decode",
        "speculative_algorithm": "EAGLE EAGLE3 NEXTN STANDALONE NGRAM DFLASH DSPARK",
        "kv_canary": "none log raise",
        "sampling_defaults": "openai model",
        "log_level": "debug info warning error critical",
        "log_level_http": "debug info warning error critical",
        "rl_on_policy_target": "fsdp",
    }.items()
}


def clear_value(name: str, value: object) -> object:
    """Return the value of a setting as it may be written down, or :data:`SET`."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str) and value in CLEAR.get(name, ()):
        return str(value)
    return SET


def clear_settings(args: Any) -> dict[str, Any]:
    """Return SGLang's settings as they may be written down: every number, and of other settings those not at their default."""
    declared = declared_defaults(args)
    values = vars(args) if declared is None else {name: getattr(args, name) for name in declared}
    out = {}
    for name, value in sorted(values.items()):
        shown = clear_value(name, value)
        if shown is not None and (shown is not SET or value != (declared or {}).get(name)):
            out[name] = shown
    return out


def record(args: Any) -> Any:
    """Return the object that declares the settings, which may stand behind a view of SGLang's resolved values."""
    if type(args).__name__ not in ("ResolvingConfig", "ResolvedView"):
        return args
    return object.__getattribute__(args, "_server_args")


def declared_defaults(args: Any) -> dict[str, Any] | None:
    """Return the settings that SGLang declares with their defaults, or None of an object that declares none.

    ``ServerArgs`` is a dataclass in 0.5.17 and a msgspec structure in later versions. A default is made anew where a factory
    makes it, and None where there is none. What SGLang keeps for itself among the fields is left out.
    """
    args = record(args)
    if dataclasses.is_dataclass(args):
        return _declared(dataclasses.fields(args), dataclasses.MISSING)
    if hasattr(args, "__struct_fields__"):
        import msgspec

        return _declared(msgspec.structs.fields(args), msgspec.NODEFAULT)
    return None


def _declared(fields: Iterable[Any], missing: Any) -> dict[str, Any]:
    return {f.name: _default(f.default, f.default_factory, missing) for f in fields if not f.name.startswith("_")}


def _default(value: Any, factory: Any, missing: Any) -> Any:
    if value is not missing:
        return value
    return None if factory is missing else factory()


def without_credentials(address: str) -> str:
    """Return a model's name or address without the user, password and query that an address may carry."""
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*://)(.*)", address, re.DOTALL)
    if found is None:
        return address
    rest = found[2].split("?", 1)[0].split("#", 1)[0]
    host, slash, path = rest.partition("/")
    return found[1] + host.rpartition("@")[2] + slash + path
