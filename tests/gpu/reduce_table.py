"""The sum over ranks at every size: which kernel adds up, in which order, at what cost; with SGLang's settings and with ours.

    python3 tests/gpu/reduce_table.py --out DIR --ranks 4 [--gpus 0,1,2,3] [--hidden 4096] [--device cpu]

Starts SGLang's own groups in processes of their own, three times: as SGLang sets them up, with the variables that our servers
start with, and with sums of up to 512 rows gathered and added up in the order of ranks, which a server of ours does where the
order of a decode step's sums depends on their size. Order 0 is that of the ranks, in fp32 and rounded once; equal numbers are equal bits; `place` means that a row's place
changes its sum. Times are microseconds a sum: in a graph of twenty, and eagerly. DIR gets reduce-R.json; the table comes last.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import socket
import sys
import time
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROWS_CPU = (1, 8, 64, 512)
TIMES = 20
GATHERED = 512


def worker(
    rank: int,
    ranks: int,
    port: int,
    hidden: int,
    rows: tuple[int, ...],
    cpu: bool,
    gathers: bool,
    results: Any,
    go: Any,
    seconds: float,
) -> None:
    """Set up the group, say so, and when it is this one's turn add up at every size; put what was seen.

    A rank whose group does not stand after ``seconds`` prints where it is.
    """
    faulthandler.dump_traceback_later(seconds)
    from sglang_margingate.serving.cpu import install_stand_ins

    install_stand_ins()
    import torch
    from sglang.srt.distributed import parallel_state

    from sglang_margingate.canonical import reduce_probe
    from sglang_margingate.serving.several.group import GroupReduce, gather_sums

    device, method = torch.device("cpu" if cpu else f"cuda:{rank}"), f"tcp://127.0.0.1:{port}"
    if not cpu:
        torch.cuda.set_device(device)
    parallel_state.init_distributed_environment(ranks, rank, method, rank, "gloo" if cpu else "nccl")
    parallel_state.initialize_model_parallel(ranks)
    group = parallel_state.get_tp_group()
    if gathers:
        gather_sums(GATHERED)
        rows = tuple(m for m in rows if m <= GATHERED)
    parts = [reduce_probe._part(r, ranks, hidden).bfloat16() for r in range(ranks)]
    known = {reduce_probe._digests(reduce_probe.in_rank_order(parts)[None].to(device)).tolist()[0]: 0}
    mine = parts[rank].to(device).expand(max(rows), -1).contiguous()
    reduce, out = GroupReduce(), []
    faulthandler.cancel_dump_traceback_later()
    results.put((rank, None))
    go.wait()

    def order(seen: list[int]) -> Any:
        return known.setdefault(seen[0], len(known)) if seen[0] == seen[1] else "place"

    for m in rows:
        line: dict[str, Any] = {
            "rows": m,
            "bytes": m * hidden * 2,
            "eager": order(reduce_probe._tried(reduce, mine, [m])[0].tolist()),
        }
        line["eager kernel"] = "gather" if gathers else kernel(group, m * hidden * 2, False)
        if not cpu:
            into = torch.zeros(1, 2, dtype=torch.int64, device=device)

            def once(into: Any = into, m: int = m) -> None:
                into.copy_(reduce_probe._tried(reduce, mine, [m]))

            reduce.record(once)()
            line["graph"], line["graph kernel"] = (
                order(into[0].tolist()),
                ("gather" if gathers else kernel(group, m * hidden * 2, True)),
            )
            x = mine[:m].clone()

            def many(x: Any = x) -> None:
                for _ in range(TIMES):
                    reduce(x)

            line["graph us"], line["eager us"] = timed(torch, reduce.record(many)), timed(torch, many)
        out.append(line)
    results.put((rank, out))
    results.close()
    results.join_thread()
    torch.distributed.barrier()
    os._exit(0)  # groups of SGLang end with their process


def kernel(group: Any, size: int, graph: bool) -> str:
    """Return what SGLang chooses for a sum of this size."""
    ca = getattr(group, "ca_comm", None)
    if ca is None or getattr(ca, "disabled", True) or not hasattr(ca, "_pick_algo"):
        return "nccl" if ca is None or not hasattr(ca, "should_custom_ar") else "custom v1, or nccl"
    algo, mode = ca._pick_algo(size, can_use_graph=graph)
    name = "nccl" if algo is None else algo.name.lower().replace("_shot", "shot")
    return name + (" multicast" if algo is not None and mode.name == "MULTICAST" else "")


def timed(torch: Any, run: Any) -> float:
    """Return microseconds of one of the sums that ``run`` launches, the best of five."""
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        torch.distributed.barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / TIMES)
    return round(best, 1)


class Workers:
    """The processes of one setting: they set up their group at once, and begin when told.

    Starts take a minute where kernels are compiled, so all settings' groups start together; what is timed runs alone.
    """

    def __init__(
        self, name: str, ranks: int, hidden: int, rows: tuple[int, ...], cpu: bool, gathers: bool, start: float
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.name, self.ranks, self.start, self.began = name, ranks, start, time.monotonic()
        self.results, self._go = context.Queue(), context.Event()
        self.processes = [
            context.Process(
                target=worker,
                args=(r, ranks, port, hidden, rows, cpu, gathers, self.results, self._go, 0.9 * start),
                daemon=True,
            )
            for r in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def _answers(self, what: str, seconds: float) -> list[Any]:
        found: dict[int, Any] = {}
        end = time.monotonic() + seconds
        while len(found) < self.ranks:
            ended = [r for r, process in enumerate(self.processes) if process.exitcode]
            if ended or time.monotonic() > end:
                why = f"rank {ended[0]} ended" if ended else f"{seconds:.0f} s have passed"
                raise RuntimeError(f"only ranks {sorted(found)} of {self.ranks} {what}: {why}")
            if self.results.empty():
                time.sleep(0.05)
            else:
                rank, answer = self.results.get()
                found[rank] = answer
                print(
                    f"{time.monotonic() - self.began:5.0f} s  {self.name}: {len(found)} of {self.ranks} {what}",
                    flush=True,
                )
        return [found[rank] for rank in range(self.ranks)]

    def ready(self) -> None:
        """Wait until every rank's group stands."""
        self._answers("are ready", self.start)

    def measure(self, seconds: float) -> list[list[dict[str, Any]]]:
        """Let them begin; return what each rank saw."""
        self._go.set()
        return self._answers("have added up", seconds)

    def stop(self) -> None:
        """End every process."""
        for process in self.processes:
            process.join(3)
            process.kill()


