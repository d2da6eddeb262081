"""Kernels of sglang-margingate: for a GPU each beside its plain PyTorch reference; for a CPU attention of PyTorch's own parts.

Without a GPU or without Triton every GPU function runs its reference; Triton is imported on first use, never here.
"""

from margingate_kernels.attention.decode_attention import DecodeAttention, decode_attention_reference
from margingate_kernels.attention.fa3_prefill import Fa3PrefillAttention, fa3_available
from margingate_kernels.attention.host_attention import HostAttention, Part
from margingate_kernels.attention.prefill_attention import PrefillAttention, prefill_attention_reference
from margingate_kernels.choice.rows import Top2, Workspace
from margingate_kernels.choice.top2_margin import top2_margin, top2_margin_reference
from margingate_kernels.memory.kv_column import (
    KVColumns,
    max_abs_change_reference,
    restore_reference,
    save_reference,
)
from margingate_kernels.memory.rank_sum import rank_sum, rank_sum_reference
from margingate_kernels.memory.row_digest import row_digest, row_digest_reference

__all__ = [
    "DecodeAttention",
    "Fa3PrefillAttention",
    "HostAttention",
    "KVColumns",
    "Part",
    "PrefillAttention",
    "Top2",
    "Workspace",
    "decode_attention_reference",
    "fa3_available",
    "max_abs_change_reference",
    "prefill_attention_reference",
    "rank_sum",
    "rank_sum_reference",
    "restore_reference",
    "row_digest",
    "row_digest_reference",
    "save_reference",
    "top2_margin",
    "top2_margin_reference",
]
