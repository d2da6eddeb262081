"""Everything of SGLang's that margingate stands on: its hooks' targets, and what it calls, reads or replaces without a hook.

A call that is new in serving/ gets its line here; a version that lacks a line has ``null`` in its record, and
:data:`EITHER` says which lines stand in for one another.
"""

from __future__ import annotations

from contract import Touch

SRT = "sglang.srt."
RADIX = SRT + "mem_cache.radix_cache."
COMMON = SRT + "mem_cache.common."
RUNNER = SRT + "model_executor."
FLASHINFER = SRT + "layers.attention.flashinfer_backend."
MOE = SRT + "layers.moe."
NATIVE = SRT + "layers.attention.torch_native_backend.TorchNativeAttnBackend."

FUNCTIONS = (
    # requests: what frees, shares and retracts their columns
    COMMON + "release_kv_cache",
    COMMON + "match_kv_cache",
    COMMON + "checkpoint_kv_cache",
    RADIX + "RadixCache.match_prefix",
    RADIX + "RadixCache.insert",
    RADIX + "RadixCache.evict",
    RADIX + "RadixCache.cache_unfinished_req",
    RADIX + "RadixCache.cache_finished_req",
    RADIX + "RadixCache.checkpoint",
    RADIX + "RadixCache._insert_cache",
    RADIX + "RadixCache._split_node",
    RADIX + "RadixKey.match",
    RADIX + "RadixKey.page_aligned",
    RADIX + "RadixKey.child_key",
    SRT + "mem_cache.registry.register_radix_cache_backend",
    SRT + "mem_cache.registry.get_radix_cache_factory",
    SRT + "managers.schedule_batch.Req.reset_for_retract",
    SRT + "managers.schedule_batch.Req.init_next_round_input",
    SRT + "managers.schedule_batch.ScheduleBatch.retract_decode",
    # forwards
    RUNNER + "model_runner.ModelRunner.forward",
    RUNNER + "runner.base_cuda_graph_runner.get_batch_sizes_to_capture",
    RUNNER + "runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.__init__",
    RUNNER + "runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.execute",
    RUNNER + "runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.load_batch",
    RUNNER + "runner.decode_cuda_graph_runner.build_replay_fb_view",
    RUNNER + "graph_shared_output.GraphSharedOutput.__init__",
    RUNNER + "forward_context.forward_context",
    SRT + "mem_cache.kv_index_translator.KVIndexTranslator.own_plan",
    SRT + "mem_cache.kv_index_translator.KVIndexTranslator.rebind_write_loc",
    SRT + "mem_cache.kv_loc_plan.KVLocPlan.bind",
    # attention
    FLASHINFER + "FlashInferAttnBackend.init_forward_metadata",
    FLASHINFER + "FlashInferIndicesUpdaterDecode.call_begin_forward",
    FLASHINFER + "FlashInferIndicesUpdaterPrefill.call_begin_forward",
    NATIVE + "forward_decode",
    NATIVE + "forward_extend",
    NATIVE + "init_forward_metadata",
    SRT + "mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer",
    SRT + "mem_cache.memory_pool.MHATokenToKVPool.get_value_buffer",
    SRT + "mem_cache.memory_pool.MHATokenToKVPool.get_kv_buffer",
    SRT + "mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
    # layers of served models: a way around UnquantizedLinearMethod.apply would leave the class unseen
    SRT + "models.llama.LlamaMLP.forward",
    SRT + "models.llama.LlamaAttention.forward",
    SRT + "models.llama.LlamaDecoderLayer.forward",
    SRT + "models.qwen2.Qwen2MLP.forward",
    SRT + "models.qwen2.Qwen2Attention.forward",
    SRT + "models.qwen3.Qwen3Attention.forward",
    SRT + "models.qwen3_moe.Qwen3MoeSparseMoeBlock.forward_normal",
    SRT + "models.qwen3_moe.Qwen3MoeAttention.forward_prepare",
    SRT + "models.olmoe.OlmoeMoE.forward",
    SRT + "models.olmoe.OlmoeAttention.forward",
    SRT + "models.mixtral.MixtralMoE.forward",
    # experts: what chooses by the number of rows, beside the two hooks
    MOE + "fused_moe_triton.layer.FusedMoE.forward_impl",
    MOE + "topk.select_experts",
    MOE + "topk.fused_topk",
    MOE + "moe_runner.triton_utils.override_config",
    MOE + "moe_runner.triton_utils.fused_moe.fused_experts_impl",
    MOE + "moe_runner.triton_utils.fused_moe._fused_moe_kernel_sequence",
    MOE + "moe_runner.triton_utils.fused_moe_triton_config.try_get_optimal_moe_config",
    MOE + "moe_runner.triton_utils.moe_align_block_size.moe_align_block_size",
    SRT + "layers.quantization.unquant.UnquantizedFusedMoEMethod.forward_cuda",
    # weights of 8 bits
    SRT + "layers.quantization.fp8_utils.deepgemm_w8a8_block_fp8_linear_with_fallback",
    SRT + "layers.quantization.fp8_utils.apply_fp8_linear",
    SRT + "layers.linear.ColumnParallelLinear.forward",
    SRT + "layers.linear.RowParallelLinear.forward",
    SRT + "layers.logits_processor.LogitsProcessor.forward",
    SRT + "layers.logits_processor.LogitsProcessor._get_logits",
    # sampling and its answers
    SRT + "layers.sampler.Sampler.forward",
    SRT + "sampling.sampling_batch_info.SamplingBatchInfo.update_regex_vocab_mask",
    SRT + "sampling.sampling_batch_info.SamplingBatchInfo.apply_logits_bias",
    SRT + "managers.tokenizer_manager.TokenizerManager._stream_one_response",
    SRT + "managers.tokenizer_manager.TokenizerManager._handle_batch_output",
    SRT + "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
    # several GPUs
    SRT + "distributed.parallel_state.get_tp_group",
    SRT + "distributed.parallel_state.graph_capture",
    SRT + "distributed.parallel_state.GroupCoordinator.all_reduce",
    SRT + "distributed.communication_op.tensor_model_parallel_all_reduce",
    SRT + "managers.data_parallel_controller.DataParallelController.round_robin_scheduler",
    # start
    SRT + "server_args.prepare_server_args",
    SRT + "server_args.ServerArgs.get_model_config",
    SRT + "arg_groups.model_override_base.model_config_of",
    SRT + "server_args.ServerArgs.resolve_once",
    SRT + "arg_groups.model_override_base.resolving_view",
    SRT + "runtime_context.get_parallel",
    SRT + "runtime_context.get_exec",
    SRT + "plugins.load_plugins",
    SRT + "plugins.hook_registry.HookRegistry.register",
    SRT + "utils.common.kill_process_tree",
    "sglang.launch_server.run_server",
)

