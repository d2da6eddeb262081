"""Save, restore and compare the K/V columns of given slots over all layers, one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from margingate_kernels._backend import on_device, use_triton

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class KVColumns:
    """The K/V pool of a model, seen as columns: one slot's K and V rows of every layer.

    A column lives in a staging buffer [layers, 2, n, heads * head_dim] (K at 0, V at 1) while the pool's own is
    overwritten. ``slots`` is int32 or int64 [n] on the pool's device; a negative slot is skipped (its staging rows and
    the pool stay as they are, its change is 0), so that a batch may be padded. Slots are not checked against the pool's
    size on a GPU, which would need a sync. For ``restore`` they must be distinct, or the winner is undefined.

    Parameters
    ----------
    k_buffers, v_buffers
        One tensor a layer, [slots, heads, head_dim], contiguous, bfloat16, float16 or float32; all of one shape, dtype
        and device. Their addresses are read once, here: the pool must not be reallocated afterwards.
    """

    def __init__(self, k_buffers: Sequence[torch.Tensor], v_buffers: Sequence[torch.Tensor]) -> None:
        _check_pool(k_buffers, v_buffers)
        self.k_buffers = list(k_buffers)
        self.v_buffers = list(v_buffers)
        first = self.k_buffers[0]
        self.layers = len(self.k_buffers)
        self.row = first[0].numel()
        self.dtype = first.dtype
        self.device = first.device
        addresses = [t.data_ptr() for t in (*self.k_buffers, *self.v_buffers)]
        self.pointers = torch.tensor(addresses, dtype=torch.uint64, device=self.device)
        self._aligned = all(a % 16 == 0 for a in addresses) and self.row * first.itemsize % 16 == 0

    def staging(self, n: int) -> torch.Tensor:
        """Allocate an uninitialised staging buffer for ``n`` columns."""
        return torch.empty((self.layers, 2, n, self.row), dtype=self.dtype, device=self.device)

    def save(self, slots: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy the columns of ``slots`` from the pool to ``staging``, bit for bit."""
        self._check(slots, staging)
        if use_triton(staging):
            self._copy(slots, staging, save=True)
        else:
            save_reference(self, slots, staging)

    def restore(self, slots: torch.Tensor, staging: torch.Tensor) -> None:
        """Copy ``staging`` back into the columns of ``slots``, bit for bit."""
        self._check(slots, staging)
        if use_triton(staging):
            self._copy(slots, staging, save=False)
        else:
            restore_reference(self, slots, staging)

    def max_abs_change(
        self, slots: torch.Tensor, staging: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the largest absolute difference of staging and pool, of each layer and column.

        Elements of equal bits count as 0, whatever they are; an element that is NaN on one side only, or with other
        bits, makes the result NaN.

        Returns
        -------
        torch.Tensor
            float32 [layers, n], over K and V; ``out`` if it was given.
        """
        self._check(slots, staging)
        shape = (self.layers, len(slots))
        if out is None:
            out = torch.empty(shape, dtype=torch.float32, device=self.device)
        elif out.shape != shape or out.dtype != torch.float32 or out.device != self.device or not out.is_contiguous():
            raise ValueError(f"out must be contiguous float32 {shape} on {self.device}")
        if not use_triton(staging):
            return out.copy_(max_abs_change_reference(self, slots, staging))
        if len(slots):
            self._change(slots, staging, out)
        return out

    def _check(self, slots: torch.Tensor, staging: torch.Tensor) -> None:
        if slots.dim() != 1 or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
            raise ValueError(f"slots must be contiguous int32 or int64 [n], got {slots.dtype} {tuple(slots.shape)}")
        shape = (self.layers, 2, len(slots), self.row)
        if staging.shape != shape or staging.dtype != self.dtype:
            raise ValueError(
                f"staging must be {self.dtype} {shape}, got {staging.dtype} {tuple(staging.shape)} (layers, 2, n, row)"
            )
        if staging.stride(3) != 1:
            raise ValueError("staging must have unit stride along its last dimension")
        if slots.device != self.device or staging.device != self.device:
            raise ValueError(f"the pool is on {self.device}, slots on {slots.device}, staging on {staging.device}")

    def _rows_aligned(self, staging: torch.Tensor) -> bool:
        steps = [stride * staging.itemsize for stride in staging.stride()[:3]]
        return self._aligned and staging.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)

    def _copy(self, slots: torch.Tensor, staging: torch.Tensor, *, save: bool) -> None:
        import triton.language as tl

        from margingate_kernels.memory._triton_kv_column import copy_kernel

        if not len(slots):
            return
        aligned = self._rows_aligned(staging)
        # Words of 4 bytes where rows allow it, else of one element.
        wide = aligned or self.dtype == torch.float32
        words = staging.view(torch.int32 if wide else torch.int16)
        row = self.row * staging.itemsize // words.itemsize
        with on_device(staging):
            copy_kernel[(len(slots), 2 * self.layers)](
                self.pointers,
                slots,
                words,
                words.stride(0),
                words.stride(1),
                words.stride(2),
                self.layers,
                WORD=tl.int32 if wide else tl.int16,
                ROW=row,
                BLOCK=_block(row, 2048),
                ALIGNED=aligned,
                SAVE=save,
                num_warps=4,
            )

    def _change(self, slots: torch.Tensor, staging: torch.Tensor, out: torch.Tensor) -> None:
        import triton.language as tl

        from margingate_kernels.memory._triton_kv_column import change_kernel

        names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
        with on_device(staging):
            change_kernel[(len(slots), self.layers)](
                self.pointers,
                slots,
                staging,
                staging.stride(0),
                staging.stride(1),
                staging.stride(2),
                self.layers,
                out,
                out.stride(0),
                FLOAT=names[self.dtype],
                BITS=tl.int32 if self.dtype == torch.float32 else tl.int16,
                ROW=self.row,
                BLOCK=_block(self.row, 2048),
                ALIGNED=self._rows_aligned(staging),
                num_warps=4,
            )


def save_reference(pool: KVColumns, slots: torch.Tensor, staging: torch.Tensor) -> None:
    """Do :meth:`KVColumns.save` with plain PyTorch."""
    used = slots >= 0
    for half, buffers in enumerate((pool.k_buffers, pool.v_buffers)):
        for layer, buffer in enumerate(buffers):
            staging[layer, half, used] = buffer.flatten(1)[slots[used].long()]


def restore_reference(pool: KVColumns, slots: torch.Tensor, staging: torch.Tensor) -> None:
    """Do :meth:`KVColumns.restore` with plain PyTorch."""
    used = slots >= 0
    for half, buffers in enumerate((pool.k_buffers, pool.v_buffers)):
        for layer, buffer in enumerate(buffers):
            buffer.flatten(1)[slots[used].long()] = staging[layer, half, used]


def max_abs_change_reference(pool: KVColumns, slots: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
    """Compute :meth:`KVColumns.max_abs_change` with plain PyTorch."""
    if not len(slots):
        return torch.empty((pool.layers, 0), dtype=torch.float32, device=pool.device)
    current = staging.clone(memory_format=torch.contiguous_format)
    save_reference(pool, slots, current)
    bits = torch.int32 if pool.dtype == torch.float32 else torch.int16
    change = (staging.float() - current.float()).abs()
    change[staging.contiguous().view(bits) == current.view(bits)] = 0.0
    return change.amax(dim=(1, 3))


def _block(row: int, largest: int) -> int:
    return min(1 << (row - 1).bit_length(), largest)


def _check_pool(k_buffers: Sequence[torch.Tensor], v_buffers: Sequence[torch.Tensor]) -> None:
    if not k_buffers or len(k_buffers) != len(v_buffers):
        raise ValueError(f"need as many V buffers as K buffers, and one at least: {len(k_buffers)}, {len(v_buffers)}")
    first = k_buffers[0]
    if first.dim() < 2 or first.dtype not in _DTYPES or not first[0].numel():
        raise ValueError(
            f"buffers must be [slots, heads, head_dim] of a float type, got {first.dtype} {tuple(first.shape)}"
        )
    for buffer in (*k_buffers, *v_buffers):
        if (buffer.shape, buffer.dtype, buffer.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"all buffers must be {first.dtype} {tuple(first.shape)} on {first.device}, "
                f"got {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
            )
        if not buffer.is_contiguous():
            raise ValueError("buffers must be contiguous")
