"""Compile every Triton kernel for every architecture that we name, without a GPU, and hold the result under each card's limits.

    python kernels/benchmarks/compile_cards.py [--json FILE] [--only NAME] [--quick]

Needs Triton 3.6 (its wheel brings the assemblers). A kernel is compiled with the arguments that our own launch code gives it:
the launches below run on CPU tensors, and what they would launch is caught instead. A table is printed: bytes of shared memory,
registers a thread, spilled bytes; the exit status is 1 where a kernel does not compile or does not fit a card.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import margingate_kernels as mk
import torch
from margingate_kernels.cards import CARDS, REGISTERS, Card
from margingate_kernels.seeded import Draw, draw, pack

BIN = "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1", torch.uint64: "u64",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What our code launches: a kernel and its arguments."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One kernel on one architecture."""

    case: str
    kernel: str
    card: str
    shared: int
    """Bytes of shared memory of a program."""
    registers: int
    """A thread's."""
    spilled: int
    """Bytes a thread stores to local memory because registers ran out."""
    problem: str = ""


class _Caught:
    """Stands where a kernel stands, and keeps what it is launched with."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, _grid: object) -> Callable[..., None]:
        return lambda *args, **options: self._found.append(Launch(self._kernel, args, options))


@contextlib.contextmanager
def caught() -> Iterator[list[Launch]]:
    """Let launches of every kernel of ``margingate_kernels`` be kept instead of run, also on CPU tensors."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for info in pkgutil.walk_packages(mk.__path__, "margingate_kernels."):
            module = importlib.import_module(info.name)
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Caught(value, found)))
            if "use_triton" in vars(module):
                stack.enter_context(mock.patch.object(module, "use_triton", return_value=True))
        yield found


# ---- what is compiled: the shapes of models that people serve ---------------------------------------------------------


def _top2(rows: int, vocab: int, dtype: torch.dtype) -> None:
    mk.top2_margin(torch.zeros(rows, vocab, dtype=dtype), torch.zeros(rows))


def _kv(dtype: torch.dtype, row: int) -> None:
    pools = [torch.zeros(8, 1, row, dtype=dtype) for _ in range(4)]
    columns = mk.KVColumns(pools[:2], pools[2:])
    slots = torch.zeros(2, dtype=torch.int64)
    staging = columns.staging(2)
    columns.save(slots, staging)
    columns.restore(slots, staging)
    columns.max_abs_change(slots, staging)


def _digest(dtype: torch.dtype) -> None:
    mk.row_digest(torch.zeros(4, 4096, dtype=dtype))


def _sum() -> None:
    mk.rank_sum(torch.zeros(4, 64, 4096, dtype=torch.bfloat16))


def _draw(rows: int, vocab: int, dtype: torch.dtype) -> None:
    how = [Draw(seed=1, temperature=0.7, top_k=50, top_p=0.9, min_p=0.1)] * rows
    draw(torch.zeros(rows, vocab, dtype=dtype), pack(how, range(rows)))


def _decode(heads: tuple[int, int, int], rows: int) -> None:
    attend = mk.DecodeAttention(rows, *heads, "cpu")
    attend.plan(torch.zeros(rows + 1, dtype=torch.int32))
    attend(*_attention(heads, rows), 0.1)


def _prefill(heads: tuple[int, int, int], card: Card) -> None:
    attend = mk.PrefillAttention(*heads, "cpu", shared_sm=card.shared_sm)
    attend.plan(torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), 64)
    attend(*_attention(heads, 64), 0.1)


def _attention(heads: tuple[int, int, int], rows: int) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(rows, heads[0], heads[2], dtype=torch.bfloat16)
    pool = torch.zeros(8, heads[1], heads[2], dtype=torch.bfloat16)
    return q, pool, pool.clone(), torch.zeros(8, dtype=torch.int32)


HEADS = {"Llama-3.1-8B": (32, 8, 128), "Qwen2.5-14B": (40, 8, 128), "Llama-3.2-1B": (32, 8, 64), "Qwen3-30B-A3B": (32, 4, 128), "heads of 256": (16, 8, 256), "64 heads of 128 over 1": (64, 1, 128), "32 heads of 256 over 1": (32, 1, 256)}  # fmt: skip

