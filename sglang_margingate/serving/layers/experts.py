"""Hook functions for banks of fused experts: one configuration for each number of rows, and one kernel that adds up.

What breaks a row's bits in SGLang's fused experts is chosen by the number of rows: the configuration of the two products
(the nearest of a tuned table), and how the experts' outputs are added (a compiled function up to 32 rows, a kernel above).
The hooks keep both to a table that is settled before the layers are probed; where two of its configurations give the same
bits, the map says so. The router is a linear layer like others, and the choice of a row's experts looks at that row.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from sglang_margingate.canonical.experts.probe import ExpertKind
from sglang_margingate.canonical.experts.table import BankShape, Config, ExpertTable, kept_table, table_of
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.machine import kernel_environment

log = logging.getLogger(__name__)

METHOD = "UnquantizedFusedMoEMethod"
"""The only method of experts that the probe knows: quantised ones take a scale over the batch, or kernels by counts."""

ROWS = (*range(1, 513), *range(576, 16_385, 64))
"""Numbers of rows that SGLang is asked its choice for."""

# State of this process (hooks.py lists all of it), set once at start-up.
_tables: dict[BankShape, ExpertTable] = {}
_broken_rows = 0


def settle_tables(model: Any, config: MarginGateConfig, device: str) -> None:
    """Settle the configurations of every shape of bank in the model, before anything is probed: a tuned table, else SGLang's."""
    if device == "cpu":
        return
    for name, module in model.named_modules():
        if not is_known(module):
            continue
        shape = shape_of(module, top_k_of(model))
        if shape not in _tables:
            table = kept_table(config.map_dir, shape, kernel_environment(device)) or sglang_table(module, shape.top_k)
            _tables[shape] = table
            log.info("margingate: %s: %s keep to %s (%s)", name, shape.describe(), table.describe(), table.source)


def break_experts(rows: int) -> None:
    """Let banks of up to ``rows`` rows run with the configuration of the largest ones, on purpose: not what was probed."""
    global _broken_rows
    _broken_rows = rows


def is_known(module: Any) -> bool:
    """Return whether a layer is a bank of fused experts that the probe knows how to run."""
    if not (hasattr(module, "w13_weight") and hasattr(module, "w2_weight")):
        return False
    method = module.quant_method
    if type(method).__name__ != METHOD or module.w13_weight.dtype != torch.bfloat16:
        return False
    config = module.moe_runner_config
    plain = config.is_gated and not config.no_combine and not config.apply_router_weight_on_input
    return plain and (module.w13_weight.device.type == "cpu" or method.runner.runner_backend.is_triton())


def top_k_of(model: Any) -> int:
    """Return how many experts a row of a model goes to; its banks are not all told."""
    return int(getattr(getattr(model, "config", None), "num_experts_per_tok", 0) or 0)


def shape_of(module: Any, top_k: int) -> BankShape:
    """Return what a bank's configurations are chosen for."""
    experts, hidden, inner = module.w2_weight.shape
    return BankShape(experts, inner, hidden, top_k, str(module.w2_weight.dtype).removeprefix("torch."))


def bank_kind(name: str, module: Any, top_k: int) -> ExpertKind | None:
    """Return a bank as the probe runs it; None for any other layer."""
    if not is_known(module) or not top_k:
        return None
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    def apply(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        routing = StandardTopKOutput(topk_weights=weights, topk_ids=chosen, router_logits=None)
        given = StandardDispatchOutput(hidden_states=x, hidden_states_scale=None, topk_output=routing)
        out: torch.Tensor = module.run_moe_core(dispatch_output=given).hidden_states
        return out

    table = _tables.get(shape_of(module, top_k))
    method = f"{METHOD}, {'experts one by one' if table is None else table.describe()}"
    return ExpertKind(name, module.w13_weight, module.w2_weight, top_k, apply, method)


def sglang_table(module: Any, top_k: int) -> ExpertTable:
    """Return SGLang's own choice for a bank as a table."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import try_get_optimal_moe_config

    up, down = module.w13_weight.shape, module.w2_weight.shape

    def choose(rows: int) -> Config:
        found: Config = try_get_optimal_moe_config(up, down, top_k, None, rows)
        return found

    return table_of(choose, ROWS, "SGLang's own choice")


# ---- hook functions ---------------------------------------------------------------------------------------------------


def prepare(
    original: Any, hidden: torch.Tensor, up: torch.Tensor, down: torch.Tensor, chosen: torch.Tensor, **kwargs: Any
) -> Any:
    """Choose a bank's configuration from its table."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import override_config

    experts, width, inner = down.shape
    dtype = str(down.dtype).removeprefix("torch.")
    table = _tables.get(BankShape(experts, inner, width, chosen.shape[1], dtype))
    if table is None:
        return original(hidden, up, down, chosen, **kwargs)
    rows = len(hidden)
    config = table.steps[-1][1] if rows <= _broken_rows else table.at(rows)
    with override_config(dict(config)):
        return original(hidden, up, down, chosen, **kwargs)


def sum_by_kernel(_rows: int) -> bool:
    """Say that a compiled function never adds up the outputs of experts: one kernel does, whatever the number of rows."""
    return False
