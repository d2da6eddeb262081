"""Every place where margingate touches SGLang: why, how, until when.

SGLang logs and skips a hook whose target is missing. :func:`.hooks.check` is the answer: a process in which one hook of its
role is not in place refuses to serve, and a launcher whose scheduler did not report refuses as well.

========================================  ====================================================  =======================
Touch point beside the hooks below        Why and how                                           Until
========================================  ====================================================  =======================
``triton`` (triton_stub.py)               a CPU-only environment has none; a stand-in is        SGLang runs on a CPU
                                          installed before SGLang is imported                   without it
radix cache backend ``margingate``        shares canonical columns only (radix.py); SGLang's own    stays: it is an official
                                          registry and flag                                     extension point
``torchvision::nms`` (cpu.py)             PyPI's torchvision fails to import beside a CPU       wheels match
                                          torch; its two operators are declared
``Req`` attribute ``margingate_state``    per-request state that dies with the request          SGLang offers a place
``ForwardBatch`` attributes               the requests behind its rows and when it began (batches.py)  ForwardBatch keeps reqs
``margingate_view``,                      travel with the batch, so that delayed sampling
``margingate_shape``                      (grammar, overlap) finds them; and the shape that it
                                          really ran at (runtime/view.py)
========================================  ====================================================  =======================

State of a process, all of it. Set once at start-up: ``scheduler_hooks._runtime``, ``shape_hooks._classes``, ``._captured``,
``._prefill_graphs``, ``._apart`` and ``._attended``, ``attention_hooks._decode``, ``layers.decode_graphs._layers`` and ``._seen``,
``layers.experts._tables``, ``._filled_up`` and ``._broken_rows``, ``launcher_hooks._rules``, ``hooks._installed``, ``plugin._loaded``
and ``several.group._kept``, the graph of the probe of the all-reduce, whose memory the other ranks have open.
``layers.padding._wide`` is memory behind the rows of a batch, which grows until every layer that is padded by itself has run.
``shape_hooks._running`` is the forward that runs now, None between forwards, ``layers.experts._goes_with`` what its padding goes with
while it is captured. The readers of ``sgl`` and ``cpu.grammars_need_a_gpu`` keep what they found out about this version of SGLang.
"""

from __future__ import annotations

from sglang_margingate.config import FastPathMode, MarginGateConfig, Policy
from sglang_margingate.serving import attention_hooks, cpu, launcher_hooks, scheduler_hooks, shape_hooks
from sglang_margingate.serving.answers import groups, scores
from sglang_margingate.serving.hooks import LAUNCHER, SCHEDULER, Hook
from sglang_margingate.serving.layers import decode_graphs, experts

GATE_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after", scheduler_hooks.begin_forward, (SCHEDULER,),
        "the step hook needs the requests behind the rows and the time the forward began",
        "ForwardBatch carries its requests",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "after", scheduler_hooks.end_forward, (SCHEDULER,),
        "what a forward did is noted where it ends: not every forward has its tokens sampled",
        "SGLang has a forward-done event",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        "around", scheduler_hooks.sample, (SCHEDULER,),
        "margin, gate, verify and repair happen between the logits and the choice of the token",
        "SGLang has a hook between logits and sampling",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.compute_logprobs_only",
        "around", scheduler_hooks.compute_logprobs_only, (SCHEDULER,),
        "log-probabilities of a forward of which no token is chosen are computed row by row too",
        "SGLang's log-probabilities do not depend on the batch",
    ),
    Hook(
        "sglang.srt.layers.logprob_processor.get_top_logprobs_chunk",
        "around", scores.order_prompt_top, (SCHEDULER,),
        "topk orders equal values by its k and the number of rows, which are the neighbours'",
        "SGLang orders equal log-probabilities by token",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.logprob_result_processor.SchedulerLogprobResultProcessor"
        ".add_logprob_return_values",
        "around", scores.add_return_values, (SCHEDULER,),
        "a scoring request shows the log-probability of a token nobody asked for when a neighbour asks for tokens",
        "SGLang answers scoring requests alike in any batch",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.Req.__init__",
        "after", scheduler_hooks.open_request, (SCHEDULER,),
        "a request's policy decides its prefill and its name space in the radix cache before it is first scheduled",
        "SGLang has a request-created event",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.Req.update_finish_state",
        "after", scheduler_hooks.after_finish_state, (SCHEDULER,),
        "a finished request's row and summary are made while its K/V still stands",
        "SGLang has a request-finished event",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
        "around", scheduler_hooks.cumulate_penalties, (SCHEDULER,),
        "with overlap, which tokens SGLang's penalties count depends on who arrives meanwhile",
        "SGLang counts each token of a request once",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "around", scheduler_hooks.add_one_req, (SCHEDULER,),
        "a gated prompt is prefilled alone, its chunks on a fixed grid",
        "SGLang has a per-request prefill policy",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        "around", scheduler_hooks.add_chunked_req, (SCHEDULER,),
        "the same for the later chunks of a prompt",
        "SGLang has a per-request prefill policy",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        "after", scheduler_hooks.set_up, (SCHEDULER,),
        "builds the verifier, runs the self-test, and attests both to the launcher",
        "SGLang has a scheduler-ready event",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        "after", scheduler_hooks.add_status, (SCHEDULER,),
        "GET /margingate/status and /server_info show the gate's counters",
        "SGLang lets plugins add server info",
    ),
    *(
        Hook(
            f"sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name}",
            "after", scheduler_hooks.after_update, (SCHEDULER,),
            "map, self-test and thresholds were made with other weights: the guarantee is lowered",
            "SGLang has a weights-changed event",
        )
        for name in (
            "update_weights_from_disk", "update_weights_from_distributed", "update_weights_from_tensor",
            "update_weights_from_ipc", "release_memory_occupation", "resume_memory_occupation",
        )
    ),
    *(
        Hook(
            f"sglang.srt.managers.scheduler.Scheduler.{name}",
            "after", scheduler_hooks.after_adapter, (SCHEDULER,),
            "layers that came after the start were never probed: the guarantee is lowered",
            "SGLang has a weights-changed event",
        )
        for name in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter")
    ),
)  # fmt: skip

