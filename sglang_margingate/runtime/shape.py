"""The shape of a forward, and where a batch carries it."""

from __future__ import annotations

from sglang_margingate.canonical.shape import ForwardShape

__all__ = ["SHAPE", "ForwardShape"]

SHAPE = "margingate_shape"
"""Attribute of a ``ForwardBatch`` that ran without a graph: its :class:`ForwardShape`, set where the forward ended."""
