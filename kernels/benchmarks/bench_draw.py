"""Time the seeded draw against top2_margin, and against what stock SGLang does for a sampled batch.

    python kernels/benchmarks/bench_draw.py [--json FILE] [--tune [--cut BLOCK GROUPS WARPS]]

"stock" is the work of SGLang's sampler: division by the temperatures, softmax, and a draw from the probabilities
(torch.multinomial without filters, FlashInfer's top-k/top-p kernel with them where it is installed).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import common
import torch
from margingate_kernels import Workspace, top2_margin
from margingate_kernels.seeded import Draw, Drawn, draw, draw_reference, pack

VOCAB = 128256
# (block, groups, warps) tried by --tune: as many lanes as threads
CANDIDATES = [
    (64, 1, 2), (128, 1, 4), (128, 2, 4), (256, 1, 8), (256, 2, 8), (256, 4, 8), (512, 1, 16), (512, 4, 16),
]  # fmt: skip
FILTERS = {
    "none": {}, "top-k 50": {"top_k": 50}, "top-p 0.9": {"top_p": 0.9}, "min-p 0.05": {"min_p": 0.05},
    "top-k 50, top-p 0.9, min-p 0.05": {"top_k": 50, "top_p": 0.9, "min_p": 0.05},
}  # fmt: skip


def inputs(rows: int, vocab: int) -> list[torch.Tensor]:
    """Return sets of logits as a bf16 product leaves them."""
    sets = common.input_sets(4 * rows * vocab)
    return [(torch.randn(rows, vocab, device="cuda") * 3).bfloat16().float() for _ in range(sets)]


def right(got: Drawn, logits: torch.Tensor, packed: torch.Tensor) -> bool:
    """Return whether a draw is the reference's: on the GPU, which is quick, and where that differs on the CPU, whose word counts."""
    on_gpu = draw_reference(logits, packed)
    if all(torch.equal(a, b) for a, b in zip(got, on_gpu)):
        return True
    return all(torch.equal(a.cpu(), b) for a, b in zip(got, draw_reference(logits.cpu(), packed.cpu())))


def drawn(rows: int, vocab: int, made: list[torch.Tensor], seeded: bool = True, **filters: Any) -> float:
    """Time the draw of a batch and check its first result."""
    draws = [Draw(i, 0.8, **filters) if seeded else None for i in range(rows)]
    packed = pack(draws, range(rows)).cuda()
    workspace = Workspace(rows, vocab, "cuda")
    assert right(draw(made[0], packed, bool(filters), workspace), made[0], packed), "wrong result"
    return common.time_calls([functools.partial(draw, x, packed, bool(filters), workspace) for x in made]).median


def greedy(rows: int, vocab: int, made: list[torch.Tensor]) -> float:
    """Time top2_margin."""
    workspace, thresholds = Workspace(rows, vocab, "cuda"), torch.zeros(rows, device="cuda")
    return common.time_calls([functools.partial(top2_margin, x, thresholds, workspace=workspace) for x in made]).median


def stock(rows: int, made: list[torch.Tensor], **filters: Any) -> float | str:
    """Time what SGLang does, from Python, as it does it."""
    temperatures = torch.full((rows, 1), 0.8, device="cuda")
    sample: Callable[[torch.Tensor], Any] = functools.partial(torch.multinomial, num_samples=1)
    if filters:
        try:
            from flashinfer.sampling import min_p_sampling_from_probs, top_k_top_p_sampling_from_probs
        except ImportError:
            return "not installed"
        top_k = torch.full((rows,), filters.get("top_k", 1 << 30), dtype=torch.int32, device="cuda")
        top_p = torch.full((rows,), filters.get("top_p", 1.0), device="cuda")
        if "min_p" in filters:
            min_p = torch.full((rows,), filters["min_p"], device="cuda")
            sample = lambda probs: min_p_sampling_from_probs(probs, min_p)  # noqa: E731
        else:
            sample = lambda probs: top_k_top_p_sampling_from_probs(probs, top_k, top_p, filter_apply_order="joint")  # noqa: E731
    at = iter(range(10**9))

    def call() -> None:
        logits = made[next(at) % len(made)]
        sample(torch.softmax(logits / temperatures, dim=-1))

    return common.eager_time(call)


def tune(candidates: list[tuple[int, ...]]) -> list[dict[str, object]]:
    """Time every candidate cut at the sizes that matter."""
    module: Any = importlib.import_module("margingate_kernels.seeded.sample")
    chosen, rows = module._split, []
    sizes = {rows: inputs(rows, VOCAB) for rows in (1, 8, 32, 64)}
    for block, groups, warps in candidates:
        module._split = lambda vocab, _, b=block, g=groups, w=warps: module._Split(b, g, w, -(-vocab // (g * 4096)))
        times: dict[str, object] = {f"B={n} us": drawn(n, VOCAB, made) for n, made in sizes.items()}
        rows.append({"block": block, "groups": groups, "warps": warps, **times})
    module._split = chosen
    return rows


def measure(rows: int, vocab: int) -> dict[str, object]:
    """Time one shape without filters."""
    made = inputs(rows, vocab)
    ours, top2 = drawn(rows, vocab, made), greedy(rows, vocab, made)
    return {
        "B": rows,
        "V": vocab,
        "draw us": ours,
        "top2_margin us": top2,
        "draw / top2_margin": ours / top2,
        "all rows greedy us": drawn(rows, vocab, made, seeded=False),
        "stock us, eager": stock(rows, made),
    }


def main() -> None:
    """Run the benchmark."""
    parser = common.parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="time other cuts of a row instead")
    parser.add_argument(
        "--cut", type=int, nargs=3, action="append", metavar=("BLOCK", "GROUPS", "WARPS"), help="one to time"
    )
    args = parser.parse_args()
    env, copy = common.start()
    torch.manual_seed(0)
    if args.tune:
        common.finish(args.json, env, copy, tune([tuple(cut) for cut in args.cut] if args.cut else CANDIDATES))
        return
    shapes = [(1, VOCAB), (8, VOCAB), (32, VOCAB), (64, VOCAB), (64, 151936), (64, 32000)]
    common.finish(args.json, env, copy, [measure(*shape) for shape in shapes])
    print("\nFilters, 64 rows of 128,256:")
    made = inputs(64, VOCAB)
    print(
        common.table(
            [
                {
                    "filters": name,
                    "draw us": drawn(64, VOCAB, made, **kinds),
                    "stock us, eager": stock(64, made, **kinds),
                }
                for name, kinds in FILTERS.items()
            ]
        )
    )


if __name__ == "__main__":
    main()
