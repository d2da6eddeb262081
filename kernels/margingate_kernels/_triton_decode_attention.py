"""The Triton kernels of :mod:`margingate_kernels.decode_attention`. Import only where Triton is installed.

Both are launches of a fixed number of programs, which fit a CUDA graph: what there is to do is read from ``indptr`` on
the GPU. ``plan_kernel`` cuts every row's context into chunks by a rule that looks at its own length alone, once for all
layers of a forward; in ``decode_kernel`` the programs take the (row, chunk, K/V head) triples in turn. A chunk's result
goes to the workspace; the program that arrives last at the counter of (row, head) merges the row's chunks, always in the
same order, and sets the counter back to 0.

Neither the number of rows nor that of programs is a constant of the code, and no sum crosses two rows: one binary does
the same arithmetic for a row whoever its companions are.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk_tokens(length, CHUNK: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of a chunk: CHUNK, or more where a row would have more than MOST chunks; a multiple of BLOCK."""
    return tl.maximum(CHUNK, (length + MOST * BLOCK - 1) // (MOST * BLOCK) * BLOCK)


@triton.jit(do_not_specialize=["rows"])
def plan_kernel(
    indptr,  # int32 [rows + 1]: where each row's slots begin in indices
    items,  # int32 [max rows * MOST, 4]: row, first and end of a chunk in indices, chunk + MOST * chunks of the row
    count,  # int32 [1]: items in use
    rows,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0)
    r = tl.arange(0, ROWS)
    live = r < rows
    begins = tl.load(indptr + r, mask=live, other=0)
    lengths = tl.load(indptr + r + 1, mask=live, other=0) - begins
    tokens = _chunk_tokens(lengths, CHUNK, MOST, BLOCK)
    # A row without context has one empty chunk, so that its output is written too.
    counts = tl.where(live, tl.maximum((lengths + tokens - 1) // tokens, 1), 0)
    before = tl.sum(tl.where(r < row, counts, 0), 0)
    begin = tl.load(indptr + row)
    length = tl.load(indptr + row + 1) - begin
    size = _chunk_tokens(length, CHUNK, MOST, BLOCK)
    n = tl.maximum((length + size - 1) // size, 1)
    c = tl.arange(0, MOST)
    mine = items + (before + c) * 4
    used = c < n
    tl.store(mine, tl.zeros([MOST], tl.int32) + row, mask=used)
    tl.store(mine + 1, begin + c * size, mask=used)
    tl.store(mine + 2, begin + tl.minimum((c + 1) * size, length), mask=used)
    tl.store(mine + 3, c + MOST * n, mask=used)
    if row == 0:
        tl.store(count, tl.sum(counts, 0))


@triton.jit
def _merge(
    parts, logsums, out, first, groups, n, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write one (row, K/V head) from its ``n`` chunks, ``WIDE`` of them at a time so that their loads overlap."""
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    c = tl.arange(0, MOST)
    # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
    at = (first + c * KV_HEADS)[:, None] * GROUP + g[None, :]
    here = (c < n)[:, None] & (g < GROUP)[None, :]
    s = tl.load(logsums + at, mask=here, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(s, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(s - top[None, :]), 0)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    for begin in range(0, n, WIDE):
        k = begin + tl.arange(0, WIDE)
        place = (first + k * KV_HEADS)[:, None] * GROUP + g[None, :]
        inside = (k < n)[:, None] & (g < GROUP)[None, :]
        w = tl.exp2(tl.load(logsums + place, mask=inside, other=float("-inf"), cache_modifier=".cg") - top[None, :])
        part = place[:, :, None] * DIM + d[None, None, :]
        x = tl.load(parts + part, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        acc += tl.sum(x * w[:, :, None], 0)
    y = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + (groups + g)[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit
def decode_kernel(
    q,  # [rows, KV_HEADS * GROUP, DIM], contiguous
    k,  # [slots, KV_HEADS, DIM], contiguous
    v,
    indices,  # int32: the slots of each row's context, in order
    items,  # from plan_kernel
    count,
    out,  # like q
    parts,  # float32 [max rows, MOST, KV_HEADS, GROUP, DIM]
    logsums,  # float32 [max rows, MOST, KV_HEADS, GROUP], base 2
    counters,  # int32 [max rows, KV_HEADS], 0 between launches
    scale,  # of the logits, times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    g = tl.arange(0, DOT_ROWS)
    d = tl.arange(0, DIM)
    b = tl.arange(0, BLOCK)
    work = tl.program_id(0)
    while work < tl.load(count) * KV_HEADS:
        item = items + work // KV_HEADS * 4
        head = work % KV_HEADS
        row = tl.load(item)
        start = tl.load(item + 1)
        stop = tl.load(item + 2)
        cut = tl.load(item + 3)
        chunk = cut % MOST
        n = cut // MOST

        groups = row.to(tl.int64) * KV_HEADS * GROUP + head * GROUP
        x = tl.load(q + (groups + g)[:, None] * DIM + d[None, :], mask=(g < GROUP)[:, None], other=0.0)
        best = tl.full([DOT_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([DOT_ROWS], tl.float32)
        acc = tl.zeros([DOT_ROWS, DIM], tl.float32)
        for at in tl.range(start, stop, BLOCK, num_stages=STAGES):
            inside = at + b < stop
            slot = tl.load(indices + at + b, mask=inside, other=0).to(tl.int64)
            place = (slot * KV_HEADS + head)[:, None] * DIM + d[None, :]
            keys = tl.load(k + place, mask=inside[:, None], other=0.0)
            s = tl.where(inside[None, :], tl.dot(x, tl.trans(keys)) * scale, float("-inf"))
            above = tl.maximum(best, tl.max(s, 1))
            p = tl.exp2(s - above[:, None])
            shrink = tl.exp2(best - above)
            values = tl.load(v + place, mask=inside[:, None], other=0.0)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
            total = total * shrink + tl.sum(p, 1)
            best = above
        y = acc / tl.where(total > 0.0, total, 1.0)[:, None]

        if n == 1:
            tl.store(
                out + (groups + g)[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=(g < GROUP)[:, None]
            )
        else:
            first = row.to(tl.int64) * MOST * KV_HEADS + head
            part = (first + chunk * KV_HEADS) * GROUP + g
            tl.store(parts + part[:, None] * DIM + d[None, :], y, mask=(g < GROUP)[:, None])
            tl.store(logsums + part, best + tl.log2(total), mask=g < GROUP)
            tl.debug_barrier()
            # Release: what this program stored is visible before the count; acquire: the last one sees all of it.
            arrived = tl.atomic_add(counters + row * KV_HEADS + head, 1, sem="acq_rel", scope="gpu")
            if arrived == n - 1:
                _merge(parts, logsums, out, first, groups, n, KV_HEADS, GROUP, GROUP_P2, DIM, MOST, WIDE)
                tl.store(counters + row * KV_HEADS + head, 0)
        work += tl.num_programs(0)
