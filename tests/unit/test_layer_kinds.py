"""Which linear layers of SGLang's models the probe knows: in 16 bits, in 8 bits by block, channel or tensor; the others by name."""

from __future__ import annotations

import importlib.util

import pytest
from sglang_process import SGLangProcess

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

CODE = """
import torch
from types import SimpleNamespace as Box
from sglang.srt.layers.linear import LinearBase
from sglang_margingate.serving.layers.kinds import layer_kinds, unknown_layers
FP8 = torch.float8_e4m3fn

def deepgemm_linear(): pass

def method(name, **fields):
    return type(name, (), {"apply": lambda self, layer, x, bias: x, **fields})()

def layer(how, weight, **parts):
    one = LinearBase.__new__(LinearBase)
    torch.nn.Module.__init__(one)
    one.quant_method = how
    one.weight = torch.nn.Parameter(weight, False)
    for name, value in parts.items():
        setattr(one, name, torch.nn.Parameter(value, False) if isinstance(value, torch.Tensor) else value)
    return one

def of(*layers):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    return model

small = torch.randn(256, 128).to(FP8)
block = method("Fp8LinearMethod", use_marlin=False, use_mxfp8=False, block_quant=True, weight_block_size=[128, 128],
               w8a8_block_fp8_linear=staticmethod(deepgemm_linear))
channel = method("Fp8LinearMethod", use_marlin=False, use_mxfp8=False, block_quant=False, weight_block_size=None)
scheme = type("CompressedTensorsW8A8Fp8", (), {"weight_block_size": None})()
known = of(
    layer(method("UnquantizedLinearMethod"), torch.randn(256, 128).bfloat16()),
    layer(block, small, weight_scale_inv=torch.rand(2, 1)),
    layer(block, small.clone(), weight_scale_inv=torch.rand(2, 1)),
    layer(channel, small.t(), weight_scale=torch.rand(1, 256), input_scale=None),
    layer(channel, small.t(), weight_scale=torch.rand(1, 256), input_scale=torch.tensor(0.5)),
    layer(method("CompressedTensorsLinearMethod"), small.t(), weight_scale=torch.rand(256, 1), scheme=scheme),
    layer(method("W8A8Fp8LinearMethod"), small.t(), weight_scale=torch.rand(1)),
)
for kind in layer_kinds(known):
    print(kind.count, kind.shape, kind.inputs_first, len(kind.scales), kind.describe(), sep="; ")
assert unknown_layers(known) == []
wrong = of(
    layer(method("AWQLinearMethod"), torch.zeros(4, 4, dtype=torch.int32)),
    layer(method("Fp8LinearMethod", use_marlin=True, use_mxfp8=False), torch.zeros(4, 4, dtype=torch.int32)),
    layer(block, small, weight_scale_inv=torch.zeros(2, 1, dtype=torch.int32)),
    layer(method("CompressedTensorsLinearMethod"), small, scheme=type("CompressedTensorsWNA16", (), {})()),
)
assert layer_kinds(wrong) == []
print([each.split(", computed by ")[1] for each in unknown_layers(wrong)])
"""


@needs_sglang
def test_what_the_probe_knows_of_linear_layers(sglang: SGLangProcess) -> None:
    done = sglang.run(CODE)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "1; (256, 128); False; 0; bfloat16, UnquantizedLinearMethod, no bias",
        "2; (256, 128); False; 1; float8_e4m3fn, Fp8LinearMethod, blocks of 128x128 by deepgemm_linear, no bias",
        "1; (256, 128); True; 1; float8_e4m3fn, Fp8LinearMethod, channels, activations by row, no bias",
        "1; (256, 128); True; 2; float8_e4m3fn, Fp8LinearMethod, channels, activations static, no bias",
        "1; (256, 128); True; 1; float8_e4m3fn, CompressedTensorsLinearMethod, channels, activations by row, no bias",
        "1; (256, 128); True; 1; float8_e4m3fn, W8A8Fp8LinearMethod, one scale, activations by row, no bias",
        "['AWQLinearMethod)', 'Fp8LinearMethod)', 'Fp8LinearMethod)', 'CompressedTensorsLinearMethod)']",
    ]
