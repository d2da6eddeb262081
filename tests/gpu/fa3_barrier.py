"""Show that FlashInfer's Hopper prefill needs its warps to arrive in time: hold one warp up, as shipped and repaired.

    PYTHONPATH=.:kernels:SITE python3 tests/gpu/fa3_barrier.py --folder FOLDER [--calls 2000] [--json FILE]

The fault (docs/fast-path.md) is rare, since all warps of a tile usually arrive together. Here one of them waits for 20 us
before it writes its rows to shared memory, which no correct kernel minds. Four variants are compiled, of copies of
FlashInfer: as shipped and with the surplus arrival taken out, each with and without that wait. Every call's output is
compared with our own kernel's; what is far from it was read before it was written. Compiling takes minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HEADER = "data/include/flashinfer/attention/hopper/epilogue.cuh"
ARRIVE = r" *cutlass::arch::NamedBarrier::arrive\(NUM_MMA_THREADS,\s*cutlass::arch::ReservedNamedBarriers::EpilogueBarrier\);\n"
WRITE = r"( *)(cute::copy\(smem_tiled_copy_O, tOrO_retile, tOsO\);\n)"
WAIT = r"\1if (thread_idx / 32 == 1) __nanosleep(20000);\n\1\2"
FAR = 0.1
"""Outputs are means of normal values, so one that was not written is off by about 1; rounding by 0.03 at most."""
VARIANTS = {  # replacements in the header, each of which must be found once
    "as shipped": (),
    "as shipped, one warp late": ((WRITE, WAIT),),
    "repaired": ((ARRIVE, ""),),
    "repaired, one warp late": ((ARRIVE, ""), (WRITE, WAIT)),
}


def change_flashinfer(folder: Path, changes: tuple[tuple[str, str], ...]) -> None:
    """Import FlashInfer from a changed copy in ``folder``, with compiled kernels of its own."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        raise ImportError("flashinfer is not installed")
    shutil.copytree(Path(spec.origin).parent, folder / "flashinfer", dirs_exist_ok=True)
    header = folder / "flashinfer" / HEADER
    text = header.read_text()
    for pattern, replacement in changes:
        text, found = re.subn(pattern, replacement, text)
        if found != 1:
            raise ValueError(f"{header}: {pattern!r} was found {found} times, not once: another version of FlashInfer?")
    header.write_text(text)
    sys.path.insert(0, str(folder))
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(folder)


def count(calls: int) -> list[dict[str, Any]]:
    """Return, per fa3 kernel and batch, how many calls had elements far from ours, and how many elements."""
    import torch
    from repeat_kernels import DIM, KV_HEADS, SLOTS, draw, prefill_kernels

    torch.manual_seed(0)
    k, v = draw(SLOTS, KV_HEADS, DIM), draw(SLOTS, KV_HEADS, DIM)
    rows = []
    for name, call in prefill_kernels(k, v):
        if "ours" in name:
            expected = call().float()
            continue
        wrong, elements = torch.zeros(2, dtype=torch.int64, device="cuda").unbind()
        for _ in range(calls):
            far = ((call().float() - expected).abs() > FAR).sum()
            wrong += far > 0
            elements += far
        rows.append(
            {
                "kernel": name,
                "calls": calls,
                "wrong": int(wrong),
                "elements": int(elements) / max(1, int(wrong)),
                "of": expected.numel(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the copies and their compiled kernels")
    parser.add_argument("--calls", type=int, default=2000, help="of each kernel and batch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        change_flashinfer(args.folder, VARIANTS[args.variant])
        print(json.dumps(count(args.calls)))
        return
    here = [sys.executable, __file__, "--calls", str(args.calls)]
    running = {  # all at once: they compile
        variant: subprocess.Popen(
            [*here, "--variant", variant, "--folder", str(args.folder / str(number))], stdout=subprocess.PIPE, text=True
        )
        for number, variant in enumerate(VARIANTS)
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for variant, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            print(f"{variant}: failed", flush=True)
            continue
        found[variant] = json.loads(said.splitlines()[-1])
        for row in found[variant]:
            share = f", {row['elements']:,.0f} of {row['of']:,} elements each" if row["wrong"] else ""
            print(
                f"{variant:27} {row['kernel']:34} {row['wrong']:6,} of {row['calls']:,} calls wrong{share}", flush=True
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    if len(found) < len(VARIANTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