CASES: dict[str, Callable[[Card], None]] = {
    "top2_margin, 1 row of 128,256": lambda _: _top2(1, 128_256, torch.float32),
    "top2_margin, 64 rows of 151,936": lambda _: _top2(64, 151_936, torch.bfloat16),
    "kv_column, bf16": lambda _: _kv(torch.bfloat16, 1024),
    "kv_column, fp32": lambda _: _kv(torch.float32, 96),
    "seeded draw, 1 row of 128,256": lambda _: _draw(1, 128_256, torch.float32),
    "seeded draw, 64 rows of 151,936": lambda _: _draw(64, 151_936, torch.bfloat16),
    "sum over 4 ranks": lambda _: _sum(),
    "row_digest, bf16": lambda _: _digest(torch.bfloat16),
    "row_digest, fp32": lambda _: _digest(torch.float32),
    **{f"decode attention, {name}": lambda _, h=h: _decode(h, 64) for name, h in HEADS.items()},
    **{f"prefill attention, {name}": lambda card, h=h: _prefill(h, card) for name, h in HEADS.items()},
}

STOOD_FOR = (
    "top2_margin, 1 row of 128,256", "kv_column, fp32", "seeded draw, 64 rows of 151,936", "row_digest, fp32",
    *(f"{kind} attention, {name}" for kind in ("decode", "prefill") for name in ("Qwen2.5-14B", "Llama-3.2-1B", "Qwen3-30B-A3B", "64 heads of 128 over 1")),
)  # fmt: skip
"""Cases whose kernels are compiled for every card in another case: ``--quick`` compiles them for one card.

Tiles of attention are no larger there; the draw of many rows is one of them since six cards would take it half a minute.
"""

QUICK_CARD = "sm_90"
"""That card."""


# ---- compiling --------------------------------------------------------------------------------------------------------


def compile_for(case: str, launch: Launch, card: Card) -> Result:
    """Compile one launch for one card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, names = launch.kernel, [p.name for p in launch.kernel.params]
    values = dict(zip(names, launch.args)) | {n: v for n, v in launch.options.items() if n in names}
    options = {n: v for n, v in launch.options.items() if n not in names}
    warps = options.setdefault("num_warps", 4)
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    signature = {n: "constexpr" if n in fixed or values[n] is None else _type(values[n]) for n in names}
    constants = {(i,): values[n] for i, n in enumerate(names) if signature[n] == "constexpr"}
    # Launches mark what is a multiple of 16, and loads are as wide as that allows.
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if _wide(values[n], signature[n])}
    made = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", card.capability, 32), options=options,
    )  # fmt: skip
    registers, spilled = _resources(made.asm["cubin"])
    problem = ""
    if made.metadata.shared > card.shared_block:
        problem = f"{made.metadata.shared} bytes of shared memory of {card.shared_block}"
    elif registers * 32 * warps > REGISTERS:
        problem = f"{registers} registers of {32 * warps} threads: more than {REGISTERS}"
    return Result(case, kernel.fn.__name__, card.target, made.metadata.shared, registers, spilled, problem)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _wide(value: Any, kind: str) -> bool:
    return kind.startswith("*") or (kind in ("i32", "i64") and value % 16 == 0)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and spilled bytes of a thread, as the assembler left them in the binary."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / BIN / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, local = re.search(r"REG:(\d+)", said), re.search(r"LOCAL:(\d+)", said)
    stack = re.search(r"STACK:(\d+)", said)
    if registers is None or local is None or stack is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {said[:300]}")
    return int(registers[1]), int(local[1]) + int(stack[1])


def compile_all(only: str = "", quick: bool = False) -> list[Result]:
    """Compile every case for every card, or those of :data:`STOOD_FOR` for one; what fails has its error as its problem."""
    results: list[Result] = []
    for case, run in CASES.items():
        if only not in case:
            continue
        for card in CARDS:
            if quick and case in STOOD_FOR and card.target != QUICK_CARD:
                continue
            with caught() as launches:
                run(card)
            if not launches:
                results.append(Result(case, "-", card.target, 0, 0, 0, "launched nothing"))
            for launch in launches:
                try:
                    results.append(compile_for(case, launch, card))
                except Exception as error:  # whatever the compiler raises: it belongs into the table
                    said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                    results.append(Result(case, launch.kernel.fn.__name__, card.target, 0, 0, 0, said))
            print(f"{case}: {card.target}", file=sys.stderr)
    return results


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--quick", action="store_true", help="compile what other cases stand for on one card only")
    args = parser.parse_args()
    results = compile_all(args.only, args.quick)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    for r in results:
        print(
            f"{r.case:42} {r.kernel:16} {r.card:7} {r.shared:7} B {r.registers:4} regs {r.spilled:5} B spilled  {r.problem}"
        )
    return 1 if any(r.problem for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
