"""The one fault for tests that reaches into SGLang; the others are in runtime/faults.py."""

from __future__ import annotations

from typing import Any

import torch

from sglang_margingate.config import ConfigError


class _SplitLinear:
    """``torch.nn.functional`` with a ``linear`` that sums one weight's products in two parts where there are few rows."""

    def __init__(self, weight: torch.Tensor, most_rows: int) -> None:
        self._weight, self._most_rows = weight, most_rows

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is not self._weight or len(x) > self._most_rows:
            return torch.nn.functional.linear(x, weight, bias)
        first = torch.zeros_like(x)
        first[:, ::3] = x[:, ::3]
        return torch.nn.functional.linear(first, weight, bias) + torch.nn.functional.linear(x - first, weight)


def split_sums(model: torch.nn.Module, knob: str) -> str:
    """Make one linear layer's bits depend on the number of rows; ``knob`` is NAME@M. Return the layer's full name.

    The map tries one layer of each shape, the first: name that one.
    """
    from sglang.srt.layers.quantization import unquant

    suffix, _, rows = knob.rpartition("@")
    for name, module in model.named_modules():
        if suffix and name.endswith(suffix) and rows.isdigit() and hasattr(module, "quant_method"):
            unquant.F = _SplitLinear(module.weight, int(rows))
            return name
    raise ConfigError(f"MARGINGATE_TEST_SPLIT: {knob!r} is not NAME@M with a linear layer's name")
