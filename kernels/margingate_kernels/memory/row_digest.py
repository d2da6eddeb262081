"""A 64-bit digest of each row's bytes, to compare rows for bit equality without copying them to the host.

Let w_0 .. w_{m-1} be the row's bytes as little-endian 64-bit words, the last one filled up with zero bytes, and n the
number of bytes. All arithmetic is modulo 2^64:

    digest = mix(n ^ SALT) + sum_i mix(w_i + (i + 1) * STEP)

``mix`` is splitmix64's finalizer. The sum runs in any order, so it is parallel and still the same number everywhere;
the index inside ``mix`` makes it depend on the order of the words. Rows of equal bytes have equal digests, whatever
their dtype, stride, device or batch; rows that differ collide with a probability of about 2^-64. It is no cryptographic
hash: an opponent can make collisions.
"""

from __future__ import annotations

import torch

from margingate_kernels._backend import on_device, use_triton

_BITS = 2**64
_STEP = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB
_SALT = 0xD1B54A32D192ED03
_INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_digest(x: torch.Tensor) -> torch.Tensor:
    """Return the digest of each row of ``x``, the index along its first dimension.

    Parameters
    ----------
    x
        [rows, ...], any dtype; the dimensions after the first must be contiguous among themselves.

    Returns
    -------
    torch.Tensor
        int64 [rows] on the device of ``x`` (the digest's bits). No host sync; a CUDA graph may capture it.
    """
    units = _units(x)
    if not use_triton(x):
        return _reference(units)
    from margingate_kernels.memory._triton_row_digest import digest_kernel

    rows, count = units.shape
    width = units.itemsize
    out = torch.full((rows,), _length_term(count * width), dtype=torch.int64, device=x.device)
    words = -(-count * width // 8)
    block, unroll, warps = (256, 4, 4) if words > 256 else (128, 1, 2)
    splits = -(-words // (block * unroll))
    if rows and splits:
        with on_device(x):
            digest_kernel[(rows * splits,)](
                units, units.stride(0), count, out, splits, UNIT=width, BLOCK=block, UNROLL=unroll, num_warps=warps
            )
    return out


def row_digest_reference(x: torch.Tensor) -> torch.Tensor:
    """Compute :func:`row_digest` with plain PyTorch."""
    return _reference(_units(x))


def _units(x: torch.Tensor) -> torch.Tensor:
    """View ``x`` as [rows, units] of the widest integers that its rows' lengths and addresses allow."""
    if x.dim() == 0:
        raise ValueError("row_digest needs at least one dimension")
    rows = x.detach().resolve_conj().resolve_neg()
    if len(rows) and not rows[0].is_contiguous():
        raise ValueError(f"the dimensions after the first must be contiguous, got strides {x.stride()}")
    rows = rows.unsqueeze(1) if rows.dim() == 1 else rows.flatten(1) if rows.numel() else rows.reshape(len(rows), 0)
    width = min(rows.itemsize, 8)
    units = rows.view(_INTS[width])
    if len(units) == 1:
        units = units[0].unsqueeze(0)  # a single row has no step to be misaligned
    size, step = units.shape[1] * width, units.stride(0) * width
    starts = (units.data_ptr(), units.storage_offset() * width)
    if width < 8 and size and len(units) and not any(number % 8 for number in (size, step, *starts)):
        return units.view(torch.int64)
    return units


def _length_term(size: int) -> int:
    z = size ^ _SALT
    z = (z ^ (z >> 30)) * _MUL1 % _BITS
    z = (z ^ (z >> 27)) * _MUL2 % _BITS
    return _signed(z ^ (z >> 31))


def _signed(value: int) -> int:
    value %= _BITS
    return value - _BITS if value >= _BITS // 2 else value


def _shift_right(z: torch.Tensor, n: int) -> torch.Tensor:
    """Shift int64 right by ``n``, filling with zeros (PyTorch's >> copies the sign)."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MUL1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MUL2)
    return z ^ _shift_right(z, 31)


def _reference(units: torch.Tensor) -> torch.Tensor:
    rows, size = len(units), units.shape[1] * units.itemsize
    count = -(-size // 8)
    length = _length_term(size)
    if not rows * size:
        return torch.full((rows,), length, dtype=torch.int64, device=units.device)
    data = torch.zeros((rows, count * 8), dtype=torch.uint8, device=units.device)
    data[:, :size] = units.contiguous().view(torch.uint8)
    words = data.view(torch.int64)
    position = torch.arange(1, count + 1, device=units.device) * _signed(_STEP)
    return _mix(words + position).sum(dim=1) + length
