"""The Triton kernel of :mod:`margingate_kernels.decode_attention`. Import only where Triton is installed.

One launch of a fixed number of programs, which fits a CUDA graph: what there is to do is read from ``indptr`` on the
GPU. Every row's context is cut into chunks by a rule that looks at its own length alone, and the programs take the
(row, chunk, K/V head) triples in turn. A chunk's result goes to the workspace; the program that arrives last at the
counter of (row, head) merges the row's chunks, always in the same order, and sets the counter back to 0.

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


@triton.jit
def _merge(
    parts, logsums, out, first, groups, n, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, MOST: tl.constexpr
):  # fmt: skip
    """Write one (row, K/V head) from its ``n`` chunks."""
    d = tl.arange(0, DIM)
    c = tl.arange(0, MOST)
    used = c < n
    at = first + c * KV_HEADS
    for g in tl.static_range(GROUP):
        # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
        s = tl.load(logsums + at * GROUP + g, mask=used, other=float("-inf"), cache_modifier=".cg")
        w = tl.exp2(s - tl.max(s, 0))
        part = (at * GROUP + g)[:, None] * DIM + d[None, :]
        x = tl.load(parts + part, mask=used[:, None], other=0.0, cache_modifier=".cg")
        y = tl.sum(x * w[:, None], 0) / tl.sum(w, 0)
        tl.store(out + (groups + g) * DIM + d, y.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def decode_kernel(
    q,  # [rows, KV_HEADS * GROUP, DIM], contiguous
    k,  # [slots, KV_HEADS, DIM], contiguous
    v,
    indptr,  # int32 [rows + 1]: where each row's slots begin in indices
    indices,  # int32: the slots of each row's context, in order
    out,  # like q
    parts,  # float32 [rows, MOST, KV_HEADS, GROUP, DIM]
    logsums,  # float32 [rows, MOST, KV_HEADS, GROUP], base 2
    counters,  # int32 [rows, KV_HEADS], 0 between launches
    scale,  # of the logits, times log2(e)
    rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MOST: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    r = tl.arange(0, ROWS)
    live = r < rows
    begins = tl.load(indptr + r, mask=live, other=0)
    lengths = tl.load(indptr + r + 1, mask=live, other=0) - begins
    tokens = _chunk_tokens(lengths, CHUNK, MOST, BLOCK)
    # A row without context has one empty chunk, so that its output is written too.
    counts = tl.where(live, tl.maximum((lengths + tokens - 1) // tokens, 1), 0)
    ends = tl.cumsum(counts, 0)
    g = tl.arange(0, GROUP_P2)
    d = tl.arange(0, DIM)
    b = tl.arange(0, BLOCK)
    work = tl.program_id(0)
    while work < tl.sum(counts, 0) * KV_HEADS:
        item = work // KV_HEADS
        head = work % KV_HEADS
        row = tl.sum((ends <= item).to(tl.int32), 0)
        mine = r == row
        chunk = tl.sum(tl.where(mine, item - (ends - counts), 0), 0)
        length = tl.sum(tl.where(mine, lengths, 0), 0)
        begin = tl.sum(tl.where(mine, begins, 0), 0)
        n = tl.sum(tl.where(mine, counts, 0), 0)
        size = _chunk_tokens(length, CHUNK, MOST, BLOCK)
        start = begin + chunk * size
        stop = begin + tl.minimum((chunk + 1) * size, length)

        groups = row.to(tl.int64) * KV_HEADS * GROUP + head * GROUP
        x = tl.load(q + (groups + g)[:, None] * DIM + d[None, :], mask=(g < GROUP)[:, None], other=0.0)
        best = tl.full([GROUP_P2], float("-inf"), tl.float32)
        total = tl.zeros([GROUP_P2], tl.float32)
        acc = tl.zeros([GROUP_P2, DIM], tl.float32)
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
                _merge(parts, logsums, out, first, groups, n, KV_HEADS, GROUP, DIM, MOST)
                tl.store(counters + row * KV_HEADS + head, 0)
        work += tl.num_programs(0)
