"""What do our hooks cost the scheduler's thread? Python time of a decode step and of a prefill, without server or GPU.

``margingate evidence host-time --rows 48``

Runs what the hooks run, on requests and batches of the shape that SGLang hands them, with a clock that passes late as a
GPU's does and the trace's writer beside it. The forward itself, and the kernel that reads the logits, are left out: on a GPU
those are launches. What is left is the host's share of a step. Times are this thread's CPU time, medians of rounds, in
microseconds; between two forwards of a server the caches are cold, so its own (``host`` of ``GET /margingate/status``) are longer.
The last line is the trace's: its thread turns rows into columns, which holds the interpreter that the scheduler needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from sglang_margingate.bench import tables
from sglang_margingate.config import Policy, Repair
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.gate.ledger import RequestLedger
from sglang_margingate.gate.request import RequestParams
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.prefill import PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.state import ATTRIBUTE, RequestState
from sglang_margingate.runtime.step import Step
from sglang_margingate.runtime.view import ForwardShape
from sglang_margingate.serving import batches
from sglang_margingate.trace import TraceWriter
from sglang_margingate.trace.ring import StepRing
from sglang_margingate.trace.tables import steps_batch
from sglang_margingate.trace.writer import PIECE_ROWS

PROMPT, VOCAB = 512, 32
Times = dict[str, list[float]]


class LateClock(HostClock):
    """Marks pass later than they are made, so that nothing is waited for."""

    late = True


Sampler = type("Sampler", (), {"__module__": "sglang.srt.layers.sampler"})
"""Stands for SGLang's own."""


def logits_read(_logits: torch.Tensor, _thresholds: torch.Tensor, *, workspace: Any = None, out: Any = None) -> Any:
    """Fill what the kernel fills, in three small writes."""
    out.token.fill_(5)
    out.second.fill_(6)
    out.margin.fill_(1.0)
    return out


class Host:
    """A scheduler's side of one server: requests, batches, and our hooks between them.

    Parameters
    ----------
    rows
        Requests of a decode batch.
    folder
        Where the trace is written.
    audit
        Share of steps that the audit draws.
    """

    def __init__(self, rows: int, folder: Path, audit: float = 0.0) -> None:
        self.rows = rows
        self.writer = TraceWriter(folder, {"model": "host-time", "policy": "gate"})
        self.recorder = Recorder(LateClock(), self.writer, Metrics(False, "m"))
        self.step = Step(
            self.recorder, PrefillRules(64, False), None, AuditSampler(audit), 256, TestKnobs(), Metrics(False, "m")
        )
        self.runner = SimpleNamespace(sampler=Sampler(), is_draft_worker=False)
        self.info = SimpleNamespace(
            is_all_greedy=True, grammars=None, logit_bias=None, acc_additive_penalties=None, acc_scaling_penalties=None,
            penalizer_orchestrator=None, has_custom_logit_processor=False, return_sampling_masks=None,
        )  # fmt: skip
        self.logits = torch.zeros(rows, VOCAB)
        self.reqs: list[Any] = []
        self.opened = 0

    def open(self) -> None:
        """Let a batch of new requests arrive."""
        params = RequestParams(Policy.GATE, 0.5, "arith", False)
        self.reqs = []
        for _ in range(self.rows):
            self.opened += 1
            ledger = RequestLedger(f"request-{self.opened}", params, Repair.WINDOW, number=self.opened)
            req = SimpleNamespace(
                kv=SimpleNamespace(req_pool_idx=len(self.reqs)),
                origin_input_ids=range(PROMPT),
                output_ids=[],
                cached_tokens=0,
            )
            setattr(req, ATTRIBUTE, RequestState(ledger))
            self.reqs.append(req)

    def forward(self, reqs: Sequence[Any], step: int, times: Times) -> None:
        """Run the hooks of one forward: a prefill at step 0, a decode after it."""
        decode, n = step > 0, len(reqs)
        mode = SimpleNamespace(is_decode=lambda: decode, is_extend=lambda: not decode)
        batch = SimpleNamespace(
            forward_mode=mode, is_prefill_only=False, sampling_info=self.info, out_cache_loc=None, return_logprob=False,
            ngram_embedding_info=None, seq_lens_cpu=torch.full((n,), PROMPT + step), extend_prefix_lens_cpu=[0] * n,
            extend_seq_lens_cpu=[PROMPT] * n,
        )  # fmt: skip
        output = SimpleNamespace(next_token_logits=self.logits[:n])
        marks = [time.thread_time()]
        batches.begin(batch, reqs, self.recorder.clock)
        marks.append(time.thread_time())
        view, seen = getattr(batch, batches.VIEW)
        view.shape = ForwardShape(n, 64, True) if decode else ForwardShape(PROMPT, PROMPT, True)
        self.step.ended(view)
        marks.append(time.thread_time())
        self.step.sample(view, batches.BatchSampling(None, self.runner, output, batch, seen))
        marks.append(time.thread_time())
        for name, begin, end in zip(("begin", "ended", "sample"), marks, marks[1:]):
            times.setdefault(name, []).append((end - begin) * 1e6)

    def run(self, steps: int) -> tuple[Times, Times]:
        """Let a batch arrive, be prefilled one by one, decode and end; return the times of decodes and of prefills."""
        decodes: Times = {}
        prefills: Times = {}
        self.open()
        for req in self.reqs:
            self.forward([req], 0, prefills)
        for step in range(1, steps + 1):
            self.forward(self.reqs, step, decodes)
        self.close(steps + 1, prefills)
        return decodes, prefills

    def close(self, shown: int, times: Times) -> None:
        """End the batch's requests."""
        begin = time.thread_time()
        for req in self.reqs:
            self.recorder.finish(getattr(req, ATTRIBUTE), shown)
        times.setdefault("finish", []).append((time.thread_time() - begin) * 1e6 / len(self.reqs))


