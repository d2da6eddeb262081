"""Attention on a GPU whose bits depend on a row's own context alone: of the canonical fast path, and of every verify.

Prefill: one kernel with and without a prefix, FlashAttention-3 as SGLang's package ships it where it holds
(:mod:`margingate_kernels.attention.fa3_prefill`), else our own (:mod:`margingate_kernels.attention.prefill_attention`), since FlashInfer's fa3 is
not repeatable (see there). Decode: :mod:`margingate_kernels.attention.decode_attention`, which cuts a context into chunks by its own
length, so that few rows over long contexts still fill the GPU. Where they do not fit the model, FlashInfer prefills over
pages with fa3 and decodes with tensor cores and without a K/V split: the same promise but for that race, and slow for
long contexts.

Both are only settings until canonical/path_probe.py (and, for the verify, canonical/selftest.py) has tried them end to end.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from margingate_kernels import DecodeAttention, Fa3PrefillAttention, PrefillAttention, fa3_available

from sglang_margingate.canonical import attention_probe
from sglang_margingate.config import ConfigError, MarginGateConfig, PrefillKind
from sglang_margingate.serving.layers import experts

log = logging.getLogger(__name__)

_decode: DecodeAttention | None = None
"""The kernel of all of this process's graphs on the canonical fast path, the verify's too: they run one after another."""

VERIFY = "margingate_verify_attention"
"""Attribute of the verify graph's attention backend: its own kernel, where decode graphs are SGLang's."""

PREFILL = "margingate_prefill_attention"
"""Attribute of the batch that a prefill graph is captured with: what attends in it."""


def prepare(model_runner: Any, rows: int) -> str:
    """Make the decode kernel for batches of up to ``rows`` before graphs are captured; return what will decode."""
    global _decode
    _decode = _kernel(model_runner, rows)
    return "flashinfer without K/V split" if _decode is None else "margingate"


def prepare_verify(model_runner: Any, backend: Any, rows: int) -> bool:
    """Let the verify graph's ``backend`` attend with the kernel, before it is captured; return whether it will."""
    kernel = _decode or _kernel(model_runner, rows)
    setattr(backend, VERIFY, kernel)
    return kernel is not None


def _kernel(model_runner: Any, rows: int) -> DecodeAttention | None:
    """Return the decode kernel for this model, or None where it does not fit."""
    shape = _shape(model_runner)
    return None if shape is None else DecodeAttention(rows, *shape, model_runner.device)


def _shape(model_runner: Any) -> tuple[int, int, int] | None:
    """Return this rank's query heads, K/V heads and their size, or None where our kernels do not fit the model."""
    shape = attention_shape(model_runner)
    return shape if DecodeAttention.supports(*shape) and is_plain(model_runner) else None


def attention_shape(model_runner: Any) -> tuple[int, int, int]:
    """Return a rank's query heads, its K/V heads (copied where there are fewer than ranks), and their size."""
    config, ranks = model_runner.model_config, model_runner.server_args.tp_size
    return config.num_attention_heads // ranks, config.get_num_kv_heads(ranks), config.head_dim


def is_plain(model_runner: Any) -> bool:
    """Return whether all of a model's attention is causal softmax over the whole context, of 16-bit floats."""
    pool = model_runner.token_to_kv_pool
    return (
        model_runner.sliding_window_size is None
        and pool.store_dtype == pool.dtype == model_runner.dtype
        and model_runner.dtype in (torch.bfloat16, torch.float16)
        and all(_plain(layer) for layer in _attention_layers(model_runner.model))
    )


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
        and _unscaled(layer)
        and layer.xai_temperature_len == -1
        and getattr(layer.attn_type, "value", layer.attn_type) == "decoder"
    )


def _unscaled(layer: Any) -> bool:
    """Return whether a layer's keys and values stand in the pool as they are.

    A model with quantised weights has scales of keys and values too. Where the checkpoint brings none they are 1, which
    changes no bit.
    """
    scales = ((layer.k_scale, layer.k_scale_float), (layer.v_scale, layer.v_scale_float))
    return all(scale is None or value == 1.0 for scale, value in scales)


# ---- hook functions ---------------------------------------------------------------------------------------------------


