"""kv_column and row_digest where Triton is missing: the references, their input checks, and known digests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from margingate_kernels import KVColumns, row_digest

ROOT = Path(__file__).resolve().parents[2]
MASK = 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def digest_of(data: bytes) -> int:
    """The definition in row_digest.py, written out with Python's integers."""
    total = mix(len(data) ^ 0xD1B54A32D192ED03)
    for i in range(0, len(data), 8):
        word = int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little")
        total += mix(word + (i // 8 + 1) * 0x9E3779B97F4A7C15 & MASK)
    total &= MASK
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 100])
def test_digest_against_its_definition(size):
    x = torch.randint(0, 256, (3, size), generator=torch.Generator().manual_seed(size), dtype=torch.uint8)
    assert row_digest(x).tolist() == [digest_of(bytes(row.tolist())) for row in x]


def test_digest_known_numbers():
    """Digests are written to artifacts: they must not change between versions."""
    assert row_digest(torch.arange(12).reshape(2, 6)).tolist() == [-3253330968032962588, 7185631174143627046]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_digest_of_other_types(dtype):
    x = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]).to(dtype)
    a, b = row_digest(x).tolist()
    assert a != b
    assert row_digest(x.flip(0)).tolist() == [b, a]


def test_digest_tells_zero_from_minus_zero():
    a, b = row_digest(torch.tensor([0.0, -0.0])).tolist()
    assert a != b


def test_digest_bad_input():
    with pytest.raises(ValueError, match="dimension"):
        row_digest(torch.tensor(1.0))
    with pytest.raises(ValueError, match="contiguous"):
        row_digest(torch.zeros(2, 4, 4).transpose(1, 2))


def buffers(layers: int = 2, slots: int = 6, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return [torch.randn(slots, 2, 4).to(dtype) for _ in range(layers)]


def test_columns_round_trip():
    pool = KVColumns(buffers(), buffers())
    slots, staging = torch.tensor([5, -1, 0]), pool.staging(3).zero_()
    before = [b.clone() for b in pool.k_buffers]
    pool.save(slots, staging)
    assert torch.equal(staging[1, 0, 0], before[1][5].flatten())
    assert torch.equal(staging[0, 1, 2], pool.v_buffers[0][0].flatten())
    assert not staging[:, :, 1].any()
    for buffer in pool.k_buffers:
        buffer[5] += 2
    change = pool.max_abs_change(slots, staging)
    assert change.shape == (2, 3)
    assert (change[:, 0] > 1).all()
    assert not change[:, 1:].any()
    pool.restore(slots, staging)
    assert all(torch.equal(a, b) for a, b in zip(pool.k_buffers, before))


def test_columns_bad_input():
    k, v = buffers(), buffers()
    with pytest.raises(ValueError, match="as many"):
        KVColumns(k, v[:1])
    with pytest.raises(ValueError, match="float type"):
        KVColumns([b.to(torch.int8) for b in k], v)
    with pytest.raises(ValueError, match="all buffers"):
        KVColumns(k, buffers(slots=7))
    with pytest.raises(ValueError, match="contiguous"):
        KVColumns([b.transpose(0, 1).contiguous().transpose(0, 1) for b in k], v)
    pool = KVColumns(k, v)
    slots = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="staging must be"):
        pool.save(slots, pool.staging(3))
    with pytest.raises(ValueError, match="slots must be"):
        pool.save(slots.float(), pool.staging(2))
    with pytest.raises(ValueError, match="out must be"):
        pool.max_abs_change(slots, pool.staging(2), out=torch.empty(2, 3))


@pytest.mark.parametrize("stand_in", [False, True])
def test_import_needs_no_triton(stand_in):
    """Neither the import nor a call on CPU tensors touches Triton, be it missing or SGLang's stand-in."""
    code = (
        "import sys, types, importlib.machinery as m\n"
        + (
            "t = types.ModuleType('triton'); t.__spec__ = m.ModuleSpec('triton', None, is_package=True)\n"
            if stand_in
            else "t = None\n"
        )
        + "sys.modules['triton'] = t\n"
        "import torch, margingate_kernels as k\n"
        "from margingate_kernels._backend import has_triton\n"
        "assert not has_triton()\n"
        "assert k.top2_margin(torch.tensor([[1., 2.]]), torch.zeros(1)).token.tolist() == [1]\n"
        "assert k.row_digest(torch.zeros(2, 3)).shape == (2,)\n"
    )
    env = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