NAMES = (
    Touch(SRT + "managers.schedule_batch.Req", (
        "rid", "origin_input_ids", "output_ids", "sampling_params", "extra_key", "prefix_indices", "prefix_len", "kv",
        "req_pool_idx", "cache_protected_len", "cached_tokens", "finished_reason", "finished_len", "retraction_count",
        "customized_info", "custom_logit_processor", "lora_id", "get_fill_ids", "full_untruncated_fill_ids", "finished", "last_node",
    )),
    Touch(SRT + "managers.schedule_batch.ReqKvInfo", ("req_pool_idx", "cache_protected_len", "cache_inserted_len")),
    Touch(SRT + "mem_cache.base_prefix_cache.MatchResult", ("device_indices", "device_prefix_len", "last_device_node")),
    Touch(SRT + "mem_cache.radix_cache.RadixKey", ("token_ids", "extra_key", "cache_salt")),
    Touch(SRT + "mem_cache.radix_cache.TreeNode", ("children", "key", "value")),
    Touch(SRT + "mem_cache.radix_cache.RadixCache", ("page_size", "disable", "req_to_token_pool")),
    Touch(SRT + "mem_cache.memory_pool.MHATokenToKVPool", ("start_layer", "layer_num", "store_dtype", "dtype")),
    Touch(SRT + "mem_cache.memory_pool", ("KVWriteLoc",)),
    Touch(RUNNER + "forward_batch_info.ForwardBatch", (
        "forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens", "seq_lens_cpu", "orig_seq_lens",
        "out_cache_loc", "seq_lens_sum", "positions", "return_logprob", "spec_algorithm", "capture_hidden_mode",
        "num_token_non_padded_cpu", "global_num_token_non_padded_cpu", "extend_num_tokens", "extend_seq_lens",
        "extend_prefix_lens", "extend_start_loc", "extend_prefix_lens_cpu", "extend_seq_lens_cpu",
        "extend_logprob_start_lens_cpu", "sampling_info", "ngram_embedding_info", "input_embeds", "replace_embeds",
        "token_type_ids", "mm_input_embeds", "mrope_positions", "is_prefill_only",
    )),
    Touch(RUNNER + "forward_batch_info", ("CaptureHiddenMode", "ForwardBatch", "ForwardMode")),
    Touch(RUNNER + "forward_context.ForwardContext", ("attn_backend",)),
    Touch(RUNNER + "model_runner.ModelRunner", (
        "attn_backend", "model", "model_config", "server_args", "device", "dtype", "sampler", "spec_algorithm",
        "is_draft_worker", "req_to_token_pool", "token_to_kv_pool", "max_total_num_tokens", "eager_runner",
        "decode_cuda_graph_runner", "graph_shared_output", "kv_index_translator", "sampling_observer",
        "sliding_window_size", "is_hybrid_swa",
    )),
    Touch(RUNNER + "runner.decode_cuda_graph_runner", ("get_batch_sizes_to_capture", "DecodeCudaGraphRunner")),
    Touch(RUNNER + "runner.decode_cuda_graph_runner.DecodeCudaGraphRunner", ("bs", "capture_bs")),
    Touch(RUNNER + "cuda_graph_config.PhaseConfig", ("backend", "bs")),
    Touch(FLASHINFER + "FlashInferAttnBackend", (
        "decode_use_tensor_cores", "disable_cuda_graph_kv_split", "skip_prefill", "enable_mis", "use_paged",
        "prefill_backend", "prefill_wrappers_paged", "workspace_buffer", "forward_metadata", "token_to_kv_pool",
        "kv_indptr", "cuda_graph_kv_indices",
    )),
    Touch(NATIVE.removesuffix("."), ("req_to_token_pool",)),
    Touch(SRT + "managers.tokenizer_manager.TokenizerManager", (
        "rid_to_state", "preferred_sampling_params", "model_config", "get_internal_state",
    )),
    Touch(SRT + "managers.tokenizer_manager.ReqState", ("customized_info_accumulated",)),
    Touch(RUNNER + "model_runner.ModelRunnerOutput", ("can_run_graph",)),
    Touch(SRT + "layers.radix_attention.RadixAttention", (
        "head_dim", "v_head_dim", "logit_cap", "sliding_window_size", "pos_encoding_mode", "is_cross_attention", "k_scale",
        "v_scale", "k_scale_float", "v_scale_float", "xai_temperature_len", "attn_type", "tp_q_head_num", "layer_id", "scaling",
    )),
    Touch(SRT + "layers.linear", ("LinearBase", "RowParallelLinear")),
    Touch(SRT + "layers.linear.RowParallelLinear", ("reduce_results",)),
    Touch(SRT + "distributed.parallel_state.GroupCoordinator", ("world_size", "rank_in_group")),
    Touch(SRT + "configs.model_config.ModelConfig", (
        "hidden_size", "num_attention_heads", "get_total_num_kv_heads", "get_num_kv_heads", "head_dim", "vocab_size",
    )),
    Touch(SRT + "layers.vocab_parallel_embedding", ("VocabParallelEmbedding",)),
    Touch(SRT + "layers.quantization.unquant", ("F",)),
    Touch(SRT + "layers.logits_processor.LogitsProcessorOutput", ("next_token_logits", "auxiliary_device_output")),
    Touch(SRT + "layers.logits_processor.LogitsProcessor", ("input_logprob_processor",)),
    Touch(SRT + "layers.logprob_processor.InputLogprobProcessor", ("enable_fast_input_logprobs",)),
    Touch(SRT + "layers.rotary_embedding.base", ("_is_cpu",)),
    Touch(SRT + "constrained.xgrammar_backend", ("get_bitmask_shape", "bitmask_dtype")),
    Touch(SRT + "sampling.sampling_batch_info.SamplingBatchInfo", (
        "is_all_greedy", "grammars", "logit_bias", "acc_additive_penalties", "acc_scaling_penalties", "grammar_mask",
        "penalizer_orchestrator", "has_custom_logit_processor", "return_sampling_masks", "has_watermark_candidates",
    )),
    Touch(SRT + "managers.schedule_policy", ("AddReqResult", "PrefillAdder")),
    Touch(SRT + "managers.schedule_policy.PrefillAdder", ("can_run_list", "rem_chunk_tokens")),
    Touch(SRT + "managers.scheduler.Scheduler", ("tp_worker", "tree_cache", "server_args", "tokenizer")),
    Touch(SRT + "plugins.hook_registry", ("HookRegistry", "HookType")),
    Touch(SRT + "entrypoints.http_server", ("app",)),
)  # fmt: skip

