"""Layers of SGLang's models: what kinds there are for the probe, and what keeps fused experts at one configuration."""