REQUEST_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server",
        "before", launcher_hooks.before_http_server, (LAUNCHER,),
        "refuses to serve unless every scheduler attested, and adds GET /margingate/status",
        "SGLang fails closed on plugins",
    ),
    Hook(
        "sglang.srt.utils.common.kill_process_tree",
        "before", launcher_hooks.before_killing, (LAUNCHER,),
        "where a process of the server ended by itself, SGLang kills the launcher too, which leaves its folder behind",
        "SGLang's launcher ends by an exception",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        "before", launcher_hooks.validate_request, (LAUNCHER,),
        "wrong margingate parameters are answered with HTTP 400 before they reach a batch",
        "SGLang validates custom_params by schema",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request",
        "before", groups.seed_sample, (LAUNCHER,),
        "all samples of a group carry one seed, and would be the same answer n times",
        "SGLang gives each sample of a group a seed of its own",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response",
        "around", launcher_hooks.unpack_summary, (LAUNCHER,),
        "customized_info is a list per token; clients get one object, meta_info.margingate",
        "SGLang has per-request customized info",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._build_chat_response",
        "after", launcher_hooks.add_summaries, (LAUNCHER,),
        "chat answers carry the summary too",
        "OpenAI answers carry customized info",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._generate_chat_stream",
        "around", launcher_hooks.add_to_stream, (LAUNCHER,),
        "the last chunk of every streamed choice carries it",
        "OpenAI answers carry customized info",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._build_completion_response",
        "after", launcher_hooks.add_summaries, (LAUNCHER,),
        "the same for completions",
        "OpenAI answers carry customized info",
    ),
    Hook(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._generate_completion_stream",
        "around", launcher_hooks.add_to_stream, (LAUNCHER,),
        "the same for completions",
        "OpenAI answers carry customized info",
    ),
)  # fmt: skip

LINEAR_METHODS = (
    "unquant.UnquantizedLinearMethod", "fp8.Fp8LinearMethod", "w8a8_fp8.W8A8Fp8LinearMethod",
    "compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod",
)  # fmt: skip
"""What computes linear layers in SGLang, as far as the probe knows it."""

FAST_PATH_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs",
        "before", shape_hooks.choose_shapes, (SCHEDULER,),
        "probes the loaded layers, and has decode graphs captured at sizes at which every layer can be inside its class",
        "the sizes can be chosen after the model is loaded",
    ),
    Hook(
        "sglang.srt.model_executor.runner.eager_runner.EagerRunner.execute",
        "around", shape_hooks.run_eagerly, (SCHEDULER,),
        "prefills are replayed from graphs of our own, other forwards without a graph padded into the canonical class, and "
        "the batch remembers whether they fitted",
        "SGLang captures prefills whose attention needs no plan, at given sizes, and pads eager forwards to such",
    ),
    *(
        Hook(
            f"sglang.srt.layers.quantization.{method}.apply",
            "around", shape_hooks.linear, (SCHEDULER,),
            "the padding of linear layers",
            "SGLang pads eager forwards to given sizes",
        )
        for method in LINEAR_METHODS
    ),
    Hook(
        "sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE.run_moe_core",
        "around", shape_hooks.run_bank, (SCHEDULER,),
        "a forward notes the rows that its experts ran with",
        "SGLang pads eager forwards to given sizes",
    ),
    Hook(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
        "around", shape_hooks.head, (SCHEDULER,),
        "the padding of the layer that makes logits",
        "SGLang pads eager forwards to given sizes",
    ),
)  # fmt: skip

VERIFY_GPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.__init__",
        "after", attention_hooks.set_up_prefill, (SCHEDULER,),
        "FlashInfer's Hopper prefill is not repeatable, and canonical prompt columns must be",
        "FlashInfer's fa3 epilogue waits for all of its warps",
    ),
)  # fmt: skip

