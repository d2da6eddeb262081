"""Settings of SGLang that can break a claim: which values were tested, and what the others break.

Every field of ``ServerArgs`` stands either here or in :mod:`~sglang_margingate.settings.neutral`. Values are looked
at as SGLang resolved them, so a value that SGLang itself chose for a model is judged too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_margingate.config import MarginGateConfig, Radix
from sglang_margingate.runtime.namespaces import BACKEND_NAME, uses_backend
from sglang_margingate.settings.models import EIGHT_BITS

Accepts = Callable[[Any, Any, MarginGateConfig], bool]
"""Whether a value is fine, given the whole ``ServerArgs`` and our configuration."""


def _off(*fine: Any) -> Accepts:
    """Accept what is not set (None, False, 0, empty) and the values of `fine`."""
    return lambda value, _args, _config: not value or value in fine


_UNSET = _off()


def _attention(value: Any, args: Any, _config: MarginGateConfig) -> bool:
    return value in (None, "torch_native" if args.device == "cpu" else "flashinfer")


def _graphs(value: Any, args: Any, _config: MarginGateConfig) -> bool:
    """Prefill graphs pad chunks to sizes of their own; decode graphs were tested whole or not at all."""
    if value is None:
        return True
    decode = ("full", "disabled", None) if args.device != "cpu" else ("disabled", None)
    return value.prefill.backend in ("disabled", None) and value.decode.backend in decode


def _counts(value: Any, _args: Any, _config: MarginGateConfig) -> bool:
    return isinstance(value, int) and value >= 1


def _one_rank(value: Any, args: Any, _config: MarginGateConfig) -> bool:
    """Accept anything where there is nothing to add up, else only what is not set."""
    return not value or args.tp_size == 1


def _two_ranks(value: Any, args: Any, _config: MarginGateConfig) -> bool:
    return not value or args.tp_size <= 2


def _radix_off(value: Any, _args: Any, config: MarginGateConfig) -> bool:
    return not value or config.radix in (Radix.OFF, Radix.STOCK)


def _radix_backend(value: Any, _args: Any, config: MarginGateConfig) -> bool:
    return value == (BACKEND_NAME if uses_backend(config) else None)


@dataclass(frozen=True)
class Rule:
    """Settings whose other values break one claim.

    Parameters
    ----------
    fields
        Names in ``ServerArgs``.
    why
        What another value breaks.
    accepts
        Which values are fine; by default only what is not set.
    fix
        What to do other than leave it out.
    absolute
        Refused under every policy that attaches hooks, and not served with the override either: what it breaks is not a
        guarantee but the checks of requests.
    """

    fields: tuple[str, ...]
    why: str
    accepts: Accepts = _UNSET
    fix: str = ""
    absolute: bool = False


def _rule(fields: str, why: str, accepts: Accepts = _UNSET, fix: str = "", absolute: bool = False) -> Rule:
    return Rule(tuple(fields.split()), why, accepts, fix, absolute)


RULES: tuple[Rule, ...] = (
    # Requests would pass by the checks, the status page and the summaries, which live in one HTTP process.
    _rule("tokenizer_worker_num", "several HTTP processes have no status page and answer wrong margingate_ parameters with 200",
          _off(1), absolute=True),
    _rule("detokenizer_worker_num", "answers would travel by a router that was never tested", _off(1), absolute=True),
    _rule("smg_grpc_mode grpc_mode grpc_port sidecar", "requests would pass by the HTTP server's checks", absolute=True),
    _rule("use_ray encoder_only", "its processes do not start through the front door", absolute=True),
    # What a row computes.
    _rule("dtype", "only bfloat16 was tested", _off("auto", "bfloat16")),
    _rule("kv_cache_dtype", "K/V of 8 bits: our attention kernels read 16 only, and a scale that is taken anew would round a column again", _off("auto", "bfloat16", "bf16")),
    _rule("quantization", "kernels of this quantisation were never probed for row-invariance", _off("unquant", *EIGHT_BITS)),
    _rule("moe_runner_backend", "only SGLang's Triton experts can be kept at one configuration", _off("auto", "triton")),
    _rule("moe_a2a_backend", "tokens would travel to experts on other ranks", _off("none")),
    _rule("enable_fused_moe_sum_all_reduce", "the outputs of experts would be added by atomics, in the order of arrival"),
    _rule("enable_eplb init_expert_location ep_num_redundant_experts enable_waterfill",
          "copies of an expert would be chosen by load", _off("trivial")),
    _rule("fp8_gemm_runner_backend", "only DeepGEMM, CUTLASS and Triton products of 8 bits can be probed",
          _off("auto", "deep_gemm", "cutlass", "triton")),
    _rule("quantization_param_path modelopt_quant quantize_and_serve rl_quant_profile torchao_config kt_weight_path",
          "kernels of quantised models were never probed for row-invariance"),
    _rule("load_format", "it loads quantised weights, or weights that no start-up check can see",
          _off("auto", "pt", "safetensors", "npcache", "dummy", "sharded_state", "presharded", "mistral", "fastsafetensors",
               "runai_streamer")),
    _rule("weight_cache_mode", "weights shared between processes were never tested", _off("off")),
    _rule("checkpoint_engine_wait_weights_before_ready", "weights that arrive after the self-test are not what it tried"),
    _rule("model_impl", "layers that are not SGLang's own are neither padded nor probed", _off("auto", "sglang")),
    _rule("enable_tf32_matmul", "fp32 products would round otherwise than in a kept map"),
    _rule("bf16_gemm_backend", "its kernels are chosen by the number of rows and were never probed", _off("auto", "torch")),
    _rule("enable_fused_qk_norm_rope", "the fused kernel was never probed for row-invariance"),
    _rule("enable_deterministic_inference rl_on_policy_target",
          "SGLang's own deterministic mode already fixes the kernels",
          fix="run it with --margingate-policy log to observe it"),
    _rule("enable_torch_compile", "compiled kernels are chosen by the number of rows and were never probed"),
    _rule("device", "only CPUs and NVIDIA GPUs were tested", _off("cpu", "cuda")),
    _rule("attention_backend prefill_attention_backend decode_attention_backend",
          "only flashinfer on a GPU and torch_native on a CPU were tested", _attention),
    _rule("sampling_backend", "only flashinfer and pytorch were tested", _off("flashinfer", "pytorch")),
    _rule("grammar_backend", "only the masks of xgrammar were tested on verified rows", _off("xgrammar", "none")),
    _rule("enable_strict_thinking", "its token filter was never tested on verified rows"),
    _rule("enable_mis", "several items of a prompt would be masked from each other"),
    _rule("enable_lora lora_paths", "adapter kernels were never probed for row-invariance"),
    _rule("forward_hooks msprobe_dump_config debug_tensor_dump_output_folder debug_tensor_dump_input_file",
          "code of others would run inside the forward"),
    _rule("enable_multimodal language_only", "prompts of images and sound were never tested"),
    _rule("is_embedding prefill_only_disable_kv_cache", "nothing is decoded, so nothing can be gated"),
    _rule("dllm_algorithm", "steps would choose several tokens at once"),
    # Which rows share a forward, and at which shape.
    _rule("enable_mixed_chunk", "prefill and decode rows would share a forward"),
    _rule("enable_dynamic_chunking", "chunks would leave their grid"),
    _rule("enable_priority_scheduling", "preempted requests were never tested"),
    _rule("speculative_algorithm", "steps would choose several tokens at once"),
    _rule("decoupled_spec_role", "steps would choose several tokens at once", _off("null")),
    _rule("enable_two_batch_overlap enable_single_batch_overlap enable_pdmux", "rows would be split over two forwards"),
    _rule("cuda_graph_config", "prefill graphs pad chunks to sizes of their own, and of decode graphs only `full` was tested",
          _graphs, "set --cuda-graph-backend-prefill disabled, and no decode back end"),
    _rule("disable_cuda_graph_padding", "batches would leave the sizes of the class"),
    _rule("debug_cuda_graph", "graphs would be broken into eager pieces"),
    _rule("enable_return_hidden_states return_hidden_states_mode", "graphs would be captured again while serving"),
    _rule("enable_return_routed_experts enable_return_indexer_topk", "its outputs were never tested on verified rows"),
    # Where columns are stored, and who reads them.
    _rule("disable_radix_cache", "the gate brings its own prefix cache", _radix_off, "set --margingate-radix off"),
    _rule("radix_cache_backend", "the gate brings its own prefix cache", _radix_backend, "set --margingate-radix off or stock"),
    _rule("page_size", "prefix hits and repairs work on single tokens", _off(1)),
    _rule("enable_streaming_session enable_session_radix_cache", "a session's columns would pass by the canonical tree"),
    _rule("strip_thinking_cache", "the columns that are shared would not be those of the answer"),
    _rule("enable_page_major_kv_layout enable_unified_memory disable_hybrid_swa_memory",
          "another layout of the K/V pool was never tested"),
    _rule("enable_hierarchical_cache hicache_storage_backend enable_lmcache enable_flexkv",
          "columns would leave and re-enter without provenance"),
    _rule("enable_hisparse", "attention would leave columns out"),
    _rule("kv_canary", "it writes into the K/V pool", _off("none")),
    _rule("enable_memory_saver", "columns and graphs would be released while requests stand on them"),
    _rule("cpu_offload_gb", "layers would be streamed from the host; never tested"),
    _rule("offload_group_size", "layers would be streamed from the host; never tested", _off(-1)),
    _rule("disaggregation_mode", "prefill would run in another process", _off("null")),
    _rule("disaggregation_decode_enable_offload_kvcache", "columns would leave and re-enter without provenance"),
    # More than one GPU.
    _rule("tp_size dp_size", "it is no number of GPUs", _counts),
    _rule("pp_size", "the step hook sees only the last stage's K/V", _off(1)),
    _rule("ep_size dcp_size attn_cp_size moe_dp_size dwdp_size", "rows or experts would be spread over ranks; never tested", _off(1)),
    _rule("nnodes", "several machines were never tested", _off(1)),
    _rule("node_rank", "several machines were never tested"),
    _rule("enable_mscclpp enable_torch_symm_mem enable_nccl_nvls enable_flashinfer_allreduce_fusion enable_aiter_allreduce_fusion "
          "flashinfer_allreduce_fusion_backend",
          "the sum over ranks would be made by another kernel at some sizes, and a row's bits depend on the batch", _one_rank),
    _rule("disable_custom_all_reduce",
          "NCCL would add up, from three ranks on in an order that it chooses by size", _two_ranks),
    _rule("enable_tp_lm_head_all_to_all", "logits of a row would be on one rank only"),
    _rule("enable_dp_attention enable_dp_attention_local_control_broadcast enable_dp_lm_head enable_attn_tp_input_scattered",
          "rows would be gathered over ranks"),
    _rule("enable_prefill_cp enable_prefill_context_parallel enable_dsa_prefill_context_parallel enable_cp_decode_attn_tp",
          "rows would be split over ranks"),
    _rule("enable_symm_mem enable_quant_communications", "its collectives were never probed for row-invariance"),
    # Settings of SGLang 0.5.20 and 0.5.23.
    _rule("enable_watermark watermark_default_enabled watermark_enforce_all",
          "a mark moves tokens after their margin was read, and a verify would undo it"),
    _rule("enable_nvidia_megakernel", "its kernels pass by the layers that are padded and probed"),
    _rule("enable_kv_cache_sharding enable_paged_experts", "another layout of the memory was never tested"),
)  # fmt: skip


def ruled_fields() -> tuple[str, ...]:
    """Return the names of all settings with a rule, in the order of the table."""
    return tuple(name for rule in RULES for name in rule.fields)


OFF = ("", "0", "false", "no", "off", "n")
ON = ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class EnvRule:
    """Environment variables of SGLang, read by its kernels and layers rather than by ``ServerArgs``."""

    names: tuple[str, ...]
    why: str
    fine: tuple[str, ...] = OFF
    """Values, in lower case, that say what SGLang does without the variable."""
    absolute: bool = False


def _env(names: str, why: str, fine: tuple[str, ...] = OFF, absolute: bool = False) -> EnvRule:
    return EnvRule(tuple(names.split()), why, fine, absolute)


ENVIRONMENT: tuple[EnvRule, ...] = (
    _env("SGLANG_GRPC_PORT SGLANG_RUST_SERVER", "requests would pass by the HTTP server's checks", absolute=True),
    _env("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "SGLang's own deterministic mode already fixes the kernels"),
    _env("SGLANG_FORCE_FUSED_OP_BACKEND SGLANG_ROPE_CACHE_FP32 SGLANG_SANITIZE_NAN_LOGITS SGLANG_USE_CPU_ENGINE "
         "SGLANG_USE_AITER SGLANG_USE_AITER_UNIFIED_ATTN SGLANG_USE_MLX SGLANG_DEBUG_REVERT_PR",
         "kernels other than those tested would run"),
    _env("SGLANG_OPT_BF16_FP32_GEMM_ALGO", "matrix products other than those tested would run", ("", "cublas")),
    _env("SGLANG_OPT_USE_JIT_NORM SGLANG_OPT_USE_FUSED_STORE_CACHE SGLANG_OPT_USE_FUSED_QK_NORM_ROPE "
         "SGLANG_OPT_USE_GUMBEL_SAMPLE SGLANG_USE_SGL_FA3_KERNEL SGLANG_IS_FLASHINFER_AVAILABLE SGLANG_PREP_IN_CUDA_GRAPH",
         "kernels other than those tested would run", ("", *ON)),
    _env("SGLANG_CPU_QUANTIZATION SGLANG_INT4_WEIGHT SGLANG_USE_DYNAMIC_MXFP4_LINEAR",
         "kernels of quantised models were never probed for row-invariance"),
    _env("SGLANG_FLASHINFER_USE_PAGED SGLANG_SKIP_SOFTMAX_PREFILL_THRESHOLD_SCALE_FACTOR "
         "SGLANG_SKIP_SOFTMAX_DECODE_THRESHOLD_SCALE_FACTOR SGLANG_TRITON_DECODE_ATTN_STATIC_KV_SPLITS",
         "attention other than what was tested would run"),
    _env("SGLANG_ENABLE_TORCH_COMPILE SGLANG_USE_BREAKABLE_CUDA_GRAPH SGLANG_ENABLE_CUDA_GRAPH_DEDUP "
         "SGLANG_EAGER_INPUT_NO_COPY", "graphs other than those tested would run"),
    _env("SGLANG_USE_HND_KVCACHE SGLANG_ENABLE_POST_CAPTURE_KV_SIZING SGLANG_MEMORY_SAVER_CUDA_GRAPH",
         "another layout of the K/V pool was never tested"),
    _env("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE SGLANG_ENABLE_UNIFIED_RADIX_TREE", "the gate brings its own prefix cache"),
    _env("SGLANG_ENABLE_COLOCATED_BATCH_GEN", "rows would be split over forwards in an untested way"),
    _env("SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE SGLANG_KV_CANARY_PERTURB_REQ_TO_TOKEN_PROB "
         "SGLANG_KV_CANARY_PERTURB_REAL_KV_USED_PROB SGLANG_KV_CANARY_PERTURB_REAL_KV_UNUSED_CACHE_PROB "
         "SGLANG_KV_CANARY_PERTURB_REAL_KV_POST_FORWARD_PROB SGLANG_KV_CANARY_PERTURB_NEXT_TOKEN_SWAP_PROB",
         "SGLang's own fault injection would run"),
    _env("SGLANG_PLATFORM SGLANG_EXTERNAL_MODEL_PACKAGE", "code of others would run inside the forward"),
)  # fmt: skip
