"""Start-up self-test: at the verify shape, a row's bits must not depend on the other rows or on its place.

Runs once before the server takes requests, while the whole K/V pool is free. It writes random columns into a few
slots, computes one row among different companions at different places, and compares logits and written K/V bit by
bit. Where they differ, a second run with forward hooks names the first layer whose output row changed.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sglang_margingate.canonical.engine import Bits, Engine, lent_table, same_bits, slots

PREFIX_TOKENS = 24
TRIALS = 6


@dataclass
class SelfTestResult:
    """What the self-test found; goes into the manifest and the status page."""

    passed: bool
    rows: int
    trials: int
    seconds: float
    broken_layer: str | None = None
    detail: str = ""
    device: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types."""
        return asdict(self)


@dataclass
class _Bench:
    """A handful of fake requests in the free pool: row r of the table owns slots of its own."""

    engine: Engine
    rows: int

    def run(self, tokens: list[int], lengths: list[int], place: int) -> Bits:
        """Run one pass with the probed row (table row 0) at ``place``; return its logits and K/V column."""
        order = list(range(1, self.rows))
        order.insert(place, 0)
        logits = self.engine.verify(order, [lengths[r] - 1 for r in order], [tokens[r] for r in order])
        return logits[place].clone(), self.engine.read(slots(self.engine, 0, [lengths[0] - 1]))


@contextmanager
def _fake_requests(engine: Engine, requests: int, tokens: int) -> Any:
    """Fill table rows 0..requests-1 with private slots of random K/V; restore table and pool afterwards."""
    lent = torch.arange(1, requests * tokens + 1, device=engine.table.device)
    saved_columns = engine.read(lent)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(c.shape, generator=generator).to(c.dtype).to(c.device) for c in saved_columns]
    with lent_table(engine.table, lent.view(requests, tokens)):
        try:
            engine.write(lent, noise)
            yield
        finally:
            engine.write(lent, saved_columns)


def _draw(count: int, high: int, low: int, generator: torch.Generator) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


def run_self_test(engine: Engine) -> SelfTestResult:
    """Probe row-invariance of the verify at its canonical M.

    Parameters
    ----------
    engine
        The server's runners.
    """
    start = time.perf_counter()
    rows = engine.rows
    # Small pools and tables bound the number of fake requests; the rest of the pass is the usual padding.
    requests = min(rows, engine.table.shape[0], max(1, engine.capacity // PREFIX_TOKENS))
    generator = torch.Generator().manual_seed(2)
    with _fake_requests(engine, requests, PREFIX_TOKENS):
        bench = _Bench(engine, requests)
        probed_token = _draw(1, engine.vocab_size, 0, generator)[0]
        reference: Bits | None = None
        trials = []
        for trial in range(TRIALS if requests > 1 else 1):
            tokens = [probed_token, *_draw(requests - 1, engine.vocab_size, 0, generator)]
            lengths = [PREFIX_TOKENS, *_draw(requests - 1, PREFIX_TOKENS + 1, 1, generator)]
            place = (trial * max(1, requests // 3)) % requests
            trials.append((tokens, lengths, place))
            got = bench.run(tokens, lengths, place)
            if reference is None:
                reference = got
                continue
            if not engine.agree("the verify's self-test", same_bits(reference, got)):
                layer = _first_broken_layer(bench, trials[0], trials[-1])
                return SelfTestResult(
                    False,
                    rows,
                    trial + 1,
                    time.perf_counter() - start,
                    layer,
                    f"row 0 changed when its {rows - 1} companions and its place did",
                    str(engine.device),
                )
    return SelfTestResult(True, rows, len(trials), time.perf_counter() - start, device=str(engine.device))


def _first_broken_linear(engine: Engine, rows: int) -> str | None:
    """Return the first linear layer whose first row changes with the others at ``rows`` rows, or None.

    Its input is this rank's part of it: a layer that adds up over ranks does so here, too.
    """
    for name, module in engine.model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not hasattr(module, "input_size"):
            continue
        outputs = []
        first = torch.randn(1, weight.shape[1], device=weight.device).to(weight.dtype)
        for _ in range(3):
            others = torch.randn(rows - 1, weight.shape[1], device=weight.device).to(weight.dtype)
            with torch.no_grad():
                result = module(torch.cat([first, others]))
            outputs.append((result[0] if isinstance(result, tuple) else result)[0].clone())
        if not engine.agree(name, all(torch.equal(outputs[0], other) for other in outputs[1:])):
            return name
    return None


def _first_broken_layer(bench: _Bench, one: Any, other: Any) -> str:
    """Run two trials with hooks on every leaf layer; return the first whose output row differs."""
    model = bench.engine.model
    records: list[list[tuple[str, torch.Tensor]]] = []

    def record(name: str, place: int, into: list[tuple[str, torch.Tensor]]) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, torch.Tensor) and first.dim() >= 2 and first.shape[0] == bench.engine.rows:
                into.append((name, first[place].clone()))

        return hook

    for tokens, lengths, place in (one, other):
        into: list[tuple[str, torch.Tensor]] = []
        handles = [
            module.register_forward_hook(record(name, place, into))
            for name, module in model.named_modules()
            if name and not any(True for _ in module.children())
        ]
        try:
            bench.run(tokens, lengths, place)
        finally:
            for handle in handles:
                handle.remove()
        records.append(into)
    for (name, a), (_, b) in zip(*records):
        if not bench.engine.agree(name, torch.equal(a, b)):
            return name
    if not records[0]:  # a CUDA graph replays without calling modules: probe the linear layers one by one
        name = _first_broken_linear(bench.engine, bench.engine.rows)
        if name is not None:
            return name
    return "a part of the model without layers of its own (attention kernel or logits)"
