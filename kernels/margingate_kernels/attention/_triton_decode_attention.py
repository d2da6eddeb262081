"""The Triton kernels of :mod:`margingate_kernels.attention.decode_attention`. Import only where Triton is installed.

What is computed and who computes it are two things here. Every context is cut into chunks by a rule that looks at its
own length alone; each chunk is attended to by itself, and the chunks' results are joined in rising order by
:func:`_join`: that is the arithmetic, the same for a row whoever its companions are. Which neighbouring chunks one
program takes, of one row or of several, depends on how much there is to do in the whole batch (``plan_kernel``): few rows
are spread over many programs, many rows are dealt out in equal shares, and neither changes a bit.

A program that has all chunks of a (row, K/V head) joins them as it goes. Otherwise the programs leave each chunk's
result in the workspace; the one that arrives last at the counter of (row, head) joins them and sets the counter back.
Where a row may have very many chunks they are joined in two steps, ``SPAN`` neighbouring ones first and then what the spans
gave, each by the program that arrives last there: the others would wait for one that joined them one by one.

Launches have a fixed number of programs, which fits a CUDA graph: what there is to do is read from ``indptr`` on the
GPU, once for all layers of a forward.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk_tokens(
    length, CHUNK: tl.constexpr, FEW: tl.constexpr, LONG: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr
):
    """Tokens of a chunk, a multiple of BLOCK: CHUNK; up to LONG where a row would have more than FEW; more where more than MOST."""
    few = (length + FEW * BLOCK - 1) // (FEW * BLOCK) * BLOCK
    most = (length + MOST * BLOCK - 1) // (MOST * BLOCK) * BLOCK
    return tl.maximum(CHUNK, tl.maximum(tl.minimum(few, LONG), most))


@triton.jit
def _begun(place, ends, blocks, each, chunks):
    """Of each row, which ends at ``ends`` of a line of blocks, the chunks of ``each`` blocks that begin before ``place``."""
    return tl.minimum(tl.maximum((place - ends + blocks + each - 1) // each, 0), chunks)


@triton.jit(do_not_specialize=["rows"])
def plan_kernel(
    indptr,  # int32 [rows + 1]: where each row's slots begin in indices
    shares,  # int32 [groups, 4]: of each group of programs the row and chunk that it begins with, and its chunks
    rows,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    LONG: tl.constexpr,
    MOST: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Give each group its share of all rows' chunks; the programs of a group take a K/V head each, side by side in memory."""
    mine = tl.program_id(0)
    groups = tl.num_programs(0)
    r = tl.arange(0, ROWS)
    live = r < rows
    begins = tl.load(indptr + r, mask=live, other=0)
    lengths = tl.load(indptr + r + 1, mask=live, other=0) - begins
    sizes = _chunk_tokens(lengths, CHUNK, FEW, LONG, MOST, BLOCK)
    # A row without context has one empty chunk, so that its output is written too.
    chunks = tl.where(live, tl.maximum((lengths + sizes - 1) // sizes, 1), 0)
    # What there is to do is counted in blocks of full chunks; but a row of padding has one block, and must not count as much as
    # a chunk of 512 tokens.
    each = tl.minimum(sizes, tl.maximum(lengths, 1) + BLOCK - 1) // BLOCK
    blocks = chunks * each
    total = tl.sum(blocks, 0)
    # Where every row cut at multiples of the largest share leaves no group two pieces, no piece is longer than that, and few
    # rows are cut. Mostly the lengths do not fit so: then all chunks in one line, cut into equal shares wherever a cut falls.
    most = tl.maximum((total + groups - 1) // groups, 1)
    whole = (most + each - 1) // each
    pieces = (chunks + whole - 1) // whole
    apart = tl.sum(pieces, 0) <= groups
    upto = tl.cumsum(blocks, 0)
    begin = (mine.to(tl.int64) * total // groups).to(tl.int32)
    end = ((mine + 1).to(tl.int64) * total // groups).to(tl.int32)
    at = tl.where(apart, mine, tl.sum(_begun(begin, upto, blocks, each, chunks), 0))
    parts = tl.where(apart, pieces, chunks)
    ends = tl.cumsum(parts, 0)
    row = tl.sum(tl.where(live & (ends <= at), 1, 0), 0)
    there = r == row
    piece = tl.sum(tl.where(there, whole, 0), 0)
    first = (at - tl.sum(tl.where(there, ends - parts, 0), 0)) * tl.where(apart, piece, 1)
    left = tl.sum(tl.where(there, chunks, 0), 0) - first
    count = tl.where(apart, tl.minimum(piece, left), tl.sum(_begun(end, upto, blocks, each, chunks), 0) - at)
    tl.store(shares + mine * 4, row)
    tl.store(shares + mine * 4 + 1, first)
    tl.store(shares + mine * 4 + 2, tl.where(row < rows, tl.maximum(count, 0), 0))


@triton.jit
def _join(best, total, acc, best2, total2, acc2):
    """Return the running (maximum, sum of weights, weighted values) of a row's chunks with one more chunk.

    The products and the order of additions are written out, so that both callers get the same instructions.
    """
    above = tl.maximum(best, best2)
    finite = tl.where(above == float("-inf"), 0.0, above)
    x = tl.exp2(best - finite)
    y = tl.exp2(best2 - finite)
    return above, tl.fma(total, x, total2 * y), tl.fma(acc, tl.broadcast_to(x[:, None], acc.shape), acc2 * y[:, None])


@triton.jit
def _join_stored(
    parts, sums, at, n, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Join the ``n`` results that lie in the workspace from ``at`` on, loading ``WIDE`` of them before joining them."""
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    real = g < GROUP
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DIM], tl.float32)
    for first in range(0, n, WIDE):
        for k in tl.static_range(WIDE):
            # One behind the last joins as nothing: its maximum is -inf.
            inside = real & (first + k < n)
            place = (at + (first + k) * KV_HEADS) * GROUP + g
            # .cg reads from L2: this SM's L1 may hold lines from before the other programs wrote.
            best2 = tl.load(sums + 2 * place, mask=inside, other=float("-inf"), cache_modifier=".cg")
            total2 = tl.load(sums + 2 * place + 1, mask=inside, other=0.0, cache_modifier=".cg")
            acc2 = tl.load(
                parts + place[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0, cache_modifier=".cg"
            )
            best, total, acc = _join(best, total, acc, best2, total2, acc2)
    return best, total, acc


@triton.jit
def _keep(parts, sums, at, best, total, acc, kept, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Leave what a chunk or a span gave in the workspace at ``at``, for those heads that are ``kept``."""
    d = tl.arange(0, DIM)
    put = at * GROUP + tl.arange(0, HEADS)
    tl.store(sums + 2 * put, best, mask=kept)
    tl.store(sums + 2 * put + 1, total, mask=kept)
    tl.store(parts + put[:, None] * DIM + d[None, :], acc, mask=kept[:, None])


@triton.jit
def _write(out, groups, total, acc, GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Write one (row, K/V head)."""
    g = tl.arange(0, HEADS)
    d = tl.arange(0, DIM)
    y = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + (groups + g)[:, None] * DIM + d[None, :], y.to(out.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit
def decode_kernel(
    q,  # [rows, KV_HEADS * GROUP, DIM], rows q_stride apart
    k,  # [slots, KV_HEADS, DIM], contiguous
    v,
    indices,  # int32: the slots of each row's context, in order
    indptr,
    shares,  # from plan_kernel
    out,  # [rows, KV_HEADS * GROUP, DIM], contiguous
    parts,  # float32 [max rows, MOST + SPANS, KV_HEADS, GROUP, DIM]: weighted values of a chunk, then those of spans
    sums,  # float32 [max rows, MOST + SPANS, KV_HEADS, GROUP, 2]: its maximum (base 2) and its sum of weights
    counters,  # int32 [max rows, SPANS + 1, KV_HEADS], 0 between launches: spans of the row, or its chunks, then chunks of each span
    scale,  # of the logits, times log2(e)
    q_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
    SPAN: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):
    SPANS: tl.constexpr = MOST // SPAN
    g = tl.arange(0, DOT_ROWS)
    d = tl.arange(0, DIM)
    b = tl.arange(0, BLOCK)
    real = g < GROUP
    head = tl.program_id(0) % KV_HEADS
    share = shares + tl.program_id(0) // KV_HEADS * 4
    row = tl.load(share).to(tl.int64)
    first = tl.load(share + 1)
    left = tl.load(share + 2)
    while left > 0:
        begin = tl.load(indptr + row)
        end = tl.load(indptr + row + 1)
        size = _chunk_tokens(end - begin, CHUNK, FEW, LONG, MOST, BLOCK)
        n = tl.maximum((end - begin + size - 1) // size, 1)
        last = tl.minimum(first + left, n)
        # In registers chunks are joined in one step.
        whole = (last - first == n) & (n <= SPAN)
        groups = row * KV_HEADS * GROUP + head * GROUP
        at = row * (MOST + SPANS) * KV_HEADS + head
        count = counters + row * (SPANS + 1) * KV_HEADS + head

        x = tl.load(q + row * q_stride + (head * GROUP + g)[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
        # Of the chunk at hand, and of all the chunks before it.
        best = tl.full([DOT_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([DOT_ROWS], tl.float32)
        acc = tl.zeros([DOT_ROWS, DIM], tl.float32)
        best0 = tl.full([DOT_ROWS], float("-inf"), tl.float32)
        total0 = tl.zeros([DOT_ROWS], tl.float32)
        acc0 = tl.zeros([DOT_ROWS, DIM], tl.float32)
        start = begin + first * size
        stop = tl.minimum(begin + last * size, end)
        for t in tl.range(start, stop, BLOCK, num_stages=STAGES):
            inside = t + b < stop
            slot = tl.load(indices + t + b, mask=inside, other=0).to(tl.int64)
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
            # One loop over all chunks keeps the loads flowing from one into the next.
            done = t + BLOCK - begin
            ends = (done % size == 0) | (t + BLOCK >= stop)
            chunk = (done + size - 1) // size - 1
            _keep(
                parts, sums, at + chunk * KV_HEADS, best, total, acc, real & ends & (whole == 0), GROUP, DOT_ROWS, DIM
            )
            best1, total1, acc1 = _join(best0, total0, acc0, best, total, acc)
            best0 = tl.where(ends, best1, best0)
            total0 = tl.where(ends, total1, total0)
            acc0 = tl.where(ends, acc1, acc0)
            best = tl.where(ends, float("-inf"), best)
            total = tl.where(ends, 0.0, total)
            acc = tl.where(ends, 0.0, acc)

        if whole:
            _write(out, groups, total0, acc0, GROUP, DOT_ROWS, DIM)
        else:
            tl.debug_barrier()
            joined = 0
            spans = (n + SPAN - 1) // SPAN
            # Release: what this program stored is visible before a count; acquire: the last one sees all of it.
            if SPANS > 1:
                for span in range(first // SPAN, (last + SPAN - 1) // SPAN):
                    begun = span * SPAN
                    chunks = tl.minimum(SPAN, n - begun)
                    have = tl.minimum(last, begun + chunks) - tl.maximum(first, begun)
                    arrived = tl.atomic_add(count + (1 + span) * KV_HEADS, have, sem="acq_rel", scope="gpu")
                    if arrived + have == chunks:
                        best1, total1, acc1 = _join_stored(
                            parts, sums, at + begun * KV_HEADS, chunks, KV_HEADS, GROUP, GROUP_P2, DIM, WIDE
                        )
                        tl.store(count + (1 + span) * KV_HEADS, 0)
                        if spans == 1:
                            _write(out, groups, total1, acc1, GROUP, GROUP_P2, DIM)
                        else:
                            _keep(
                                parts, sums, at + (MOST + span) * KV_HEADS, best1, total1, acc1,
                                tl.arange(0, GROUP_P2) < GROUP, GROUP, GROUP_P2, DIM,
                            )  # fmt: skip
                            joined += 1
                tl.debug_barrier()
            else:
                joined = last - first
                spans = n
            if joined > 0:
                arrived = tl.atomic_add(count, joined, sem="acq_rel", scope="gpu")
                if arrived + joined == spans:
                    stored = at + (MOST if SPANS > 1 else 0) * KV_HEADS
                    best1, total1, acc1 = _join_stored(parts, sums, stored, spans, KV_HEADS, GROUP, GROUP_P2, DIM, WIDE)
                    _write(out, groups, total1, acc1, GROUP, GROUP_P2, DIM)
                    tl.store(count, 0)
        left -= last - first
        first = first * 0
        row += 1