def set_up(_result: Any, backend: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """Choose batch-invariant decode and prefill on a new attention backend of the canonical fast path."""
    backend.decode_use_tensor_cores = True
    backend.disable_cuda_graph_kv_split = True
    if backend.skip_prefill or _prefill_with_ours(backend, model_runner) or not _is_hopper():
        return
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    # One kernel for all of a prefill: SGLang's ragged way merges two partial results when there is a prefix.
    backend.use_paged = True
    backend.prefill_backend = "fa3"
    backend.prefill_wrappers_paged = [
        BatchPrefillWithPagedKVCacheWrapper(backend.workspace_buffer, "NHD", backend="fa3")
        for _ in backend.prefill_wrappers_paged
    ]


def set_up_prefill(_result: Any, backend: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """Let a new attention backend prefill with our kernel, where it fits the model."""
    if not backend.skip_prefill:
        _prefill_with_ours(backend, model_runner)


def _prefill_with_ours(backend: Any, model_runner: Any) -> bool:
    """Put our prefill into ``backend``; return whether it fits this model and works on this machine."""
    shape = None if backend.enable_mis else _shape(model_runner)
    kind = None if shape is None else choose_prefill(shape, model_runner.dtype, model_runner.device)
    if shape is not None and kind is not None:
        backend.use_paged = True
        backend.prefill_wrappers_paged = [PagedPrefill(*shape, model_runner.device, kind)]
        return True
    if _is_hopper():
        log.warning(
            "margingate: FlashInfer's fa3 prefills this model. It is not repeatable: about one attention tile in 20 million "
            "comes out with other bits where the GPU is shared (docs/fast-path.md), which no verify sees"
        )
    return False


def choose_prefill(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> PrefillKind | None:
    """Return which kernel prefills this model here; None where neither works, which is said.

    What attends decides bits, so it is chosen by what holds and never by what was faster at this start. Where both hold,
    FlashAttention-3: it is the faster one, or as fast, at every length (docs/fast-path.md).

    Raises
    ------
    ConfigError
        ``--margingate-prefill-attention`` asks for FlashAttention-3, which cannot be used here.
    """
    config = MarginGateConfig.from_env()
    wanted = PrefillKind.AUTO if config is None else config.prefill_attention
    if wanted is not PrefillKind.TRITON:
        why = _against_fa3(shape, dtype, device)
        if why is None:
            return PrefillKind.FA3
        if wanted is PrefillKind.FA3:
            raise ConfigError(f"--margingate-prefill-attention: fa3 cannot be used here: {why}; leave the flag out")
    # Our own is tried end to end like everything that serves; here only that it is right, since this Triton may be new to us.
    why = attention_probe.wrong(PrefillAttention, shape, dtype, device)
    if why is None:
        return PrefillKind.TRITON
    log.warning("margingate: our prefill attention does not work here: %s", why)
    return None


def _against_fa3(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Return why FlashAttention-3 must not prefill this model here, said where it was tried; None where it may."""
    if not fa3_available(*shape):
        return "there is none for this GPU and these heads"
    why = attention_probe.wrong(Fa3PrefillAttention, shape, dtype, device)
    try:
        broken = None if why else attention_probe.changed(Fa3PrefillAttention, shape, dtype, device)
    except RuntimeError as error:
        broken, why = None, " ".join(str(error).split())[:300]
    why = why or (f"a token's bits depend on {broken}" if broken else None)
    if why is not None:
        log.warning("margingate: FlashAttention-3 does not prefill here: %s", why)
    return why


def prefill_kind(model_runner: Any) -> str:
    """Return what prefills on this server, in a word."""
    wrappers = getattr(model_runner.attn_backend, "prefill_wrappers_paged", ())
    kinds = {w.kind.value if isinstance(w, PagedPrefill) else "flashinfer" for w in wrappers}
    return ", ".join(sorted(kinds)) or "sglang"


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9


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

    This runs while a graph is captured. Before each replay SGLang fills the index buffers that the kernel reads, then asks
    FlashInfer for a plan; nobody reads that one, so it is left out.
    """
    attend, wrappers = getattr(backend, VERIFY, None) or _decode, backend.forward_metadata.decode_wrappers
    if attend is None or not wrappers[0].is_cuda_graph_enabled:
        return original(backend, q, k, v, layer, batch, save_kv_cache)
    keys, values = _written(backend, k, v, layer, batch, save_kv_cache)
    rows = len(q)
    if layer.layer_id == backend.token_to_kv_pool.start_layer:
        attend.plan(backend.kv_indptr[0][: rows + 1])  # for all layers of this forward
        experts.note_padding(batch.out_cache_loc)
        for wrapper in wrappers:
            wrapper.begin_forward = _no_plan
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
    """Run one layer's prefill attention over the real rows of a padded forward (:func:`.shape_hooks.pad_forward`).

    A forward that is being captured in a CUDA graph brings its own attention (prefill_graphs.py).
    """
    captured = getattr(batch, PREFILL, None)
    if captured is not None:
        rows = len(q)
        keys, values = _written(backend, k, v, layer, batch, save_kv_cache)
        queries = q.view(rows, layer.tp_q_head_num, layer.head_dim)
        out: torch.Tensor = captured(queries, keys, values, layer.scaling)
        return out.view(rows, -1)
    real = batch.extend_num_tokens
    if real is None or len(q) <= real:
        return original(backend, q, k, v, layer, batch, save_kv_cache)
    out = original(backend, q[:real], k, v, layer, batch, save_kv_cache)
    return torch.nn.functional.pad(out, (0, 0, 0, len(q) - real))


def _written(
    backend: Any, k: torch.Tensor | None, v: torch.Tensor | None, layer: Any, batch: Any, save_kv_cache: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a layer's new columns into the pool, where that is asked; return the pool's K and V."""
    pool = backend.token_to_kv_pool
    if k is not None and save_kv_cache:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
    keys, values = pool.get_kv_buffer(layer.layer_id)
    return keys, values


def _no_plan(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for ``begin_forward`` of a FlashInfer wrapper that does not attend."""


class PagedPrefill:
    """What SGLang uses of ``flashinfer.BatchPrefillWithPagedKVCacheWrapper``.

    Parameters
    ----------
    q_heads, kv_heads, head_dim, device
        See :class:`margingate_kernels.PrefillAttention`.
    kind
        Which kernel attends.
    """

    is_cuda_graph_enabled = False

    def __init__(
        self,
        q_heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        kind: PrefillKind = PrefillKind.TRITON,
    ) -> None:
        self.kind, self._of = kind, (q_heads, kv_heads, head_dim, device)
        self._attend = self.make()
        self._slots = torch.empty(0)

    def make(self, rows: int = 0) -> attention_probe.Attend:
        """Return a kernel of the same kind; with ``rows`` for graphs of up to so many, whose padding stays finite."""
        if self.kind is PrefillKind.FA3:
            return Fa3PrefillAttention(*self._of, rows=rows)
        return PrefillAttention(*self._of)

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        _last_page_len: torch.Tensor,
        _q_heads: int,
        _kv_heads: int,
        _head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        non_blocking: bool = True,
        **rest: Any,
    ) -> None:
        """Plan a prefill of requests whose contexts are ``kv_indices[kv_indptr[r]:kv_indptr[r + 1]]``.

        Raises
        ------
        ValueError
            SGLang asks for something that a causal prefill over pages of one token is not.
        """
        odd = sorted(name for name, value in rest.items() if value is not None and value != 0)
        if odd or page_size != 1 or q_data_type != kv_data_type:
            raise ValueError(f"prefill attention knows no {', '.join(odd) or f'pages of {page_size} {kv_data_type}'}")
        self._attend.plan(qo_indptr, kv_indptr, len(kv_indices))
        self._slots = kv_indices

    def forward(
        self, q: torch.Tensor, kv_cache: tuple[torch.Tensor, torch.Tensor], *, causal: bool, sm_scale: float, **_: Any
    ) -> torch.Tensor:
        """Attend; ``q`` is [tokens, q_heads, head_dim], the pool's K and V [slots, kv_heads, head_dim]."""
        if not causal:
            raise ValueError("prefill attention is causal")
        return self._attend(q, *kv_cache, self._slots, sm_scale)
