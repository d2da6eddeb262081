"""Hook functions for banks of fused experts: one configuration for each number of rows, and one kernel that adds up.

What breaks a row's bits in SGLang's fused experts is chosen by the number of rows: the configuration of the two products
(the nearest of a tuned table), and how the experts' outputs are added (a compiled function up to 32 rows, a kernel above).
The hooks keep both to a table that is settled before the layers are probed; where two of its configurations give the same
bits, the map says so. The router is a linear layer like others, and the choice of a row's experts looks at that row.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from sglang_margingate.canonical.experts.choose import united
from sglang_margingate.canonical.experts.probe import ExpertKind
from sglang_margingate.canonical.experts.table import (
    BankShape,
    Config,
    ExpertTable,
    TableError,
    kept_table,
    save_table,
    short,
    table_of,
    table_path,
)
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.machine import kernel_environment
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.serving import sgl

log = logging.getLogger(__name__)

METHOD = "UnquantizedFusedMoEMethod"
"""The only method of experts that the probe knows: quantised ones take a scale over the batch, or kernels by counts."""

ROWS = (*range(1, 513), *range(576, 16_385, 64))
"""Numbers of rows that SGLang is asked its choice for."""

BITS_ROWS = (1, 17, 64)
"""Numbers of rows at which SGLang's configurations are compared; the table that comes out is probed at all of them."""

CPU_ROWS = 16
"""Rows of each expert on a CPU are filled up to a multiple of this: few rows are what a CPU's library sums otherwise."""

# State of this process (hook_table.py lists all of it), set once at start-up.
_tables: dict[BankShape, ExpertTable] = {}
_filled_up: frozenset[int] = frozenset()
_goes_with: torch.Tensor | None = None
_broken_rows = 0


def settle_tables(model: Any, config: MarginGateConfig, device: str) -> None:
    """Settle the configurations of every shape of bank in the model, before anything is probed: a tuned table, else SGLang's."""
    if device == "cpu":
        if any(is_known(module) for module in model.modules()):
            pad_expert_rows()
        return
    for name, module in model.named_modules():
        if not is_known(module):
            continue
        shape = shape_of(module, top_k_of(model))
        if shape not in _tables:
            table = _tables[shape] = _settled(name, module, shape, config, kernel_environment(device))
            log.info("margingate: %s: %s keep to %s (%s)", name, shape.describe(), table.describe(), table.source)


def _settled(
    name: str, module: Any, shape: BankShape, config: MarginGateConfig, environment: dict[str, str]
) -> ExpertTable:
    """Return the table that is kept for a bank, else SGLang's choice as far as it shares its bits, which is kept from now on."""
    kept = kept_table(config.map_dir, shape, environment)
    if kept is not None:
        return kept
    table = sglang_table(module, shape.top_k)
    configs = list({short(c): c for _, c in table.steps}.values())
    kind = bank_kind(name, module, shape.top_k)
    assert kind is not None
    bits = dict(zip(map(short, configs), kind.bits_of([partial(_try, shape, c) for c in configs], BITS_ROWS)))
    try:
        table = united(table, bits, short)
    except TableError as error:
        log.warning("margingate: %s: %s; %s", name, error, "SGLang's own choice stays, for the probe to judge")
        return table
    used = {short(c) for _, c in table.steps}
    left = [f"{c}{' (depends on companions)' if found is None else ''}" for c, found in bits.items() if c not in used]
    if left:
        log.info(
            "margingate: %s: of SGLang's %d configurations these have other bits: %s", name, len(bits), ", ".join(left)
        )
    if config.map_dir is not None and not TestKnobs().active and sgl.tp_rank() == 0:
        path = table_path(config.map_dir, shape, environment)
        if path.exists():
            return table  # not to be read, which was said: somebody's table all the same
        try:
            save_table(path, shape, table, environment)
        except OSError as error:
            log.warning(
                "margingate: the table of experts cannot be kept in %s (%s)", path.parent, error.strerror or error
            )
    return table


def _try(shape: BankShape, config: Config) -> None:
    _tables[shape] = ExpertTable(((1, config),))


def break_experts(rows: int) -> None:
    """Let banks of up to ``rows`` rows round otherwise than when they were probed, on purpose."""
    global _broken_rows
    if rows:
        log.warning("margingate: experts of up to %d rows round otherwise on purpose", rows)
    _broken_rows = rows


