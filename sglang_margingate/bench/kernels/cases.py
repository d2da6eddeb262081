"""The kernels that a forward runs, on inputs of a model's shape, each with what it should give where that can be told.

:mod:`.run` compares and repeats them; `tests/gpu/repeat_kernels.py` repeats them beside FlashInfer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from margingate_kernels import (
    DecodeAttention,
    Fa3PrefillAttention,
    HostAttention,
    KVColumns,
    Part,
    PrefillAttention,
    decode_attention_reference,
    fa3_available,
    prefill_attention_reference,
    row_digest,
    row_digest_reference,
    save_reference,
    top2_margin,
    top2_margin_reference,
)
from margingate_kernels.seeded import Draw, draw, draw_reference, pack

Call = Callable[[], torch.Tensor]

PREFILLS: Mapping[str, Sequence[tuple[int, int]]] = {  # of each request: cached tokens, new ones
    "half warm pair": ((210, 215), (64, 130)),
    "cold pair": ((0, 425), (0, 194)),
    "eight, mixed": ((0, 100), (450, 1), (300, 500), (0, 900), (96, 97), (700, 3), (128, 128), (5, 620)),
}
DECODES: Sequence[Sequence[int]] = ([431, 207] + [1] * 15, list(range(60, 1050, 30)), [9000] + [1] * 16)
"""Contexts of the rows of a decode."""
MANY_ROWS = (17, 64, 352, 648)
DTYPE = torch.bfloat16
FEW_ROWS = (1, 8, 33)
"""Rows of a product; few of them on a CPU."""
DRAWS = (None, Draw(7, 0.8), Draw(2**40 + 3, 1.3, 50), Draw(-9, 0.7, 0, 0.9), Draw(3, 0.9, 0, 1.0, 0.05))


class Shape(NamedTuple):
    """What of a model decides its kernels' shapes; Llama-3.1-8B's by default."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128_256

    @property
    def heads(self) -> tuple[int, int, int]:
        """What attention is built for."""
        return self.q_heads, self.kv_heads, self.head_dim


class Case(NamedTuple):
    """A kernel with its inputs.

    Parameters
    ----------
    reference
        What it should give, in plain PyTorch; None: nothing says.
    rtol, atol
        How far it may be from that; both 0: not by a bit.
    """

    name: str
    call: Call
    reference: Call | None = None
    rtol: float = 0.0
    atol: float = 0.0


class LeftOut(NamedTuple):
    """A kernel that cannot be run here, and why."""

    name: str
    why: str


def normal(device: str, *shape: int) -> torch.Tensor:
    """Return normal numbers in :data:`DTYPE`."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(DTYPE)


def starts(lengths: Sequence[int], device: str) -> torch.Tensor:
    """Return int32 [n + 1]: where each of n pieces begins, and the end."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def of_a_gpu(shape: Shape, device: str = "cuda") -> Iterator[Case | LeftOut]:
    """Give the cases of a GPU; ``device`` is "cpu" in Triton's interpreter."""
    slots = max(sum(p + n for p, n in requests) for requests in PREFILLS.values())
    k, v = (normal(device, max(slots, 4000), shape.kv_heads, shape.head_dim) for _ in range(2))
    if PrefillAttention.supports(*shape.heads):
        for name, requests in PREFILLS.items():
            yield from prefills(shape, name, prefill_inputs(shape, requests, k, v))
        yield from decodes(shape, k, v)
    else:
        why = f"the kernel does not exist for {shape.q_heads} / {shape.kv_heads} heads of {shape.head_dim}"
        yield LeftOut("attention ours", why)
    yield from choices(shape, device)
    yield from columns(shape, device)
    yield from products(shape, device, MANY_ROWS)
    yield LeftOut("rank_sum", "it adds over several GPUs; a server with --tp-size tries it at every start")
    try:
        yield from list(norms(shape, device))
    except ImportError as error:
        yield LeftOut("norms and activation of sgl_kernel", str(error))


