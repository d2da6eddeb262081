"""The verify: recompute rows at the canonical shape, exactly M rows a pass.

A row is (request, position): a decode forward that reads the position's token, writes its K/V column into the slot
that position already owns, and gives logits. Writing into the existing slot *is* the repair. All rows of a pass are
stored by each layer before attention reads them, so several positions of one request may share a pass: the later row
sees the recomputed earlier columns, exactly as if they had been decoded one by one.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from margingate_kernels import KVColumns

from sglang_margingate.serving.batches import decode_batch


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


@dataclass
class VerifierCounters:
    """Work done since start."""

    passes: int = 0
    rows: int = 0
    padded_rows: int = 0
    seconds: float = 0.0


@dataclass
class KvAccess:
    """Reads and writes whole K/V columns of SGLang's pool."""

    pool: Any
    layers: range

    @classmethod
    def of(cls, model_runner: Any) -> KvAccess:
        """Return access to the pool of ``model_runner``."""
        pool = model_runner.token_to_kv_pool
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


@dataclass
class EagerVerifier:
    """Runs verify passes without CUDA graphs, through the model's own attention backend.

    Parameters
    ----------
    model_runner
        SGLang's ``ModelRunner``.
    rows
        The canonical M. Passes are padded to it with dummy rows that write slot 0, which SGLang reserves for that.
    """

    model_runner: Any
    rows: int
    counters: VerifierCounters = field(default_factory=VerifierCounters)

    def __post_init__(self) -> None:
        self.kv = KvAccess.of(self.model_runner)

    def slots(self, pool_index: int, positions: list[int]) -> torch.Tensor:
        """Return the pool slots that hold ``positions`` of a request, int64."""
        return self._slots_of([(pool_index, position) for position in positions])

    def _slots_of(self, places: list[tuple[int, int]]) -> torch.Tensor:
        """Return the pool slots of (request, position) pairs in one lookup, int64."""
        table = self.model_runner.req_to_token_pool.req_to_token
        index = torch.tensor(places, dtype=torch.int64).to(table.device)
        return table[index[:, 0], index[:, 1]].long()

    def forward(self, pool_indices: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Run one pass of at most M rows; return their logits, [len(rows), V] float32."""
        return self._pass(self._padded(list(zip(pool_indices, positions, tokens))), len(tokens))

    def _padded(self, rows: list[tuple[int, int, int]]) -> Any:
        """Return the batch of one pass: (request, position, token) rows and as much padding as M needs."""
        pad = self.rows - len(rows)
        if pad < 0:
            raise ValueError(f"{len(rows)} rows do not fit a pass of {self.rows}")
        pools, positions, tokens = map(list, zip(*rows))
        return self.forward_batch(pools + [0] * pad, positions + [0] * pad, tokens + [0] * pad, len(rows))

    def _pass(self, batch: Any, rows: int) -> torch.Tensor:
        logits: torch.Tensor = self._run(batch).next_token_logits
        self.counters.passes += 1
        self.counters.rows += rows
        self.counters.padded_rows += self.rows - rows
        return logits[:rows]

    def forward_batch(self, pool_indices: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
        """Return SGLang's ``ForwardBatch`` of a decode of these rows; those from ``real`` on are padding."""
        return decode_batch(self.model_runner, pool_indices, positions, tokens, real)

    def _run(self, batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        mr = self.model_runner
        # Not through ModelRunner.forward: that also counts the pass as a step of the server (EPLB, dumper, recorder).
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=mr.attn_backend)):
            mr.attn_backend.init_forward_metadata(batch)
            return mr.model.forward(batch.input_ids, batch.positions, batch)

    def verify(self, jobs: list[VerifyJob]) -> VerifyResult:
        """Run all jobs' rows, oldest first, in as few passes of M rows as they need."""
        start = time.perf_counter()
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
        seconds = time.perf_counter() - start
        self.counters.seconds += seconds
        deltas = [KvDelta(*pair) for pair in zip(first_layer, last_layer)]
        return VerifyResult(answers, deltas, seconds, passes, len(flat))

    def _index(self, rows: list[int]) -> torch.Tensor | slice:
        """Return what picks ``rows`` of a pass; a slice, which costs no copy, where they are its first."""
        if rows == list(range(len(rows))):
            return slice(len(rows))
        return torch.tensor(rows, dtype=torch.int64).to(self.model_runner.device)
