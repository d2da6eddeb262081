"""What keeps banks of experts at one table of configurations: hook functions over SGLang's own choice, without a GPU."""

from __future__ import annotations

import importlib.util

import pytest
from sglang_process import SGLangProcess

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

CODE = """
import torch
from types import SimpleNamespace as Box
from sglang.srt.layers.moe.moe_runner import triton_utils
from sglang_margingate.canonical.experts.table import BankShape, ExpertTable
from sglang_margingate.serving import shape_hooks
from sglang_margingate.serving.layers import experts
from sglang_margingate.serving.layers.kinds import layer_kinds, unknown_layers

# ---- the configuration
def config(m):
    return {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4}

def original(hidden, up, down, chosen, *, block_shape=None):
    return triton_utils.get_config()

up, down = torch.zeros(4, 32, 8, dtype=torch.bfloat16), torch.zeros(4, 8, 16, dtype=torch.bfloat16)
def run(rows, top_k=2):
    return experts.prepare(original, torch.zeros(rows, 8), up, down, torch.zeros(rows, top_k), block_shape=None)

assert run(1) is None
experts._tables[BankShape(4, 16, 8, 2)] = ExpertTable(((4, config(16)), (9, config(64))))
assert run(4) == config(16) and run(5) == config(64)
assert run(1, top_k=1) is None  # another shape
experts.break_experts(3)
assert run(3) == config(64) and run(4) == config(16)
experts.break_experts(0)
assert triton_utils.get_config() is None
assert experts.sum_by_kernel(1) is False

# ---- rows are noted
forward = shape_hooks.Running(shape_hooks.RowSizes((8,)), shape_hooks.RowSizes((8,)), 3)
with shape_hooks.running(forward):
    shape_hooks.run_bank(lambda bank, given: None, None, Box(hidden_states=torch.zeros(8, 4)))
assert forward.shape().in_class and forward.shape().padded == 8
with shape_hooks.running(forward):
    shape_hooks.run_bank(lambda bank, given: None, None, Box(hidden_states=torch.zeros(7, 4)))
assert not forward.shape().in_class

# ---- what the probe knows of a model
class UnquantizedFusedMoEMethod:
    pass

class Bank(torch.nn.Module):
    def __init__(self, method):
        super().__init__()
        self.w13_weight, self.w2_weight = torch.nn.Parameter(up, False), torch.nn.Parameter(down, False)
        self.quant_method = method
        self.moe_runner_config = Box(is_gated=True, no_combine=False, apply_router_weight_on_input=False)

def model(method, **config):
    whole = torch.nn.Module()
    whole.layers = torch.nn.ModuleList([Bank(method), Bank(method)])
    whole.config = Box(**config)
    return whole

known = model(UnquantizedFusedMoEMethod(), num_experts_per_tok=2)
(kind,) = layer_kinds(known)
assert (kind.name, kind.shape, kind.count, kind.top_k) == ("layers.0", (32, 8), 2, 2)
assert kind.describe() == "bfloat16, UnquantizedFusedMoEMethod, 16/64/64/1/4 to 4, 64/64/64/1/4, 2 of 4 experts", kind.describe()
assert unknown_layers(known) == []
print(unknown_layers(model(type("Fp8MoEMethod", (), {})(), num_experts_per_tok=2)))
print(unknown_layers(model(UnquantizedFusedMoEMethod())))
"""


@needs_sglang
def test_a_bank_keeps_to_its_table_and_notes_its_rows(sglang: SGLangProcess) -> None:
    done = sglang.run(CODE)
    assert done.returncode == 0, done.stderr[-2000:]
    eight, untold = done.stdout.strip().splitlines()
    assert eight.startswith("['layers.0 (Bank, computed by Fp8MoEMethod)', 'layers.1")
    assert "layers.0" in untold
