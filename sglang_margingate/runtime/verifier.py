"""The verify: recompute rows at the canonical shape, exactly M rows a pass.

A row is (request, position): a decode forward that reads the position's token, writes its K/V column into the slot
that position already owns, and gives logits. Writing into the existing slot *is* the repair. All rows of a pass are
stored by each layer before attention reads them, so several positions of one request may share a pass: the later row
sees the recomputed earlier columns, exactly as if they had been decoded one by one.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from margingate_kernels import KVColumns


@dataclass(frozen=True)
class VerifyJob:
    """Columns of one request to recompute; the newest row's logits are the answer.

    Parameters
    ----------
    pool_index
        Row of SGLang's ``req_to_token`` table.
    rows
        (position, token) in rising order.
    shadow
        Put every column back afterwards: the verify is for the record only.
    """

    pool_index: int
    rows: list[tuple[int, int]]
    shadow: bool = False


class KvDelta(NamedTuple):
    """Max abs change of the newest column, first and last layer."""

    first: float
    last: float


@dataclass
class VerifyResult:
    """Answers of one call, in the order of its jobs."""

    logits: torch.Tensor
    """[jobs, V] float32, raw: before penalties, grammar masks and logit processors."""
    kv_delta: list[KvDelta]
    seconds: float
    passes: int
    rows: int


def best_five(logits: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """Return the best five tokens of each row of logits, [B, V], and their log-probabilities: why a token flipped.

    Lowest index first among exact ties, as argmax has it (bf16 logits tie often; `topk` takes any).
    """
    best = _best(logits)
    return _five(best.indices.tolist(), best.values.tolist())


def best_five_later(logits: torch.Tensor) -> Callable[[], list[tuple[list[int], list[float]]]]:
    """Start on the same without a wait; what is returned gives it after the device has passed this point."""
    hosts = []
    for found in _best(logits):
        host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        hosts.append(host.copy_(found, non_blocking=True))
    values, tokens = hosts
    return lambda: _five(tokens.tolist(), values.tolist())


def _best(logits: torch.Tensor) -> torch.return_types.topk:
    return torch.topk(torch.log_softmax(logits.float(), -1), min(16, logits.shape[-1]), dim=-1)


def _five(indices: list[list[int]], logprobs: list[list[float]]) -> list[tuple[list[int], list[float]]]:
    found = []
    for tokens, values in zip(indices, logprobs):
        order = sorted(range(len(tokens)), key=lambda i: (-values[i], tokens[i]))[:5]
        found.append(([tokens[i] for i in order], [values[i] for i in order]))
    return found


@dataclass
class VerifierCounters:
    """Work done since start."""

    passes: int = 0
    rows: int = 0
    padded_rows: int = 0
    seconds: float = 0.0


@dataclass
class KvAccess:
    """Reads and writes whole K/V columns of a pool with a buffer a layer (SGLang's ``MHATokenToKVPool``)."""

    pool: Any
    layers: range

    @classmethod
    def of(cls, pool: Any) -> KvAccess:
        """Return access to all layers of a pool."""
        return cls(pool, range(pool.start_layer, pool.start_layer + pool.layer_num))

    @cached_property
    def columns(self) -> KVColumns:
        """All layers, for one-launch saves and restores."""
        return self._columns(list(self.layers))

    @cached_property
    def ends(self) -> KVColumns:
        """First and last layer, where a verify's change of a column is recorded."""
        return self._columns([self.layers[0], self.layers[-1]])

    def _columns(self, layers: list[int]) -> KVColumns:
        return KVColumns(
            [self.pool.get_key_buffer(layer) for layer in layers],
            [self.pool.get_value_buffer(layer) for layer in layers],
        )

    def read(self, slots: torch.Tensor) -> list[torch.Tensor]:
        """Return copies of K then V of each layer at ``slots``: tensors of shape [slots, heads, head_dim]."""
        out = []
        for layer in self.layers:
            out.append(self.pool.get_key_buffer(layer)[slots])
            out.append(self.pool.get_value_buffer(layer)[slots])
        return out

    def write(self, slots: torch.Tensor, columns: list[torch.Tensor]) -> None:
        """Put back what :meth:`read` returned for all layers."""
        pairs = iter(columns)
        for layer in self.layers:
            self.pool.get_key_buffer(layer)[slots] = next(pairs)
            self.pool.get_value_buffer(layer)[slots] = next(pairs)


class Batch(Protocol):
    """A decode forward that is ready to run."""

    out_cache_loc: torch.Tensor
    """[M] pool slots that its columns are written to."""


class Engine(Protocol):
    """Runs decode forwards of a fixed number of rows."""

    device: Any
    kv: KvAccess
    table: torch.Tensor
    """[requests, tokens]: the pool slot of each column."""

    def prepare(self, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Batch:
        """Return the decode of these rows; those from ``real`` on are padding and write slot 0."""
        ...

    def run(self, batch: Any) -> torch.Tensor:
        """Run it; return its logits, [M, V] float32, which the next run may overwrite."""
        ...


class Verifier:
    """Runs verify passes of exactly M rows.

    Parameters
    ----------
    engine
        Runs the passes.
    rows
        The canonical M. Passes are padded to it with dummy rows.
    """

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine, self.rows = engine, rows
        self.kv = engine.kv
        self.counters = VerifierCounters()

    def slots(self, pool_index: int, positions: list[int]) -> torch.Tensor:
        """Return the pool slots that hold ``positions`` of a request, int64."""
        return self._slots_of([(pool_index, position) for position in positions])

    def _slots_of(self, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return the pool slots of (request, position) pairs in one lookup, int64."""
        table = self.engine.table
        index = torch.tensor(places, dtype=torch.int64).to(table.device)
        return table[index[:, 0], index[:, 1]].long()

    def forward(self, pool_indices: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one pass of at most M rows; return their logits, [len(rows), V] float32."""
        return self._pass(self._padded(list(zip(pool_indices, positions, tokens))), len(tokens))

    def _padded(self, rows: list[tuple[int, int, int]]) -> Batch:
        """Return the batch of one pass: (request, position, token) rows and as much padding as M needs."""
        pad = self.rows - len(rows)
        if pad < 0:
            raise ValueError(f"{len(rows)} rows do not fit a pass of {self.rows}")
        pools, positions, tokens = map(list, zip(*rows))
        return self.engine.prepare(pools + [0] * pad, positions + [0] * pad, tokens + [0] * pad, len(rows))

    def _pass(self, batch: Batch, rows: int) -> torch.Tensor:
        logits = self.engine.run(batch)
        self.counters.passes += 1
        self.counters.rows += rows
        self.counters.padded_rows += self.rows - rows
        return logits[:rows]

    def verify(self, jobs: Sequence[VerifyJob]) -> VerifyResult:
        """Run all jobs' rows, oldest first, in as few passes of M rows as they need.

        What shadow verifies stage is bounded: where their rows exceed M, the jobs are run in several groups.
        """
        start = time.perf_counter()
        parts = [self._verify(group) for group in self._groups(jobs)]
        seconds = time.perf_counter() - start
        self.counters.seconds += seconds
        logits = parts[0].logits if len(parts) == 1 else torch.cat([part.logits for part in parts])
        return VerifyResult(
            logits, [delta for part in parts for delta in part.kv_delta], seconds, sum(part.passes for part in parts),
            sum(part.rows for part in parts),
        )  # fmt: skip

    def _groups(self, jobs: Sequence[VerifyJob]) -> Iterator[list[VerifyJob]]:
        """Cut the jobs where the rows of shadow verifies, whose columns are staged, would exceed M."""
        group: list[VerifyJob] = []
        staged = 0
        for job in jobs:
            more = len(job.rows) if job.shadow else 0
            if staged and more and staged + more > self.rows:
                yield group
                group, staged = [], 0
            group.append(job)
            staged += more
        yield group

    def _verify(self, jobs: list[VerifyJob]) -> VerifyResult:
        flat = [(job.pool_index, position, token) for job in jobs for position, token in job.rows]
        ends = list(accumulate(len(job.rows) for job in jobs))  # a job's newest row is the one before its end
        kept = [(job.pool_index, position) for job in jobs if job.shadow for position, _ in job.rows]
        if kept:
            kept_slots = self._slots_of(kept)
            staging = self.kv.columns.staging(len(kept_slots))
            self.kv.columns.save(kept_slots, staging)
        before = self.kv.ends.staging(len(jobs))
        newest: list[torch.Tensor] = []
        answers: torch.Tensor | None = None
        done = passes = 0
        for at in range(0, len(flat), self.rows):
            part = flat[at : at + self.rows]
            batch = self._padded(part)
            first, done = done, bisect_right(ends, at + len(part))
            index = self._index([end - 1 - at for end in ends[first:done]])
            # A pass writes the newest columns of these jobs and of no others.
            newest.append(batch.out_cache_loc[index])
            self.kv.ends.save(newest[-1], before[:, :, first:done])
            logits = self._pass(batch, len(part))
            passes += 1
            if answers is None:
                answers = logits.new_empty(len(jobs), logits.shape[1])
            answers[first:done] = logits[index]  # a copy: the next pass may overwrite the logits buffer
        first_layer, last_layer = self.kv.ends.max_abs_change(torch.cat(newest), before).tolist()
        if kept:
            self.kv.columns.restore(kept_slots, staging)
        assert answers is not None
        deltas = [KvDelta(*pair) for pair in zip(first_layer, last_layer)]
        return VerifyResult(answers, deltas, 0.0, passes, len(flat))

    def _index(self, rows: list[int]) -> torch.Tensor | slice:
        """Return what picks ``rows`` of a pass; a slice, which costs no copy, where they are its first."""
        if rows == list(range(len(rows))):
            return slice(len(rows))
        return torch.tensor(rows, dtype=torch.int64).to(self.engine.device)
