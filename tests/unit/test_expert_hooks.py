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
from sglang_margingate.serving.layers import experts, padding
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
assert triton_utils.get_config() is None
assert experts.sum_by_kernel(1) is False

# ---- rows are noted, and filled up to a size of the class
from typing import NamedTuple
class Routing(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
class Given(NamedTuple):
    hidden_states: torch.Tensor
    topk_output: object
class Out(NamedTuple):
    hidden_states: torch.Tensor

seen = []
def core(bank, given):
    seen.append((given.hidden_states.clone(), given.topk_output))
    return Out(given.hidden_states * 2)

def given(rows):
    chosen = torch.tensor([3, 1], dtype=torch.int32) - torch.arange(rows, dtype=torch.int32)[:, None] % 2
    return Given(torch.ones(rows, 4), Routing(torch.full((rows, 2), 0.5), chosen))

for rows, wide, fits in ((8, 8, True), (7, 8, True), (9, 9, False)):
    forward = padding.Running(shape_hooks.RowSizes((8,)), shape_hooks.RowSizes((8,)), 3)
    with shape_hooks.running(forward):
        out = shape_hooks.run_bank(core, None, given(rows))
    assert out.hidden_states.shape == (rows, 4)
    x, routing = seen[-1]
    assert len(x) == len(routing.topk_ids) == len(routing.topk_weights) == wide
    assert not x[rows:].any() and not routing.topk_weights[rows:].any() and routing.topk_ids.dtype == torch.int32
    assert routing.topk_ids[rows:].tolist() == [[3, 1]] * (wide - rows)  # where the first row goes
    assert (forward.shape().in_class, forward.shape().padded) == (fits, wide)
assert shape_hooks.run_bank(core, None, given(7)).hidden_states.shape == (7, 4) and len(seen[-1][0]) == 7
forward = padding.Running(shape_hooks.RowSizes((8,)), shape_hooks.RowSizes((8,)), 3)
with shape_hooks.running(forward):
    shape_hooks.run_bank(lambda bank, given: None, None, Given(torch.ones(8, 4), object()))
assert not forward.shape().in_class

# ---- padding in a decode graph goes where the first row goes, where a size serves batches of less than half of it
class Loc:  # what a graph reads when it is replayed
    def __init__(self, real, rows):
        self.slots = torch.zeros(rows, dtype=torch.int64)
        self.slots[:real] = 5 + torch.arange(real)

experts.fill_up([17, 24, 64])
assert experts._filled_up == {17, 64}
experts.fill_up([1, 2, 4, 8, 12, 16])
assert not experts._filled_up  # SGLang's own sizes
experts.fill_up([17, 24])
capturing = False
torch.cuda.is_current_stream_capturing = lambda: capturing

def routed(real, rows, wide=None):
    experts.note_padding(Loc(real, rows).slots)
    shape_hooks.run_bank(core, None, given(wide or rows))
    return seen[-1][1].topk_ids

asked = given(24).topk_output.topk_ids
assert torch.equal(routed(3, 17), asked[:17])  # not captured: as it was
capturing = True
found = routed(3, 17)
assert torch.equal(found[:3], asked[:3]) and found[3:].tolist() == [[3, 1]] * 14 and found.dtype == torch.int32
assert torch.equal(routed(17, 17), asked[:17])  # no padding
assert torch.equal(routed(18, 24), asked)  # a size that is nearly full
assert torch.equal(routed(3, 17, 16), asked[:16])  # another forward
tables = dict(experts._tables)
experts._tables.clear()
assert torch.equal(routed(3, 17), asked[:17])  # banks that were not probed among companions
experts._tables.update(tables)
capturing = False

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

# ---- broken on purpose: few rows round otherwise
experts.break_experts(2)
few, more = (shape_hooks.run_bank(core, None, given(rows)).hidden_states for rows in (2, 3))
assert (more == 2).all() and (few == 2 + 2**-7).all(), few
experts.break_experts(0)

# ---- a table is settled: SGLang's choice, as far as its configurations share their bits
import pathlib, tempfile
from sglang_margingate.config import MarginGateConfig
big = Bank(UnquantizedFusedMoEMethod())
big.w13_weight = torch.nn.Parameter(torch.randn(8, 64, 64).bfloat16(), False)
big.w2_weight = torch.nn.Parameter(torch.randn(8, 64, 32).bfloat16(), False)
shape = experts.shape_of(big, 2)
assert shape == BankShape(8, 32, 64, 2)

def product(row, weight, cut):
    terms = row.float() * weight.float()
    return (terms[:, :cut].sum(1) + terms[:, cut:].sum(1)).bfloat16()

tried = []
def row_by_row(dispatch_output):
    tried.append(experts._tables[shape].at(1)["BLOCK_SIZE_N"])
    cut = tried[-1] // 4  # the configuration decides the order of summation
    x, (weights, chosen, _) = dispatch_output.hidden_states, dispatch_output.topk_output
    out = torch.empty_like(x)
    for place in range(len(x)):
        total = torch.zeros(64)
        for expert, weight in zip(chosen[place].tolist(), weights[place]):
            gate, value = product(x[place], big.w13_weight[expert], cut).chunk(2)
            middle = torch.nn.functional.silu(gate) * value
            total += product(middle, big.w2_weight[expert], 8).float() * weight
        out[place] = total.bfloat16()
    return Box(hidden_states=out)

big.run_moe_core = row_by_row
def wide(n):
    return config(16) | {"BLOCK_SIZE_N": n}
choice = ExpertTable(((2, wide(32)), (256, wide(64) | {"GROUP_SIZE_M": 8}), (300, wide(64)), (9999, wide(128))), "SGLang's own choice")
experts.sglang_table = lambda module, top_k: choice
experts.BITS_ROWS = (1, 3)
experts.sgl = Box(tp_rank=lambda: 0)
with tempfile.TemporaryDirectory() as folder:
    given = MarginGateConfig(map_dir=folder)
    found = experts._settled("bank", big, shape, given, {"device": "d"})
    assert [(most, c["BLOCK_SIZE_N"]) for most, c in found.steps] == [(256, 64), (9999, 128)], found
    assert sorted(set(tried)) == [32, 64, 128]
    tried.clear()
    again = experts._settled("bank", big, shape, given, {"device": "d"})
    assert again.steps == found.steps and tried == [] and "kept in" in again.source
    (path,) = pathlib.Path(folder).iterdir()
    path.write_text("{")
    again = experts._settled("bank", big, shape, given, {"device": "d"})
    assert again.steps == found.steps and path.read_text() == "{", "a table that cannot be read may be one that somebody tuned"

# ---- a CPU's experts see no fewer than a block of rows
from sglang.srt.layers.moe import fused_moe_native
experts.pad_expert_rows()
rows_seen = []
weight = torch.randn(5, 4)
with torch.no_grad():
    real = torch.nn.functional.linear
    torch.nn.functional.linear = lambda x, w, b=None: (rows_seen.append(len(x)), real(x, w, b))[1]
    for rows in (1, 16, 17):
        x = torch.randn(rows, 4)
        assert torch.allclose(fused_moe_native.F.linear(x, weight), x @ weight.t(), atol=1e-5)
    torch.nn.functional.linear = real
assert rows_seen == [16, 16, 32]
assert fused_moe_native.F.silu is torch.nn.functional.silu

"""


@needs_sglang
def test_a_bank_keeps_to_its_table_and_notes_its_rows(sglang: SGLangProcess) -> None:
    done = sglang.run(CODE)
    assert done.returncode == 0, done.stderr[-2000:]
    eight, untold = done.stdout.strip().splitlines()
    assert eight.startswith("['layers.0 (Bank, computed by Fp8MoEMethod)', 'layers.1")
    assert "layers.0" in untold
