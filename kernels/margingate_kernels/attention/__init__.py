"""Attention whose bits depend on a row's own context alone: decode and prefill over paged K/V on a GPU, parts of PyTorch's on a CPU."""
