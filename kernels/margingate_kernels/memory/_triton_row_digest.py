"""The Triton kernel of :mod:`margingate_kernels.memory.row_digest`. Import only where Triton is installed."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(z):
    """The finalizer of splitmix64: a bijection of 64 bits in which every input bit reaches every output bit."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def digest_kernel(
    data,  # int{8 * UNIT} [rows, units], unit stride along units
    row_stride,
    units,  # units of a row
    out,  # int64 [rows], preset to the length's term
    splits,  # programs of a row
    UNIT: tl.constexpr,  # bytes
    BLOCK: tl.constexpr,  # 64-bit words
    UNROLL: tl.constexpr,
):
    """Add the terms of UNROLL * BLOCK words to a row's sum; integer addition makes the order irrelevant."""
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    start = (program % splits).to(tl.int64) * (BLOCK * UNROLL)
    pointer = data + row * row_stride
    parts: tl.constexpr = 8 // UNIT
    total = tl.zeros([BLOCK], tl.uint64)
    for step in tl.static_range(UNROLL):
        index = start + step * BLOCK + tl.arange(0, BLOCK)
        word = tl.zeros([BLOCK], tl.uint64)
        for part in tl.static_range(parts):
            unit = index * parts + part
            piece = tl.load(pointer + unit, mask=unit < units, other=0)
            if UNIT == 1:
                piece = piece.to(tl.uint8, bitcast=True)
            elif UNIT == 2:
                piece = piece.to(tl.uint16, bitcast=True)
            elif UNIT == 4:
                piece = piece.to(tl.uint32, bitcast=True)
            else:
                piece = piece.to(tl.uint64, bitcast=True)
            word = word | (piece.to(tl.uint64) << (part * 8 * UNIT))
        term = _mix(word + (index + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
        total += tl.where(index * parts < units, term, tl.zeros([BLOCK], tl.uint64))
    tl.atomic_add(out + row, tl.sum(total, 0).to(tl.int64, bitcast=True), sem="relaxed")
