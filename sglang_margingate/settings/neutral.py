"""Settings of SGLang that were read and found to leave alone what a row computes and where its columns are stored.

Every field of ``ServerArgs`` stands either here or in :mod:`~sglang_margingate.settings.rules`; a unit test
enumerates them. A field belongs here when no value of it can break a claim. A new field of a new SGLang stands in neither
until somebody has read what it does, and until then only its default is served.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Settings that are neutral for one reason."""

    why: str
    fields: tuple[str, ...]


def _group(why: str, fields: str) -> Group:
    return Group(why, tuple(fields.split()))


NEUTRAL: tuple[Group, ...] = (
    _group(
        "which model, and how its files are read: self-test, map and trials run on what was loaded",
        """
        model_path revision model_config_parser json_model_override_args trust_remote_code context_length
        model_loader_extra_config custom_weight_loader weight_loader_disable_mmap weight_loader_prefetch_checkpoints
        weight_loader_prefetch_num_threads weight_loader_drop_cache_after_load download_dir model_checksum
        delete_ckpt_after_loading decrypted_config_file decrypted_draft_config_file weight_version weight_cache_socket
        weight_cache_timeout remote_instance_weight_loader_seed_instance_ip
        remote_instance_weight_loader_seed_instance_service_port remote_instance_weight_loader_send_weights_group_ports
        remote_instance_weight_loader_backend remote_instance_weight_loader_start_seed_via_transfer_engine
        engine_info_bootstrap_port modelexpress_config
        """,
    ),
    _group(
        "the head in fp32: the probe and every verify multiply through the server's own head",
        "enable_fp32_lm_head",
    ),
    _group(
        "which tokens a prompt becomes: a row is computed from tokens",
        """
        tokenizer_path tokenizer_mode tokenizer_backend skip_tokenizer_init chat_template hf_chat_template_name
        completion_template default_chat_template_kwargs allow_auto_truncate enable_dynamic_batch_tokenizer
        dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout enable_tokenizer_batch_encode
        """,
    ),
    _group(
        "what a client sees of tokens that are chosen already",
        """
        reasoning_parser tool_call_parser tool_server stream_interval batch_notify_size
        stream_response_default_include_usage incremental_streaming_output enable_cache_report served_model_name
        disable_tokenizer_batch_decode
        """,
    ),
    _group(
        "defaults and limits of requests: each request's own parameters decide whether it is gated",
        "sampling_defaults preferred_sampling_params random_seed max_queued_requests enable_custom_logit_processor",
    ),
    _group(
        "what a grammar allows: its mask is a function of the tokens so far",
        "constrained_json_whitespace_pattern constrained_json_disable_any_whitespace disable_outlines_disk_cache",
    ),
    _group(
        "who shares a forward and when it runs: what the gate exists to be independent of",
        """
        max_running_requests max_prefill_tokens prefill_max_requests chunked_prefill_size schedule_policy
        schedule_conservativeness retraction_policy disable_overlap_schedule num_continuous_decode_steps
        scheduler_recv_interval min_free_slots_delay default_priority_value abort_on_priority_when_disabled
        disable_priority_preemption schedule_low_priority_values_first priority_scheduling_preemption_threshold
        enable_prefill_delayer prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark
        prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets prefill_delayer_queue_min_ratio
        prefill_delayer_max_delay_ms
        """,
    ),
    _group(
        "how much is stored, not what: a column that does not fit is computed again",
        "mem_fraction_static max_total_tokens radix_eviction_policy",
    ),
    _group(
        "folded into cuda_graph_config, which is looked at when resolved; sizes are chosen among the class's",
        """
        cuda_graph_backend_decode cuda_graph_backend_prefill cuda_graph_max_bs_decode cuda_graph_max_bs_prefill
        cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_tc_compiler disable_prefill_cuda_graph
        disable_decode_cuda_graph disable_cuda_graph enable_profile_cuda_graph enable_cudagraph_gc
        """,
    ),
    _group(
        "where the process runs and how it is watched",
        """
        base_gpu_id gpu_id_step watchdog_timeout soft_watchdog_timeout sleep_on_idle custom_sigquit_handler numa_node
        gc_threshold nccl_port dist_timeout dist_init_addr enable_p2p_check pre_warm_nccl
        """,
    ),
    _group(
        "the HTTP server: the same application with the same checks behind another address, key or protocol",
        """
        host port fastapi_root_path enable_http2 ssl_keyfile ssl_certfile ssl_ca_certs ssl_keyfile_password
        enable_ssl_refresh api_key admin_api_key file_storage_path skip_server_warmup warmups asr_max_buffer_seconds
        asr_max_concurrent_sessions sidecar_args smg_http_sidecar_port
        """,
    ),
    _group(
        "logs, metrics and profiles: they read",
        """
        log_level log_level_http log_requests log_requests_level log_requests_format log_requests_target
        uvicorn_access_log_exclude_prefixes crash_dump_folder show_time_cost enable_metrics enable_mfu_metrics
        enable_metrics_for_all_schedulers load_snapshot_publish_interval tokenizer_metrics_custom_labels_header
        tokenizer_metrics_allowed_custom_labels extra_metric_labels bucket_time_to_first_token
        bucket_inter_token_latency bucket_e2e_request_latency prompt_tokens_buckets generation_tokens_buckets
        gc_warning_threshold_secs decode_log_interval enable_request_time_stats_logging kv_events_config
        enable_forward_pass_metrics forward_pass_metrics_worker_id forward_pass_metrics_ipc_name enable_trace
        trace_modules otlp_traces_endpoint export_metrics_to_file export_metrics_to_file_dir stat_loggers
        enable_layerwise_nvtx_marker expert_distribution_recorder_mode expert_distribution_recorder_buffer_size
        enable_expert_distribution_metrics kv_canary_real_data kv_canary_sweep_interval debug_tensor_dump_layers
        """,
    ),
    _group(
        "which scheduler gets a request: each gives the same answer",
        "load_balance_method",
    ),
    _group(
        "read only with layers, contexts or batches spread over ranks, which is refused, or by models that are; and what "
        "switches a fused kernel off",
        """
        pp_max_micro_batch_size pp_async_batch_depth dcp_comm_backend dcp_replicate_q_proj cp_strategy dsa_prefill_cp_mode
        prefill_cp_mode disable_attn_tp_gather enforce_disable_flashinfer_allreduce_fusion enable_scattered_sconv
        moe_dense_tp_size
        """,
    ),
    _group(
        "read only with speculative decoding, which is refused",
        """
        speculative_draft_model_path speculative_draft_model_revision speculative_draft_load_format
        speculative_num_steps speculative_eagle_topk speculative_num_draft_tokens speculative_dflash_block_size
        speculative_dspark_block_size speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path
        speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_single
        speculative_accept_threshold_acc speculative_use_rejection_sampling speculative_token_map
        speculative_attention_mode speculative_draft_attention_backend speculative_draft_window_size
        speculative_moe_runner_backend speculative_moe_a2a_backend speculative_draft_model_quantization
        speculative_skip_dp_mlp_sync enable_multi_layer_eagle speculative_adaptive speculative_adaptive_config
        decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank spec_trace_dir
        speculative_ngram_min_bfs_breadth speculative_ngram_max_bfs_breadth speculative_ngram_match_type
        speculative_ngram_max_trie_depth speculative_ngram_capacity speculative_ngram_external_corpus_path
        speculative_ngram_external_sam_budget speculative_ngram_external_corpus_max_tokens
        """,
    ),
    _group(
        "read only with experts that are spread over ranks, kept on the host or computed by other kernels, which is refused; and what "
        "shares an expert among routed ones, in models that are refused",
        """
        flashinfer_mxfp4_moe_precision deepep_mode fuseep_mode
        deepep_dispatcher_output_dtype ep_dispatch_algorithm eplb_algorithm eplb_rebalance_num_iterations eplb_rebalance_layers_per_chunk
        eplb_min_rebalancing_utilization_threshold deepep_config elastic_ep_backend enable_elastic_expert_backup
        mooncake_ib_device ep_join_mode ep_join_rank_offset elastic_ep_initial_size max_ep_size
        elastic_ep_scale_timeout elastic_ep_rejoin disable_flashinfer_cutlass_moe_fp4_allgather
        disable_shared_experts_fusion enforce_shared_experts_fusion kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts kt_max_deferred_experts_per_token
        disable_flashinfer_autotune flashinfer_autotune_skip_ops
        """,
    ),
    _group(
        "read only by models whose K/V pool is refused when loaded: Mamba, linear, latent, sparse or sliding attention",
        """
        max_mamba_cache_size mamba_ssm_dtype mamba_max_states_per_path enable_mamba_cache_stochastic_rounding
        mamba_cache_philox_rounds mamba_full_memory_ratio mamba_radix_cache_strategy uses_mamba_radix_cache
        mamba_track_interval enable_int8_mamba_checkpoint int8_mamba_ckpt_size mamba_backend linear_attn_backend
        linear_attn_decode_backend linear_attn_prefill_backend linear_attn_verify_backend enable_linear_replayssm
        linear_replayssm_cache_len enable_linear_replayssm_spec disable_chunked_prefix_cache
        flashinfer_mla_disable_ragged dsa_prefill_backend dsa_decode_backend dsa_paged_mqa_logits_backend
        dsa_topk_backend enable_dsa_cache_layer_split enable_deepseek_v4_fp4_indexer swa_full_tokens_ratio
        """,
    ),
    _group(
        "read only for images and sound, whose models are refused",
        """
        mm_attention_backend enable_broadcast_mm_inputs_process enable_prefix_mm_cache mm_enable_dp_encoder
        mm_process_config mm_processor_worker_num mm_io_worker_num limit_mm_data_per_request enable_mm_global_cache
        disable_fast_image_processor mm_feature_transport keep_mm_feature_on_device
        enable_precise_embedding_interpolation encoder_transfer_backend encoder_urls encoder_bootstrap_port
        encoder_register_urls enable_adaptive_dispatch_to_encoder
        """,
    ),
    _group(
        "read only with another setting that is refused: quantisation, LoRA, hierarchical or remote caches, offloading, "
        "disaggregation, overlap of batches, diffusion models, Triton attention, torch.compile",
        """
        modelopt_checkpoint_restore_path modelopt_checkpoint_save_path modelopt_export_path
        fp4_gemm_runner_backend enable_lora_overlap_loading max_lora_rank lora_target_modules max_loaded_loras
        max_loras_per_batch lora_eviction_policy lora_backend max_lora_chunk_size experts_shared_outer_loras
        lora_use_virtual_experts lora_strict_loading lora_drain_wait_threshold hicache_ratio hicache_size
        hicache_write_policy hicache_io_backend hicache_mem_layout hicache_storage_prefetch_policy
        hicache_storage_backend_extra_config hisparse_config lmcache_config_file flexkv_config_file
        offload_num_in_group offload_prefetch_step offload_mode disaggregation_transfer_backend
        disaggregation_bootstrap_port disaggregation_ib_device disaggregation_decode_enable_radix_cache
        num_reserved_decode_tokens disaggregation_decode_extra_slots disaggregation_decode_polling_interval
        optimistic_prefill_attempts pdmux_config_path sm_group_num tbo_token_distribution_threshold
        dllm_algorithm_config dllm_fdfo triton_attention_reduce_in_fp32 triton_attention_num_kv_splits
        triton_attention_split_tile_size enable_torch_compile_debug_mode torch_compile_max_bs
        enable_weights_cpu_backup enable_draft_weights_cpu_backup
        """,
    ),
    _group(
        "of SGLang 0.5.20 and 0.5.23: when prefills are scheduled, and what only batches spread over ranks or gRPC read, which "
        "are refused",
        "prefill_decode_interval prefill_decode_interval_min_bs boundary_reduction grpc_worker_threads",
    ),
)


def neutral_fields() -> frozenset[str]:
    """Return the names of all neutral settings."""
    return frozenset(name for group in NEUTRAL for name in group.fields)
