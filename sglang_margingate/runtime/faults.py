"""Faults injected on purpose, for tests only, by environment variables. Unset, none of this runs.

==============================  =====================================================================================
``MARGINGATE_TEST_POISON=N``    every Nth decode step of a request, the *fast path* goes wrong: the runner-up's logit
                                is lifted just above the best one and the K/V column of all layers is shifted
``MARGINGATE_TEST_FLIP_RATE=P`` in a batch of two or more, each decode step's logits are corrupted with probability P
                                (what `margingate check` must find)
``MARGINGATE_TEST_BREAK=NAME``  the linear layer whose name ends with NAME leaks its companions into each row
                                (what the start-up self-test must refuse)
``MARGINGATE_TEST_SPLIT=NAME@M`` the linear layer whose name ends with NAME sums in two parts where it has M rows or fewer
                                (what the invariance map must show and the canonical fast path avoid)
``MARGINGATE_TEST_ATTENTION=M``  attention of decode batches of M rows or fewer rounds otherwise, as after another K/V split
                                (what the trial of the canonical fast path must find and leave to the gate)
``MARGINGATE_TEST_REDUCE=M``    the sum over ranks rounds otherwise where it has M rows or fewer
                                (what the probe of the all-reduce must show and the canonical fast path avoid)
``MARGINGATE_TEST_EXPERTS=M``    fused experts of M rows or fewer round otherwise than when they were probed, as with another
                                configuration (what the trial must find and leave to the gate)
``MARGINGATE_TEST_RANK=R``      only rank R has the faults of layers and attention (what every rank must hear of)
``MARGINGATE_TEST_SHARE=1``     a request's threshold is read as a share: that part of its steps triggers, drawn by step
                                (cost at a set trigger rate; bf16 margins take few values, so thresholds cannot set it)
==============================  =====================================================================================

A server with one of these set claims nothing: every label is `none`, and status, manifest and summaries name it.
``MARGINGATE_KV_DIGEST=1`` breaks nothing and is no fault: ``meta_info.margingate.kv_digest`` then holds the SHA-256 of the
request's generated K/V columns.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_margingate.config import ConfigError
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.runtime.seeded.draws import mislead

_dice = random.Random(7)
"""Seeded: all ranks of a server must corrupt the same steps."""


def _number(name: str, kind: type) -> Any:
    text = os.environ.get(name, "")
    try:
        return kind(text) if text else kind(0)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None


@dataclass(frozen=True)
class TestKnobs:
    """The faults asked for in the environment."""

    __test__ = False  # not a pytest class

    poison_every: int = field(default_factory=lambda: _number("MARGINGATE_TEST_POISON", int))
    flip_rate: float = field(default_factory=lambda: _number("MARGINGATE_TEST_FLIP_RATE", float))
    trigger_by_share: bool = field(default_factory=lambda: os.environ.get("MARGINGATE_TEST_SHARE") == "1")
    break_linear: str = field(default_factory=lambda: os.environ.get("MARGINGATE_TEST_BREAK", ""))
    split_linear: str = field(default_factory=lambda: os.environ.get("MARGINGATE_TEST_SPLIT", ""))
    split_attention: int = field(default_factory=lambda: _number("MARGINGATE_TEST_ATTENTION", int))
    split_reduce: int = field(default_factory=lambda: _number("MARGINGATE_TEST_REDUCE", int))
    broken_experts: int = field(default_factory=lambda: _number("MARGINGATE_TEST_EXPERTS", int))
    only_rank: str = field(default_factory=lambda: os.environ.get("MARGINGATE_TEST_RANK", ""))

    @property
    def active(self) -> list[str]:
        """Names of the knobs that are set, for the log and the manifest."""
        return [name for name, on in vars(self).items() if on]

    @property
    def changes_steps(self) -> bool:
        """Whether the fast path of some decode steps is to go wrong."""
        return bool(self.poison_every or self.flip_rate)

    def corrupts(self, step: int, batch_rows: int) -> bool:
        """Return whether the fast path of this step is to be corrupted."""
        if self.poison_every and step > 0 and step % self.poison_every == 0:
            return True
        return bool(self.flip_rate) and batch_rows > 1 and _dice.random() < self.flip_rate

    def hits(self, rank: int) -> bool:
        """Return whether this rank has the faults of layers and attention."""
        return self.only_rank in ("", str(rank))

    def draws(self, request_id: str, step: int, share: float) -> bool:
        """Return whether a step triggers under ``trigger_by_share``: the same steps in every run of a request id."""
        return AuditSampler(share, seed=1).draw(request_id, step)


def wants_digest() -> bool:
    """Return whether responses carry the digest of their K/V columns."""
    return os.environ.get("MARGINGATE_KV_DIGEST") == "1"


def swap_best_two(logits_row: torch.Tensor) -> None:
    """Lift the runner-up just above the best token, in place: a near tie that the wrong token wins."""
    best_two = torch.topk(logits_row, 2)
    logits_row[best_two.indices[1]] = torch.nextafter(best_two.values[0], torch.tensor(float("inf")))


def shift_column(kv: Any, slot: torch.Tensor) -> None:
    """Shift the K/V column in every layer, as a wrong kernel might."""
    kv.write(slot, [c + 0.25 for c in kv.read(slot)])


def spoil(knobs: TestKnobs, rows: Sequence[Any], logits: torch.Tensor, columns: torch.Tensor | None, kv: Any) -> None:
    """Let the fast path of some decode rows go wrong: another token is chosen, and its K/V column is another.

    Parameters
    ----------
    rows
        Those of the forward that are observed, with ``index`` and ``step``.
    logits, columns
        The forward's: [B, V], and the pool slots [B] that it wrote.
    kv
        The pool; None where nothing could repair it.
    """
    for row in rows:
        if knobs.corrupts(row.step, len(logits)):
            if row.state.draw is None:
                swap_best_two(logits[row.index])
            else:
                mislead(logits[row.index], row)
            if kv is not None and columns is not None:
                shift_column(kv, columns[row.index : row.index + 1])


def column_digest(kv: Any, slots: torch.Tensor) -> str:
    """Return the SHA-256 of the K/V columns of all layers at ``slots``."""
    digest = hashlib.sha256()
    for column in kv.read(slots):
        digest.update(column.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def split_reduce(all_reduce: Callable[..., torch.Tensor], most_rows: int) -> Callable[..., torch.Tensor]:
    """Return a sum over ranks that rounds otherwise at up to ``most_rows`` rows: in two parts.

    Another order would be no fault on two ranks: two numbers have one sum.
    """

    def reduce(x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 or len(x) > most_rows:
            return all_reduce(x)
        part = x * 0.3
        return all_reduce(x - part) + all_reduce(part)

    return reduce


def leak_companions(model: torch.nn.Module, suffix: str) -> str:
    """Make one linear layer's rows depend on the other rows of the pass; return its full name."""
    for name, module in model.named_modules():
        if name.endswith(suffix):

            def hook(_module: Any, _inputs: Any, output: Any) -> Any:
                first = output[0] if isinstance(output, tuple) else output
                leaked = first + first.float().mean(dim=0, keepdim=True).to(first.dtype) * 0.01
                return (leaked, *output[1:]) if isinstance(output, tuple) else leaked

            module.register_forward_hook(hook)
            return name
    raise ConfigError(f"MARGINGATE_TEST_BREAK: no layer's name ends with {suffix!r}")


def split_attention(backend: Any, most_rows: int) -> None:
    """Make decode attention's bits depend on the number of rows."""
    original = backend.forward_decode

    def forward_decode(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = original(q, *args, **kwargs)
        return out if len(q) > most_rows else (out.float() * (1 + 2**-8)).to(out.dtype)

    backend.forward_decode = forward_decode
