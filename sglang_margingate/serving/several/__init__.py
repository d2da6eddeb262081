"""A server over several GPUs: its ranks, its schedulers, and what it needs before it starts."""