def of_a_cpu(shape: Shape) -> Iterator[Case | LeftOut]:
    """Give the cases of a CPU: attention of PyTorch's own parts, and products."""
    yield from host_attention(shape)
    yield from products(shape, "cpu", FEW_ROWS)
    yield LeftOut("the Triton kernels", "they need a GPU; `make test` compiles them for six cards and interprets them")


class Prefill(NamedTuple):
    """What a prefill of several requests reads."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    queries: torch.Tensor
    """int32 [requests + 1]: where each one's new tokens begin."""
    columns: torch.Tensor
    """int32 [requests + 1]: where its slots begin."""
    slots: torch.Tensor


def prefill_inputs(shape: Shape, requests: Sequence[tuple[int, int]], k: torch.Tensor, v: torch.Tensor) -> Prefill:
    """Return the inputs of these requests, at random slots of the pool."""
    new, all_of = [n for _, n in requests], [p + n for p, n in requests]
    device = k.device.type
    slots = torch.randperm(len(k), device=device)[: sum(all_of)].int()
    q = normal(device, sum(new), shape.q_heads, shape.head_dim)
    return Prefill(q, k, v, starts(new, device), starts(all_of, device), slots)


def prefills(shape: Shape, name: str, to: Prefill) -> Iterator[Case]:
    """Give our prefill of these requests, and FlashAttention-3's where it is here."""
    scale = shape.head_dim**-0.5

    def reference() -> torch.Tensor:
        return prefill_attention_reference(*to, scale)

    kernels: dict[str, PrefillAttention | Fa3PrefillAttention] = {"ours": PrefillAttention(*shape.heads, to.q.device)}
    if fa3_available(*shape.heads):
        kernels["sgl fa3"] = Fa3PrefillAttention(*shape.heads, str(to.q.device))
    for whose, attend in kernels.items():
        attend.plan(to.queries, to.columns, len(to.slots))
        # Weights are rounded to the values' dtype before the product, as in any flash attention.
        call = partial(attend, to.q, to.k, to.v, to.slots, scale)
        yield Case(f"prefill {whose}, {name}", call, reference, 2e-2, 6e-3)


def decodes(shape: Shape, k: torch.Tensor, v: torch.Tensor) -> Iterator[Case]:
    """Give decode attention of few and many rows, short and long."""
    for contexts in DECODES:
        device = k.device.type
        rows, pieces, scale = len(contexts), starts(contexts, device), shape.head_dim**-0.5
        attend = DecodeAttention(64, *shape.heads, device)
        attend.plan(pieces)
        q = normal(device, rows, shape.q_heads, shape.head_dim)
        slots = torch.randint(0, len(k), (sum(contexts),), device=device).int()
        call = partial(attend, q, k, v, slots, scale)
        reference = partial(decode_attention_reference, q, k, v, pieces, slots, scale)
        yield Case(f"decode, {rows} rows, longest {max(contexts)}", call, reference, 2e-2, 2e-3)


def choices(shape: Shape, device: str) -> Iterator[Case]:
    """Give the margin, the seeded draw and the digest of rows; their references run on the CPU."""
    logits, zeros = torch.randn(17, shape.vocab, device=device), torch.zeros(17, device=device)
    yield Case(
        "top2_margin, 17 rows",
        lambda: torch.stack([t.float() for t in top2_margin(logits, zeros)[:3]]),
        lambda: torch.stack([t.float() for t in top2_margin_reference(logits.cpu(), zeros.cpu())[:3]]),
    )
    few = logits[: len(DRAWS)]
    packed = pack(DRAWS, range(30, 30 + len(DRAWS)))
    there = packed.to(device)
    yield Case(
        f"seeded draw, {len(DRAWS)} rows",
        lambda: torch.stack([t.float() for t in draw(few, there)]),
        lambda: torch.stack([t.float() for t in draw_reference(few.cpu(), packed)]),
    )
    yield Case("row_digest, 17 rows", lambda: row_digest(logits), lambda: row_digest_reference(logits.cpu()))


