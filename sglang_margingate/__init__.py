"""Batch-independent temperature-0 decoding for SGLang, with the evidence on screen."""

__version__ = "0.1.0"
