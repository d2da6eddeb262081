"""Attention over paged K/V on a CPU in which a row's bits depend on its own context alone, for decode and prefill.

PyTorch's own kernel (``scaled_dot_product_attention``) attends; what is ours are the shapes that it is called with. Each
tile of query rows stands at a fixed place of its context and reads it from the first column to a fixed end, so a shape is a
function of the position, and neither companions nor chunks nor cached prefixes choose it. Tiles of one shape share a call,
whose entries PyTorch computes one by one::

    prefill    positions 0-31 read columns 0-31, positions 32-63 read 0-63, ...: what of a tile is not asked for is left out
    decode     a position reads its columns, rounded up to 64

Columns behind a position are masked, and read from the request's own first slot, so nothing of another request is touched.

It takes a third of the time of one call for each row: the heads that share K/V are the rows of one product, where PyTorch
multiplies each by itself, and slots are gathered by ``index_select``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

TILE = 32
"""Positions of a prefill's tile."""

COLUMNS = 64
"""What a decode's context is rounded up to."""


class Part(NamedTuple):
    """One request's rows of a forward: positions [first, end) of the context in row ``pool`` of the table of slots."""

    pool: int
    first: int
    end: int


class _Group(NamedTuple):
    """Tiles of one shape."""

    tiles: int
    columns: int
    source: torch.Tensor
    """[tiles * width] rows of the forward; a tile's padding repeats its first row."""
    target: torch.Tensor
    """Rows of the forward that come out."""
    kept: torch.Tensor | None
    """Entries of ``source`` that come out; None: all of them."""
    slots: torch.Tensor
    """[tiles * columns] slots of the pool."""
    masked: torch.Tensor
    """[tiles or 1, 1, width, columns], True behind a row's position."""


class HostAttention:
    """Attention of the rows of one forward; one object serves all of its layers.

    Parameters
    ----------
    parts
        The requests, in the order of their rows.
    table
        int [requests, positions]: the pool's slot of each column.
    decode
        Each part is one position that decodes. False: a prefill's new tokens.

    Raises
    ------
    ValueError
        A part has no rows, or more than one in a decode.
    """

    def __init__(self, parts: Sequence[Part], table: torch.Tensor, decode: bool) -> None:
        self._width = 1 if decode else TILE
        self._masks: dict[tuple[torch.dtype, int], list[torch.Tensor]] = {}
        found: dict[int, list[tuple[Part, int, int]]] = {}
        row = 0
        for part in parts:
            if part.end <= part.first or part.first < 0 or (decode and part.end - part.first != 1):
                raise ValueError(f"{part} is not {'one position' if decode else 'a range of positions'}")
            for start in range(part.first // self._width * self._width, part.end, self._width):
                end = start + self._width
                columns = -(-end // COLUMNS) * COLUMNS if decode else end
                found.setdefault(columns, []).append((part, start, row - part.first))
            row += part.end - part.first
        self.rows = row
        self._groups = [self._group(columns, tiles, table) for columns, tiles in found.items()]

    def _group(self, columns: int, tiles: list[tuple[Part, int, int]], table: torch.Tensor) -> _Group:
        width = self._width
        source: list[int] = []
        target: list[int] = []
        kept: list[int] = []
        last: list[int] = []
        for number, (part, start, offset) in enumerate(tiles):
            first, end = max(start, part.first), min(start + width, part.end)
            inside = range(first + offset, end + offset)
            source += [first + offset] * (first - start) + list(inside) + [first + offset] * (start + width - end)
            kept += range(number * width + first - start, number * width + end - start)
            target += inside
            last.append(end - 1)
        index = torch.arange(columns)
        pools = torch.tensor([part.pool for part, _, _ in tiles])
        ends = torch.tensor(last)[:, None]
        slots = table[pools, :columns].long()
        if slots.shape[1] < columns:  # the table ends inside the last block
            slots = torch.nn.functional.pad(slots, (0, columns - slots.shape[1]))
        # What lies behind may belong to another request by now, whose values a mask would not keep out if they are not finite.
        slots = torch.where(index <= ends, slots, slots[:, :1])
        # The tiles of a prefill's group start at one position, those of a decode are one position each.
        positions = ends if width == 1 else torch.arange(columns - width, columns)[None]
        return _Group(
            len(tiles), columns, torch.tensor(source), torch.tensor(target),
            None if len(kept) == len(source) else torch.tensor(kept), slots.view(-1),
            (index > positions[:, :, None])[:, None],
        )  # fmt: skip

    def __call__(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """Attend.

        Parameters
        ----------
        q, out
            [rows, heads, head_dim].
        keys, values
            [slots, kv_heads, head_dim]: the pool of one layer, the forward's own columns written; of q's dtype.
        scale
            What q times k is multiplied by.

        Returns
        -------
        torch.Tensor
            ``out``.
        """
        if q.shape != out.shape or len(q) != self.rows:
            raise ValueError(f"q {tuple(q.shape)} and out {tuple(out.shape)} must be [{self.rows}, heads, head_dim]")
        width, kv_heads, size = self._width, keys.shape[1], q.shape[2]
        share = q.shape[1] // kv_heads
        masks = self._masks.get((q.dtype, share))
        if masks is None:
            masks = self._masks[q.dtype, share] = [self._mask(group, q.dtype, share) for group in self._groups]
        for group, mask in zip(self._groups, masks):
            tiles, context = group.tiles, (group.tiles, group.columns, kv_heads, size)
            query = q.index_select(0, group.source).view(tiles, width, kv_heads, share, size).permute(0, 2, 3, 1, 4)
            answer = torch.nn.functional.scaled_dot_product_attention(
                query.reshape(tiles, kv_heads, share * width, size),
                keys.index_select(0, group.slots).view(context).transpose(1, 2),
                values.index_select(0, group.slots).view(context).transpose(1, 2),
                attn_mask=mask, scale=scale,
            )  # fmt: skip
            answer = answer.view(tiles, kv_heads, share, width, size).permute(0, 3, 1, 2, 4)
            flat = answer.reshape(tiles * width, kv_heads * share, size)
            out.index_copy_(0, group.target, flat if group.kept is None else flat.index_select(0, group.kept))
        return out

    @staticmethod
    def _mask(group: _Group, dtype: torch.dtype, share: int) -> torch.Tensor:
        """Return what is added to the scores, for ``share`` query heads of a K/V head in the rows of one product."""
        mask = torch.zeros(group.masked.shape, dtype=dtype).masked_fill_(group.masked, float("-inf"))
        return mask.repeat(1, 1, share, 1)
