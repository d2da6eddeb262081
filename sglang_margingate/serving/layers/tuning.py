"""Measures the configurations of a bank of fused experts on this GPU: bits by the probe, times from CUDA graphs. No server.

Compiling is what takes long, so it is shared by processes (:func:`compile_all`); kernels on disk are then read by the one that
measures.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from sglang_margingate.canonical.experts.probe import ExpertKind
from sglang_margingate.canonical.experts.table import FIELDS, BankShape, Config, short

ROWS = (1, 2, 3, 8, 16, 17, 32, 33, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Numbers of rows whose bits are compared."""

COMPILED = (1, 2, 3, 17, 64, 1024)
"""Those at which Triton specialises in another way."""

TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Those whose times are measured."""

WORKERS = 10
CALLS = 5
"""Calls in one CUDA graph."""

LONG_US = 5_000
"""A call that takes longer is timed three times, not ten."""


def publish(model: str) -> None:
    """Make SGLang's process-wide settings, as a server of this model would."""
    from sglang.srt.runtime_context import publish as put
    from sglang.srt.server_args import prepare_server_args

    put(
        prepare_server_args(["--model-path", model, "--skip-tokenizer-init", "--load-format", "dummy"]),
        role="scheduler",
    )


class Bank:
    """A bank of experts of one shape with random weights, run by SGLang's fused kernels.

    Parameters
    ----------
    shape
        Its shape; weights are bfloat16.
    """

    def __init__(self, shape: BankShape) -> None:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        self.module, self.shape = fused_moe, shape
        sizes = (shape.experts, 2 * shape.inner, shape.hidden), (shape.experts, shape.hidden, shape.inner)
        self.up, self.down = (
            torch.nn.Parameter(torch.empty(s, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02), False)
            for s in sizes
        )
        self._choose, self._compiled_sum = (
            fused_moe.try_get_optimal_moe_config,
            fused_moe._use_moe_sum_reduce_torch_compile,
        )

    def fix(self, config: Config | None, kernel_sum: bool = True) -> None:
        """Use one configuration at any number of rows; None: SGLang's choice. And add up by the kernel, or as SGLang does."""
        self.module._use_moe_sum_reduce_torch_compile = (lambda _: False) if kernel_sum else self._compiled_sum
        self.module.try_get_optimal_moe_config = (
            self._choose if config is None else lambda *_, **__: (dict(config), (None, None))
        )

    def run(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Run the bank, in place."""
        out: torch.Tensor = self.module.fused_experts_impl(
            x, self.up, self.down, weights, chosen, inplace=True, filter_expert=False
        )
        return out

    def kind(self) -> ExpertKind:
        """Return the bank as the probe runs it."""
        return ExpertKind("experts", self.up, self.down, self.shape.top_k, self.run, "triton")

    def own_configs(self) -> list[Config]:
        """Return the configurations that SGLang chooses from for this shape."""
        up, down, top_k = self.up.shape, self.down.shape, self.shape.top_k
        found = [self._choose(up, down, top_k, None, rows) for rows in (*range(1, 513), *range(576, 8193, 64))]
        return list({short(c): {k: v for k, v in c.items() if k in FIELDS} for c in found}.values())

    def times(self, rows: Sequence[int]) -> dict[int, float]:
        """Return microseconds of the bank by number of rows, routed at random, replayed from a CUDA graph."""
        return {m: graphed(partial(self.run, *self._inputs(m))) for m in rows}

    def measure(self, config: Config, rows: Sequence[int] = TIMED) -> dict[int, float]:
        """Return the times of one configuration, as :meth:`times` does; none where it does not fit this GPU."""
        self.fix(config)
        with fits():
            return self.times(rows)
        return {}

    def bits(self, configs: Sequence[Config]) -> list[int | None]:
        """Return for each configuration what the probed row became among all companions, None where not always the same.

        The weights are lent once for all of them: that takes longer than to run one.
        """
        return self.kind().bits_of([partial(self.fix, one) for one in configs], ROWS)

    def compile(self, config: Config) -> None:
        """Run one configuration where Triton specialises."""
        self.fix(config)
        with fits():
            for rows in COMPILED:
                self.run(*self._inputs(rows))
            torch.cuda.synchronize()

    def _inputs(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(rows)
        x = torch.randn(rows, self.shape.hidden, generator=generator, device="cuda").bfloat16()
        scores = torch.rand(rows, self.shape.experts, generator=generator, device="cuda").topk(self.shape.top_k, dim=1)
        return x, scores.values / scores.values.sum(1, keepdim=True), scores.indices.int()


@contextmanager
def fits() -> Iterator[None]:
    """Leave the block where a kernel asks for more shared memory than this GPU has."""
    try:
        yield
    except Exception as error:
        if "out of resource" not in str(error) and "OutOfResources" not in type(error).__name__:
            raise


def graphed(run: Callable[[], Any], repeats: int = 10) -> float:
    """Return the microseconds of one call, as the median of replays of a graph of several; of fewer where one takes long."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    out = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        out.append(begin.elapsed_time(end) * 1000 / CALLS)
        if len(out) >= 3 and out[0] > LONG_US:
            break
    return sorted(out)[len(out) // 2]


def config(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Config:
    """Return a configuration by its numbers."""
    return dict(zip(FIELDS, (m, n, k, group, warps, stages)))


def candidates(own: Iterable[Config]) -> list[Config]:
    """Return SGLang's own configurations for a shape, and a grid around them."""
    small = [
        config(16, n, k, 1, w, s) for n, k, (w, s) in itertools.product((64, 128), (64, 128, 256), ((4, 3), (8, 4)))
    ]
    large = [
        config(m, n, 64, 1, w, s) for m, (n, w), s in itertools.product((32, 64, 128), ((128, 4), (256, 8)), (3, 4))
    ]
    rest = (config(64, 64, 32, 8, 4, 3), config(16, 32, 64, 1, 4, 3))
    return list({short(c): c for c in [*own, *small, *large, *rest]}.values())


def compile_all(model: str) -> list[subprocess.Popen[bytes]]:
    """Start processes that compile every configuration of a model's bank; return them."""
    command = [sys.executable, "-m", "sglang_margingate.serving.layers.tuning", model]
    return [subprocess.Popen([*command, str(k)]) for k in range(WORKERS)]


def shape_in(model: str) -> BankShape:
    """Return the shape of a model's banks from its configuration.

    Raises
    ------
    ValueError
        It has none.
    """
    from transformers import PretrainedConfig

    c, _ = PretrainedConfig.get_config_dict(model)
    experts = next((c[n] for n in ("num_experts", "num_local_experts") if c.get(n)), 0)
    if not experts:
        raise ValueError(f"{model} is no mixture of experts")
    inner = c.get("moe_intermediate_size") or c["intermediate_size"]
    return BankShape(int(experts), int(inner), int(c["hidden_size"]), int(c["num_experts_per_tok"]))


def main(model: str, share: int) -> None:
    """Compile one share of the candidates: run each where Triton specialises."""
    publish(model)
    bank = Bank(shape_in(model))
    for one in candidates(bank.own_configs())[share::WORKERS]:
        bank.compile(one)


if __name__ == "__main__":
    from sglang_margingate.serving.cpu import install_stand_ins

    install_stand_ins()
    main(sys.argv[1], int(sys.argv[2]))
