"""GPU kernels of sglang-margingate, each beside its plain PyTorch reference.

Without a GPU or without Triton every function runs its reference; Triton is imported on first use, never here.
"""

from margingate_kernels.decode_attention import DecodeAttention, decode_attention_reference
from margingate_kernels.fa3_prefill import Fa3PrefillAttention, fa3_available
from margingate_kernels.kv_column import (
    KVColumns,
    max_abs_change_reference,
    restore_reference,
    save_reference,
)
from margingate_kernels.prefill_attention import PrefillAttention, prefill_attention_reference
from margingate_kernels.row_digest import row_digest, row_digest_reference
from margingate_kernels.top2_margin import Top2, Top2Workspace, top2_margin, top2_margin_reference

__all__ = [
    "DecodeAttention",
    "Fa3PrefillAttention",
    "KVColumns",
    "PrefillAttention",
    "Top2",
    "Top2Workspace",
    "decode_attention_reference",
    "fa3_available",
    "max_abs_change_reference",
    "prefill_attention_reference",
    "restore_reference",
    "row_digest",
    "row_digest_reference",
    "save_reference",
    "top2_margin",
    "top2_margin_reference",
]