def measure(rows: int, steps: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Return the median over rounds of each part's mean time, in microseconds, of decodes and of prefills of one request."""
    host = Host(rows, folder)
    found: dict[str, dict[str, list[float]]] = {"decode": {}, "prefill": {}}
    for number in range(rounds + 1):
        decodes, prefills = host.run(steps)
        if number:  # the first warms up
            for kind, times in (("decode", decodes), ("prefill", prefills)):
                for name, values in times.items():
                    found[kind].setdefault(name, []).append(statistics.mean(values))
    host.writer.close()
    return {kind: {name: statistics.median(values) for name, values in parts.items()} for kind, parts in found.items()}


def measure_trace(rows: int, steps: int, rounds: int, folder: Path) -> float:
    """Return the microseconds that a row takes of the trace's thread until it is a column: the median of its pieces."""
    host, ring = Host(rows, folder), StepRing(rows * (steps + 1))
    with mock.patch.object(host.writer, "add_steps", ring.append):
        host.run(steps)
    host.writer.close()
    pieces = []
    while len(ring):
        pieces.append(ring.take(PIECE_ROWS))
    times = []
    for chunks, taken in pieces * rounds:
        begin = time.thread_time()
        steps_batch(chunks)
        times.append((time.thread_time() - begin) * 1e6 / taken)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="margingate evidence host-time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=48, help="requests of a decode batch (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="decode steps of a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder, mock.patch("sglang_margingate.runtime.step.top2_margin", logits_read):
        found = measure(args.rows, args.steps, args.rounds, Path(folder))
        trace = measure_trace(args.rows, args.steps, args.rounds, Path(folder))
    cells: list[list[str]] = []
    for kind, parts in found.items():
        of = f"a decode of {args.rows}" if kind == "decode" else "a prefill of 1"
        cells += [[of, name, f"{value:.0f}"] for name, value in parts.items() if name != "finish"]
        cells.append([of, "all", f"{sum(value for name, value in parts.items() if name != 'finish'):.0f}"])
        cells += [["a request", "its end", f"{parts['finish']:.0f}"]] if "finish" in parts else []
    cells.append(["the trace's thread", "a row", f"{trace:.2f}"])
    print(tables.text(["forward", "part", "us"], cells, (0, 1)))
    return 0
