"""GPU kernels of sglang-margingate, each beside its plain PyTorch reference."""

from margingate_kernels.top2_margin import Top2, top2_margin

__all__ = ["Top2", "top2_margin"]