def columns(shape: Shape, device: str) -> Iterator[Case]:
    """Give what a repair keeps of K/V columns."""
    planes = [normal(device, 64, shape.kv_heads, shape.head_dim) for _ in range(8)]
    pool, slots = KVColumns(planes[:4], planes[4:]), torch.tensor([7, 39, 0, 20], device=device)

    def saved(save: Callable[[torch.Tensor], object]) -> torch.Tensor:
        staging = pool.staging(len(slots))
        save(staging)
        return staging

    yield Case(
        "kv_column, 4 columns",
        lambda: saved(lambda to: pool.save(slots, to)),
        lambda: saved(lambda to: save_reference(pool, slots, to)),
    )


def products(shape: Shape, device: str, many: Sequence[int]) -> Iterator[Case]:
    """Give the linear layers as the BLAS library runs them, without tensor parallelism; double precision says what is right."""
    wide = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
    sizes = {
        "qkv": (shape.hidden, wide),
        "o": (shape.q_heads * shape.head_dim, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.inner),
        "down": (shape.inner, shape.hidden),
    }
    for name, (inner, outer) in sizes.items():
        weight = normal(device, outer, inner) * 0.02
        for rows in many:
            x = normal(device, rows, inner)
            call, reference = partial(torch.nn.functional.linear, x, weight), partial(exact_product, x, weight)
            yield Case(f"linear {name}, {rows} rows", call, reference, 2e-2, 1e-2)


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the product rounded once."""
    return (x.double() @ weight.double().T).to(DTYPE)


def norms(shape: Shape, device: str) -> Iterator[Case]:
    """Give what stands between the products, as sgl_kernel has it.

    Raises
    ------
    ImportError
        There is no sgl_kernel for this machine.
    """
    from sgl_kernel import fused_add_rmsnorm, rmsnorm, silu_and_mul

    x, weight = normal(device, 352, shape.hidden), normal(device, shape.hidden)
    wide = normal(device, 352, 2 * shape.inner)
    functional = torch.nn.functional

    def fused() -> torch.Tensor:
        out, residual = x.clone(), x.clone()
        fused_add_rmsnorm(out, residual, weight)
        return out

    def normed(y: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(y.float(), (shape.hidden,), weight.float(), 1e-6).bfloat16()

    yield Case("rmsnorm", lambda: rmsnorm(x, weight), lambda: normed(x), 2e-2, 2e-2)
    halves = wide.float().chunk(2, dim=-1)
    activated = (functional.silu(halves[0]) * halves[1]).bfloat16()
    yield Case("silu_and_mul", lambda: silu_and_mul(wide), lambda: activated, 2e-2, 2e-2)
    yield Case("fused_add_rmsnorm", fused, lambda: normed(x.float() * 2), 2e-2, 2e-2)


def host_attention(shape: Shape) -> Iterator[Case]:
    """Give the CPU's attention: a prefill of three requests, and a decode of six."""
    length, scale = 300, shape.head_dim**-0.5
    table = (torch.randperm(6 * length) + 1).view(6, length).int()
    keys, values = (normal("cpu", 6 * length + 1, shape.kv_heads, shape.head_dim) for _ in range(2))
    made = {
        "prefill on the CPU, three requests": ([Part(0, 0, 100), Part(1, 7, 150), Part(2, 64, 65)], False),
        "decode on the CPU, six rows": (
            [Part(n, end - 1, end) for n, end in enumerate((1, 63, 64, 65, 200, 300))],
            True,
        ),
    }
    for name, (parts, decode) in made.items():
        attend = HostAttention(parts, table, decode)
        q = normal("cpu", attend.rows, shape.q_heads, shape.head_dim)
        pieces = starts([p.end - p.first for p in parts], "cpu")
        slots = torch.cat([table[p.pool, : p.end] for p in parts])
        contexts = starts([p.end for p in parts], "cpu")
        call = partial(run_on_host, attend, q, keys, values, scale)
        reference = partial(prefill_attention_reference, q, keys, values, pieces, contexts, slots, scale)
        yield Case(name, call, reference, 3e-2, 3e-2)


def run_on_host(
    attend: HostAttention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return the CPU's attention."""
    return attend(q, keys, values, scale, torch.empty_like(q))
