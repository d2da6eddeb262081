"""Which SGLang configurations are supported, and what happens with the others.

Everything outside what was tested is refused with the reason and the flag that overrides it at guarantee `none`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sglang_margingate.config import ConfigError, MarginGateConfig, Radix

OVERRIDE = "--margingate-allow-untested"


ATTENTION_FLAGS = ("--attention-backend", "--prefill-attention-backend", "--decode-attention-backend")

OLDEST_GPU = (8, 0)
"""Compute capability: the first with bf16 matrix units, which FlashInfer's tensor-core decode needs."""


@dataclass(frozen=True)
class Rule:
    """One configuration that breaks a claim.

    Parameters
    ----------
    feature
        What the user asked SGLang for.
    applies
        Whether a ``ServerArgs`` asks for it.
    why
        What it breaks.
    """

    feature: str
    applies: Any
    why: str


def _set(name: str, *fine: Any) -> Any:
    accepted = (None, False, "", 0, *fine)
    return lambda a: getattr(a, name, None) not in accepted


RULES: tuple[Rule, ...] = (
    Rule("--enable-mixed-chunk", _set("enable_mixed_chunk"), "prefill and decode rows would share a forward"),
    Rule("--speculative-algorithm", _set("speculative_algorithm"), "steps would choose several tokens at once"),
    Rule("--kv-cache-dtype other than auto or bfloat16", lambda a: a.kv_cache_dtype not in ("auto", "bfloat16", "bf16"),
         "a column would be rounded again after its repair; never tested"),
    Rule("a quantised model", _set("quantization"), "its kernels were never probed for row-invariance"),
    Rule("--tp-size over 1", _set("tp_size", 1), "the all-reduce was never probed for row-invariance"),
    Rule("--pp-size over 1", _set("pp_size", 1), "the step hook sees only the last stage's K/V"),
    Rule("--dp-size over 1", _set("dp_size", 1), "never tested"),
    Rule("--enable-lora", _set("enable_lora"), "adapter kernels were never probed for row-invariance"),
    Rule("--enable-hierarchical-cache", _set("enable_hierarchical_cache"), "columns would leave and re-enter without provenance"),
    Rule("--page-size over 1", _set("page_size", 1), "prefix hits and repairs work on single tokens"),
    Rule("--disaggregation-mode", _set("disaggregation_mode", "null"), "prefill would run in another process"),
    Rule("--enable-two-batch-overlap", _set("enable_two_batch_overlap"), "rows would be split over two forwards"),
    Rule("--enable-dp-attention", _set("enable_dp_attention"), "rows would be gathered over ranks"),
    Rule("--enable-deterministic-inference", _set("enable_deterministic_inference"),
         "SGLang's own deterministic mode already fixes the kernels; run it with --margingate-policy log to observe it"),
)  # fmt: skip


def check_server_args(args: Any, config: MarginGateConfig) -> list[str]:
    """Return the notes that lower every guarantee of this server to none; raise where it must not start.

    Raises
    ------
    ConfigError
        The configuration is outside what was tested and the override flag was not given.
    """
    if not config.policy.verifies:
        return []
    broken = [f"{r.feature}: {r.why}" for r in RULES if r.applies(args)]
    for flag in ATTENTION_FLAGS if args.device != "cpu" else ():
        backend = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if backend not in (None, "flashinfer"):
            broken.append(f"{flag} {backend}: only flashinfer was tested on GPUs")
    if broken and not config.allow_untested:
        raise ConfigError(
            f"{broken[0]}. Leave it out, or add {OVERRIDE} to serve it at guarantee none"
            + (f" ({len(broken) - 1} more like it)" if len(broken) > 1 else "")
        )
    size = args.chunked_prefill_size
    if size is not None and 0 < size < config.chunk:
        raise ConfigError(
            f"--chunked-prefill-size {size} is smaller than --margingate-chunk {config.chunk}: chunks would leave their "
            f"grid; raise it to {config.chunk} or lower --margingate-chunk"
        )
    if config.radix is Radix.STOCK:
        broken.append("--margingate-radix stock: a prefix hit may change output")
    return broken


def check_model(model_runner: Any, config: MarginGateConfig) -> list[str]:
    """Check what only the loaded model tells: its kind and dtype. Same contract as :func:`check_server_args`."""
    hf = model_runner.model_config.hf_config
    broken = []
    experts = next((n for n in ("num_experts", "n_routed_experts", "num_local_experts") if getattr(hf, n, 0)), None)
    if experts is not None:
        broken.append(f"a mixture-of-experts model ({experts}={getattr(hf, experts)}): routing was never probed")
    if getattr(hf, "quantization_config", None):
        broken.append("a quantised model: its kernels were never probed for row-invariance")
    if model_runner.is_hybrid_swa or type(model_runner.token_to_kv_pool).__name__ != "MHATokenToKVPool":
        broken.append(f"K/V pool {type(model_runner.token_to_kv_pool).__name__}: only MHATokenToKVPool was tested")
    if model_runner.device != "cpu":
        found = torch.cuda.get_device_capability()
        if found < OLDEST_GPU:
            broken.append(
                f"a GPU of compute capability {found[0]}.{found[1]}: the gate's kernels need 8.0 (Ampere) or newer"
            )
    if broken and config.policy.verifies and not config.allow_untested:
        raise ConfigError(f"{broken[0]}. Add {OVERRIDE} to serve it at guarantee none")
    return broken if config.policy.verifies else []
