"""Attention of the canonical fast path on a GPU: a row's bits depend on that row's own context alone.

Prefill: FlashInfer's Hopper kernels (fa3) over pages, one kernel with and without a prefix. Decode: our own kernel
(:mod:`margingate_kernels.decode_attention`), which cuts a context into chunks by its own length, so that few rows over
long contexts still fill the GPU. Where it does not fit the model, FlashInfer decodes with tensor cores and without a
K/V split: the same promise, slow for long contexts.

Both are only settings until path_probe.py has tried them end to end.
"""

from __future__ import annotations

from typing import Any

import torch
from margingate_kernels import DecodeAttention

_decode: DecodeAttention | None = None
"""The kernel of this process. Decode graphs and the verify graph share it: they run one after another."""


def prepare(model_runner: Any, rows: int) -> str:
    """Make the decode kernel for batches of up to ``rows`` before graphs are captured; return what will decode."""
    global _decode
    config, pool = model_runner.model_config, model_runner.token_to_kv_pool
    heads, kv_heads, dim = config.num_attention_heads, config.get_num_kv_heads(1), config.head_dim
    fits = (
        DecodeAttention.supports(heads, kv_heads, dim)
        and model_runner.server_args.tp_size == 1
        and model_runner.sliding_window_size is None
        and pool.store_dtype == pool.dtype == model_runner.dtype
        and model_runner.dtype in (torch.bfloat16, torch.float16)
        and all(_plain(layer) for layer in _attention_layers(model_runner.model))
    )
    if not fits:
        return "flashinfer without K/V split"
    _decode = DecodeAttention(rows, heads, kv_heads, dim, model_runner.device)
    return "margingate"


def _attention_layers(model: Any) -> list[Any]:
    from sglang.srt.layers.radix_attention import RadixAttention

    return [module for module in model.modules() if isinstance(module, RadixAttention)]


def _plain(layer: Any) -> bool:
    """Return whether an attention layer is softmax over the whole context and nothing else."""
    return (
        layer.v_head_dim == layer.head_dim
        and not layer.logit_cap
        and layer.sliding_window_size == -1
        and layer.pos_encoding_mode == "NONE"
        and not layer.is_cross_attention
        and layer.k_scale is None
        and layer.v_scale is None
        and layer.xai_temperature_len == -1
    )


# ---- hook functions ---------------------------------------------------------------------------------------------------


def set_up(_result: Any, backend: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """Choose FlashInfer's batch-invariant settings on a new attention backend."""
    backend.decode_use_tensor_cores = True
    backend.disable_cuda_graph_kv_split = True
    if backend.skip_prefill or torch.cuda.get_device_capability()[0] != 9:
        return
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    # One paged kernel for all of a prefill: the ragged one merges two partial results when there is a prefix.
    backend.use_paged = True
    backend.prefill_backend = "fa3"
    backend.prefill_wrappers_paged = [
        BatchPrefillWithPagedKVCacheWrapper(backend.workspace_buffer, "NHD", backend="fa3")
        for _ in backend.prefill_wrappers_paged
    ]


def decode(
    original: Any,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layer: Any,
    batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """Run one layer's decode attention with our kernel, inside CUDA graphs; elsewhere FlashInfer does.

    FlashInfer's plan is made all the same: it fills the index buffers that the kernel reads.
    """
    attend = _decode
    if attend is None or not backend.forward_metadata.decode_wrappers[0].is_cuda_graph_enabled:
        return original(backend, q, k, v, layer, batch, save_kv_cache)
    pool = backend.token_to_kv_pool
    if k is not None and save_kv_cache:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
    keys, values = pool.get_kv_buffer(layer.layer_id)
    rows = len(q)
    if layer.layer_id == pool.start_layer:
        attend.plan(backend.kv_indptr[0][: rows + 1])  # for all layers of this forward
    queries = q.view(rows, layer.tp_q_head_num, layer.head_dim)
    return attend(queries, keys, values, backend.cuda_graph_kv_indices[0], layer.scaling).view(rows, -1)


def extend(
    original: Any,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    layer: Any,
    batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """Run one layer's prefill attention over the real rows of a padded forward (:func:`.fastpath.pad_forward`)."""
    real = batch.extend_num_tokens
    if real is None or len(q) <= real:
        return original(backend, q, k, v, layer, batch, save_kv_cache)
    out = original(backend, q[:real], k, v, layer, batch, save_kv_cache)
    return torch.nn.functional.pad(out, (0, 0, 0, len(q) - real))