DECODE_GPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_decode",
        "around", attention_hooks.decode, (SCHEDULER,),
        "the verify graph, and decode graphs of the canonical fast path, attend with a kernel that cuts a context by its "
        "own length",
        "FlashInfer has a fixed K/V chunk that is safe in CUDA graphs",
    ),
)  # fmt: skip

FAST_PATH_GPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.capture_one_shape",
        "around", decode_graphs.capture, (SCHEDULER,),
        "a decode graph has as many rows as its batch where only a layer or two do not hold so few: those are padded by "
        "themselves, and what all layers ran at is noted",
        "SGLang pads single layers to given sizes",
    ),
    Hook(
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe._prepare_fused_moe_run",
        "around", experts.prepare, (SCHEDULER,),
        "a bank of experts keeps to one table of configurations, settled before the layers are probed",
        "SGLang has such a table outside its deterministic mode",
    ),
    Hook(
        "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe._use_moe_sum_reduce_torch_compile",
        "replace", experts.sum_by_kernel, (SCHEDULER,),
        "the outputs of experts are added by another function up to 32 rows",
        "SGLang has a flag for it outside its deterministic mode",
    ),
    Hook(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.__init__",
        "after", attention_hooks.set_up, (SCHEDULER,),
        "batch-invariant attention: our prefill, FlashInfer's tensor-core decode without K/V split where ours does not fit",
        "SGLang has a flag for each, outside its deterministic mode",
    ),
    Hook(
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend.forward_extend",
        "around", attention_hooks.extend, (SCHEDULER,),
        "the padding rows of a prefill are left out of attention",
        "SGLang pads eager forwards to given sizes",
    ),
    Hook(
        "sglang.srt.model_executor.runner.eager_runner.EagerRunner.load_batch",
        "after", shape_hooks.pad_forward, (SCHEDULER,),
        "a prefill is padded into the canonical class once instead of before every layer",
        "SGLang pads eager forwards to given sizes",
    ),
)  # fmt: skip

CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.__init__",
        "before", cpu.set_rotary_is_cpu, (SCHEDULER,),
        "SGLang imports vLLM for a rotary fallback that it never calls on a CPU",
        "SGLANG_USE_CPU_ENGINE is no longer needed for plain x86",
    ),
    Hook(
        "sglang.srt.constrained.xgrammar_backend._allocate_token_bitmask",
        "replace", cpu.allocate_token_bitmask, (SCHEDULER,),
        "SGLang pins the grammar bitmask, which needs a CUDA driver: one regex request kills the server",
        "SGLang before 0.5.19 is served no more: later versions pin where pinning exists",
        cpu.grammars_need_a_gpu,
    ),
    Hook(
        "sglang.srt.constrained.xgrammar_backend.XGrammarGrammar.apply_vocab_mask",
        "around", cpu.apply_vocab_mask, (SCHEDULER,),
        "SGLang has no CPU branch for applying the bitmask",
        "SGLang before 0.5.19 is served no more",
        cpu.grammars_need_a_gpu,
    ),
)  # fmt: skip

VERIFY_CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.__init__",
        "after", cpu.set_up_attention, (SCHEDULER,),
        "our attention serves models that it fits",
        "SGLang's attention on a CPU gives a row the same bits whatever its prompt's chunks",
    ),
    Hook(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.init_forward_metadata",
        "after", cpu.plan_attention, (SCHEDULER,),
        "what a forward attends to is laid out once, not in every layer",
        "SGLang's attention on a CPU gives a row the same bits whatever its prompt's chunks",
    ),
    *(
        Hook(
            f"sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.{name}",
            "around", cpu.attend, (SCHEDULER,),
            "a prompt's bits depend on where it is cut into chunks; and each row is a call of its own, three times as slow",
            "SGLang's attention on a CPU gives a row the same bits whatever its prompt's chunks",
        )
        for name in ("_run_sdpa_forward_extend", "_run_sdpa_forward_decode")
    ),
)  # fmt: skip


def wanted(config: MarginGateConfig, process_role: str) -> list[Hook]:
    """Return the hooks that a process of this role must have."""
    hooks = list(REQUEST_HOOKS)
    if config.policy is not Policy.OFF:
        hooks += GATE_HOOKS
    canonical = config.fast_path is FastPathMode.CANONICAL
    if canonical:
        hooks += FAST_PATH_HOOKS
    if cpu.is_cpu_host():
        hooks += CPU_HOOKS
        hooks += VERIFY_CPU_HOOKS if config.policy.verifies else ()
    else:
        verifies = config.policy.verifies
        hooks += FAST_PATH_GPU_HOOKS if canonical else VERIFY_GPU_HOOKS if verifies else ()
        hooks += DECODE_GPU_HOOKS if canonical or verifies else ()
    return [h for h in hooks if process_role in h.roles and (h.needed is None or h.needed())]