def run(original: Any, bank: Any, given: Any) -> Any:
    """Run a bank of experts."""
    out = original(bank, given)
    if len(given.hidden_states) > _broken_rows:
        return out
    return out._replace(hidden_states=(out.hidden_states.float() * (1 + 2**-8)).to(out.hidden_states.dtype))


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
    method = f"{METHOD}, {f'experts one by one, rows in blocks of {CPU_ROWS}' if table is None else table.describe()}"
    return ExpertKind(name, module.w13_weight, module.w2_weight, top_k, apply, method)


def sglang_table(module: Any, top_k: int) -> ExpertTable:
    """Return SGLang's own choice for a bank as a table."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_config import try_get_optimal_moe_config

    up, down = module.w13_weight.shape, module.w2_weight.shape

    def choose(rows: int) -> Config:
        found: Config = try_get_optimal_moe_config(up, down, top_k, None, rows)
        return found

    return table_of(choose, ROWS, "SGLang's own choice")


class _PaddedLinear:
    """``torch.nn.functional`` with a ``linear`` whose rows are filled up to a multiple of :data:`CPU_ROWS`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.nn.functional, name)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        more = -len(x) % CPU_ROWS
        return torch.nn.functional.linear(torch.nn.functional.pad(x, (0, 0, 0, more)), weight, bias)[: len(x)]


def pad_expert_rows() -> None:
    """Let SGLang's experts on a CPU, which are computed one by one, see no fewer than :data:`CPU_ROWS` rows each.

    What that does to a row's bits is probed like everything else.
    """
    from sglang.srt.layers.moe import fused_moe_native

    fused_moe_native.F = _PaddedLinear()


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
    with override_config(dict(table.at(len(hidden)))):
        return original(hidden, up, down, chosen, **kwargs)


def sum_by_kernel(_rows: int) -> bool:
    """Say that a compiled function never adds up the outputs of experts: one kernel does, whatever the number of rows."""
    return False


def widened(given: Any, rows: int) -> Any:
    """Return what a bank is given, filled up to ``rows`` rows: those go where the first row goes, with no weight."""
    routing, wide = given.topk_output, torch.nn.functional.pad
    ids, more = routing.topk_ids, rows - len(given.hidden_states)
    routing = routing._replace(
        topk_ids=torch.cat([ids, ids[:1].expand(more, -1)]), topk_weights=wide(routing.topk_weights, (0, 0, 0, more))
    )
    return given._replace(hidden_states=wide(given.hidden_states, (0, 0, 0, more)), topk_output=routing)


# ---- padding inside decode graphs -------------------------------------------------------------------------------------


def fill_up(sizes: list[int]) -> None:
    """Note the captured decode sizes, rising, that the class makes serve batches of less than half of them.

    A row of padding there holds what an earlier batch left, goes to experts of its own, and has their weights read: a batch
    of 1 at 17 rows read all 8 experts of a Mixtral instead of 2, and took 3.3 times as long.
    """
    global _filled_up
    _filled_up = frozenset(size for below, size in zip((0, *sizes), sizes) if 2 * (below + 1) < size)


def note_padding(slots: torch.Tensor) -> None:
    """Work out, once for all banks of a forward that is being captured, whose experts each row is sent to.

    Parameters
    ----------
    slots
        [rows]: where each row's K/V column is written. Padding writes slot 0, which no request has.
    """
    global _goes_with
    if not _tables or len(slots) not in _filled_up:
        _goes_with = None
        return
    places = torch.arange(len(slots), device=slots.device)
    _goes_with = torch.where(slots != 0, places, 0)


def along(given: Any) -> Any:
    """Return what a bank is given in a captured forward, its padding sent where the first row goes.

    No real row sees a difference: that its bits are its own among all companions is what banks are probed for.
    """
    ids, rows = getattr(given.topk_output, "topk_ids", None), len(given.hidden_states)
    if _goes_with is None or ids is None or rows != len(_goes_with) or not torch.cuda.is_current_stream_capturing():
        return given
    return given._replace(topk_output=given.topk_output._replace(topk_ids=ids.index_select(0, _goes_with)))
