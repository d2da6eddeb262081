"""``margingate tune-experts``: the fastest configurations of a model's fused experts that give a row the same bits."""

from __future__ import annotations

import argparse
import time
from typing import Any

EPILOG = """\
Needs a GPU and no weights: a bank of experts of the model's shape is filled with random numbers. SGLang's own configurations
and a grid around them are compiled (in several processes), tried by the probe that servers use, and timed. The fastest table
whose steps share their bits, one class for decode and one for prefill, is kept beside the maps; servers of this model on this
machine then keep to it. Without one they keep to SGLang's own choice, which falls into more classes or costs more.
"""


class TuneError(RuntimeError):
    """The experts of this model cannot be tuned here; one line that says why."""


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    from sglang_margingate.config import default_map_dir

    p.epilog = EPILOG
    p.add_argument("--model-path", required=True, metavar="MODEL", help="a folder or a name, as SGLang takes it")
    p.add_argument(
        "--margingate-map-dir", default=default_map_dir(), metavar="DIR", help="where the table is kept (%(default)s)"
    )


def run(args: argparse.Namespace, _parser: argparse.ArgumentParser) -> int:
    """Tune and keep a table; the exit status is 0 when one was kept."""
    from sglang_margingate.serving.cpu import install_stand_ins, is_cpu_host

    if is_cpu_host():
        raise TuneError("no GPU is in use here: the experts of a CPU have no configurations to choose from")
    install_stand_ins()
    from sglang_margingate.canonical.experts.choose import Measured, choose, ratios
    from sglang_margingate.canonical.experts.table import save_table, short, table_path
    from sglang_margingate.machine import kernel_environment
    from sglang_margingate.serving.layers import tuning

    began = time.monotonic()
    try:
        shape = tuning.shape_in(args.model_path)
    except (OSError, ValueError) as error:
        raise TuneError(f"--model-path {args.model_path}: {error}") from None
    tuning.publish(args.model_path)
    bank = tuning.Bank(shape)
    tried = tuning.candidates(bank.own_configs())
    print(f"{shape.describe()}: {len(tried)} configurations", flush=True)
    for worker in tuning.compile_all(args.model_path):
        if worker.wait():
            raise TuneError(
                f"a process that compiles ended with exit status {worker.returncode}; what it said stands above"
            )
    times = []
    for number, one in enumerate(tried, 1):
        times.append(bank.measure(one))
        us = " ".join(f"{time:.0f}" for time in times[-1].values()) or "does not fit this GPU"
        print(f"{number}/{len(tried)} {short(one)}: {us}", flush=True)
    fitting = [one for one, us in zip(tried, times) if us]
    print(f"a row among its companions, with {len(fitting)} configurations", flush=True)
    bits = iter(bank.bits(fitting))
    measured = [Measured(one, next(bits) if us else None, us) for one, us in zip(tried, times)]
    for each in measured:
        if each.us and each.bits is None:
            print(f"{short(each.config)}: a row depends on its companions")
    bank.fix(None, kernel_sum=False)
    stock = bank.times(tuning.TIMED)
    table = choose(measured)
    found = ratios(table, measured, stock)
    environment = kernel_environment("cuda")
    path = table_path(args.margingate_map_dir, shape, environment)
    save_table(path, shape, table, environment, of_stock=found, stock_us=stock)
    print(render(measured, found, stock, table.describe()))
    print(f"kept in {path} after {time.monotonic() - began:.0f} s")
    return 0


def render(measured: list[Any], found: dict[int, float], stock: dict[int, float], table: str) -> str:
    """Return what came out in a few lines."""
    holding = [m for m in measured if m.bits is not None]
    lines = [
        f"{len(holding)} of {len(measured)} give a row the same bits among all companions, in {len({m.bits for m in holding})} classes",
        f"table: {table}",
        "rows    " + " ".join(f"{n:>7}" for n in stock),
        "SGLang  " + " ".join(f"{us:>7.1f}" for us in stock.values()) + "  us",
        "of it   " + " ".join(f"{found[n]:>7.2f}" for n in stock),
    ]
    return "\n".join(lines)
