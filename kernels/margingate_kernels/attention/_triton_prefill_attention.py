"""The Triton kernels of :mod:`margingate_kernels.attention.prefill_attention`. Import only where Triton is installed.

A program attends for a tile: neighbouring tokens of one request with all query heads of one K/V head, so that K and V
are read once for them. It walks the context from its first column in blocks of fixed size. Blocks that every token of
the tile sees need no mask; the last one or two are masked, column by column. Where a request's tiles begin depends on
its chunks, so a block may be masked in one run and not in another: both ways run the same instructions on the numbers
that count (multiply-adds are written out, so that the compiler cannot round one way differently), and a block that a
token does not see adds nothing, exactly.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["requests"])
def plan_kernel(
    queries,  # int32 [requests + 1]: where each request's new tokens begin
    begins,  # int32 [requests]: where its slots begin in indices
    ends,  # int32 [requests]: where they end
    tiles,  # int32 [>= tiles, 4]: first token, tokens, first slot, columns that the first token sees
    count,  # int32 [2]: tiles in use, tokens in them
    requests,
    TOKENS: tl.constexpr,
    REQUESTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    request = tl.program_id(0)
    r = tl.arange(0, REQUESTS)
    live = r < requests
    new = tl.load(queries + r + 1, mask=live, other=0) - tl.load(queries + r, mask=live, other=0)
    counts = (new + TOKENS - 1) // TOKENS
    before = tl.sum(tl.where(r < request, counts, 0), 0)
    if request == 0:
        tl.store(count, tl.sum(counts, 0))
        tl.store(count + 1, tl.load(queries + requests))
    begin = tl.load(queries + request)
    tokens = tl.load(queries + request + 1) - begin
    slots = tl.load(begins + request)
    cached = tl.load(ends + request) - slots - tokens
    n = (tokens + TOKENS - 1) // TOKENS
    for at in range(0, n, WIDE):
        i = at + tl.arange(0, WIDE)
        first = (n - 1 - i) * TOKENS  # the last tiles have most to read: they start first
        mine = tiles + (before + i) * 4
        tl.store(mine, begin + first, mask=i < n)
        tl.store(mine + 1, tl.minimum(tokens - first, TOKENS), mask=i < n)
        tl.store(mine + 2, tl.zeros_like(i) + slots, mask=i < n)
        tl.store(mine + 3, cached + first + 1, mask=i < n)


@triton.jit
def _attend(s, values, best, total, acc, scale):
    """Return the running (maximum, sum of weights, weighted values) with one more block of raw scores ``s``."""
    above = tl.maximum(best, tl.max(s, 1) * scale)
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale, tl.broadcast_to(-above[:, None], s.shape)))
    shrink = tl.exp2(best - above)
    total = tl.fma(total, shrink, tl.sum(p, 1))
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None])
    return above, total, acc


@triton.jit(do_not_specialize=["rows"])
def prefill_kernel(
    q,  # [tokens, KV_HEADS * GROUP, DIM], tokens q_stride apart
    k,  # [slots, KV_HEADS, DIM], contiguous
    v,
    indices,  # int32: the slots of each request's context, in order
    tiles,  # from plan_kernel
    count,
    out,  # [rows, KV_HEADS * GROUP, DIM], contiguous
    scale,  # of the logits, times log2(e)
    q_stride,
    rows,  # tokens and padding after them
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    used = tl.load(count)
    m = tl.arange(0, ROWS)
    token, g = m // GROUP_P2, m % GROUP_P2
    d = tl.arange(0, DIM)
    heads = (head * GROUP + g)[:, None] * DIM + d[None, :]
    if tile < used:
        first = tl.load(tiles + tile * 4).to(tl.int64)
        tokens = tl.load(tiles + tile * 4 + 1)
        begin = tl.load(tiles + tile * 4 + 2)
        seen = tl.load(tiles + tile * 4 + 3)

        b = tl.arange(0, BLOCK)
        real = (token < tokens) & (g < GROUP)
        x = tl.load(q + (first + token)[:, None] * q_stride + heads, mask=real[:, None], other=0.0)
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM], tl.float32)
        whole = seen // BLOCK * BLOCK
        for t in tl.range(0, whole, BLOCK, num_stages=STAGES):
            slot = tl.load(indices + begin + t + b).to(tl.int64)
            place = (slot * KV_HEADS + head)[:, None] * DIM + d[None, :]
            s = tl.dot(x, tl.trans(tl.load(k + place)))
            best, total, acc = _attend(s, tl.load(v + place), best, total, acc, scale)
        stop = seen + tokens - 1
        for t in tl.range(whole, stop, BLOCK, num_stages=1):
            inside = t + b < stop
            slot = tl.load(indices + begin + t + b, mask=inside, other=0).to(tl.int64)
            place = (slot * KV_HEADS + head)[:, None] * DIM + d[None, :]
            s = tl.dot(x, tl.trans(tl.load(k + place, mask=inside[:, None], other=0.0)))
            s = tl.where((t + b)[None, :] < (seen + token)[:, None], s, float("-inf"))
            values = tl.load(v + place, mask=inside[:, None], other=0.0)
            best, total, acc = _attend(s, values, best, total, acc, scale)
        y = acc / total[:, None]
        into = out + (first + token)[:, None] * (KV_HEADS * GROUP * DIM) + heads
        tl.store(into, y.to(out.dtype.element_ty), mask=real[:, None])
    else:
        # Padding attends to nothing. A grid of rows / TOKENS + requests programs a head has enough left for all of it.
        first = tl.load(count + 1).to(tl.int64) + (tile - used).to(tl.int64) * (ROWS // GROUP_P2)
        padding = (first + token < rows) & (g < GROUP)
        into = out + (first + token)[:, None] * (KV_HEADS * GROUP * DIM) + heads
        tl.store(into, tl.zeros([ROWS, DIM], out.dtype.element_ty), mask=padding[:, None])