def main(argv: list[str] | None = None) -> int:
    """Measure with both settings; 1 where ours does not keep one order, or ranks differ."""
    from truth import prepare

    from sglang_margingate.bench import tables
    from sglang_margingate.settings import several

    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpus", default="", help="CUDA_VISIBLE_DEVICES of the workers")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of the largest prefill")
    parser.add_argument("--start", type=float, default=180, help="seconds until all groups stand (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="for each setting, from then on (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(words)
    cpu = args.device == "cpu"
    if not cpu:
        prepare(words, Path(__file__))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus
    settings = SimpleNamespace(
        tp_size=args.ranks, device=args.device, chunked_prefill_size=args.chunk, max_prefill_tokens=args.chunk
    )
    ours = several.environment(settings, args.hidden, {})
    arms: dict[str, dict[str, str]] = {"sglang": {}, "ours": ours, "gathered": ours}
    rows = ROWS_CPU if cpu else ROWS
    found: dict[str, list[dict[str, Any]]] = {}
    problems = []
    workers: dict[str, Workers] = {}
    try:
        for name, env in arms.items():
            os.environ.update(env)
            workers[name] = Workers(name, args.ranks, args.hidden, rows, cpu, name == "gathered", args.start)
        for name, group in workers.items():
            try:
                group.ready()
                ranks = group.measure(args.seconds)
            except RuntimeError as error:
                problems.append(f"{name}: {error}")
                continue
            found[name] = ranks[0]
            orders = [[(line["eager"], line.get("graph")) for line in lines] for lines in ranks]
            if any(other != orders[0] for other in orders):
                problems.append(f"{name}: ranks hold other sums")
            document = {"ranks": args.ranks, "hidden": args.hidden, "set": arms, "found": found, "problems": problems}
            (args.out / f"reduce-{args.ranks}.json").write_text(json.dumps(document, indent=1) + "\n")
    finally:
        for group in workers.values():
            group.stop()
    seen = found.get("ours", [])
    kept = {o for x in seen if x["rows"] <= args.chunk for o in (x["eager"], x.get("graph", x["eager"]))}
    if len(kept) > 1 or "place" in kept:
        problems.append(f"ours: orders {sorted(map(str, kept))} up to {args.chunk} rows")
    body = []
    for a, b, c in zip_longest(*(found.get(name, []) for name in arms), fillvalue={}):
        known = a or b or c
        cells = [str(known["rows"]), f"{known['bytes'] / 1024:.0f}"]
        for line, modes in ((a, ("graph", "eager")), (b, ("graph", "eager")), (c, ("graph",))):
            for mode in modes:
                cells.append(
                    " ".join(str(line.get(key, "")) for key in (mode, f"{mode} kernel", f"{mode} us")).strip() or "-"
                )
        body.append(cells)
    head = ["rows", "KiB", "sglang: graph", "sglang: eager", "ours: graph", "ours: eager", "gathered: graph"]
    print(tables.text(head, body, (2, 3, 4, 5, 6)))
    print("; ".join(problems) or f"one order at every size with our settings, {args.ranks} ranks")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
