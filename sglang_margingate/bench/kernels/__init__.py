"""A model's kernels by themselves: against their references, and repeated under load."""
