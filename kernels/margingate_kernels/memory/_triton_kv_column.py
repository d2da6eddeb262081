"""The Triton kernels of :mod:`margingate_kernels.memory.kv_column`. Import only where Triton is installed.

Both take the pool as a device tensor of addresses, K of every layer then V of every layer, so that one launch reaches
all layers. ALIGNED says that every row starts at a multiple of 16 bytes, which lets a thread move 16 bytes at once.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(
    pointers,  # uint64 [2 * layers]
    slots,  # int [n]
    staging,  # WORD [layers, 2, n, ROW], unit stride along ROW
    layer_stride,
    half_stride,
    row_stride,
    layers,
    WORD: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Copy row i of plane p (K of layer p, or V of layer p - layers) between pool and staging, bit for bit."""
    i = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)  # a layer times its stride exceeds int32 where much is staged
    half = plane // layers
    layer = plane - half * layers
    slot = tl.load(slots + i).to(tl.int64)
    pool = tl.load(pointers + plane).to(tl.pointer_type(WORD)) + slot * ROW
    stage = staging + layer * layer_stride + half * half_stride + i * row_stride
    if ALIGNED:
        pool = tl.multiple_of(pool, 16)
        stage = tl.multiple_of(stage, 16)
    if slot >= 0:
        for start in tl.static_range(0, ROW, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < ROW
            if SAVE:
                tl.store(stage + index, tl.load(pool + index, mask=mask), mask=mask)
            else:
                tl.store(pool + index, tl.load(stage + index, mask=mask), mask=mask)


@triton.jit
def change_kernel(
    pointers,  # uint64 [2 * layers]
    slots,  # int [n]
    staging,  # FLOAT [layers, 2, n, ROW], unit stride along ROW
    layer_stride,
    half_stride,
    row_stride,
    layers,
    out,  # float32 [layers, n]
    out_stride,
    FLOAT: tl.constexpr,
    BITS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the largest |staging - pool| of row i of one layer, over K and V.

    The maximum is taken over the bits of the magnitudes as integers: floats without a sign are ordered like their bits,
    and NaN lies above inf, so a NaN comes out as NaN.
    """
    i = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + i).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.int32)
    if slot >= 0:
        for half in tl.static_range(2):
            pool = tl.load(pointers + half * layers + layer).to(tl.pointer_type(FLOAT)) + slot * ROW
            stage = staging + layer * layer_stride + half * half_stride + i * row_stride
            if ALIGNED:
                pool = tl.multiple_of(pool, 16)
                stage = tl.multiple_of(stage, 16)
            for start in tl.static_range(0, ROW, BLOCK):
                index = start + tl.arange(0, BLOCK)
                mask = index < ROW
                a = tl.load(pool + index, mask=mask, other=0.0)
                b = tl.load(stage + index, mask=mask, other=0.0)
                change = (b.to(tl.float32) - a.to(tl.float32)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
                same = a.to(BITS, bitcast=True) == b.to(BITS, bitcast=True)
                largest = tl.maximum(largest, tl.where(same, 0, change))
    tl.store(out + layer * out_stride + i, tl.max(largest, 0).to(tl.float32, bitcast=True))