EITHER = ((RADIX + "RadixCache.cache_unfinished_req", RADIX + "RadixCache.checkpoint"),)
"""Functions of which every served version has one."""

EITHER_NAME = (
    ((SRT + "managers.schedule_batch.Req", "req_pool_idx"), (SRT + "managers.schedule_batch.ReqKvInfo", "req_pool_idx")),
    ((SRT + "managers.schedule_batch.Req", "cache_protected_len"),
     (SRT + "managers.schedule_batch.ReqKvInfo", "cache_protected_len")),
    ((SRT + "managers.schedule_batch.Req", "prefix_indices"), (SRT + "managers.schedule_batch.Req", "prefix_len")),
    ((SRT + "mem_cache.base_prefix_cache.MatchResult", "device_indices"),
     (SRT + "mem_cache.base_prefix_cache.MatchResult", "device_prefix_len")),
    ((RUNNER + "forward_batch_info.ForwardBatch", "num_token_non_padded_cpu"),
     (RUNNER + "forward_batch_info.ForwardBatch", "global_num_token_non_padded_cpu")),
)  # fmt: skip
"""The same for names that moved: serving/sgl.py finds the one that is there."""


def hook_targets() -> list[str]:
    """Return the targets of all hooks, of every device and configuration."""
    from sglang_margingate.serving import hook_table as hooks

    tables = [value for name, value in vars(hooks).items() if name.endswith("_HOOKS") and isinstance(value, tuple)]
    return sorted({hook.target for table in tables for hook in table})


def touch_points() -> list[Touch]:
    """Return the whole table."""
    functions = dict.fromkeys([*hook_targets(), *FUNCTIONS])
    return [*(Touch(target) for target in functions), *NAMES]
