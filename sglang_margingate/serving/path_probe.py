"""Tries the canonical fast path end to end, with the runners that will serve, before the server takes requests.

The linear map says where GEMMs agree; attention, norms and logits are tried here on made-up requests: one prompt alone
and whole against the same prompt in chunks, with a one-token rest, among companions and behind a cached prefix; one
decode step at every size, at other places among other companions, and as a verify pass. Logits and K/V columns of all
layers must be equal bit for bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from sglang_margingate.serving.fastpath import FastPath
from sglang_margingate.serving.selftest import lent_table, same_bits
from sglang_margingate.serving.verifier import EagerVerifier

TOKENS_GPU, TOKENS_CPU = 1200, 120
"""Length of the made-up prompts; on a GPU several chunks of decode attention."""
COMPANIONS = 3
MOST_REQUESTS = 128
"""Requests of a trial where no decode graph asks for more."""
DECODE_TRIALS = 4


@dataclass(frozen=True)
class Extend:
    """Part of one made-up prompt: positions [start, end) of table row ``row``."""

    row: int
    start: int
    end: int


class PathProbe:
    """Made-up requests in the free pool: table row r holds tokens and slots of its own.

    Parameters
    ----------
    verifier
        The verifier of this process; its M is the reference.
    vocab_size
        Tokens are drawn below it.
    most_rows
        Largest number of requests to try.
    """

    def __init__(self, verifier: EagerVerifier, vocab_size: int, most_rows: int = MOST_REQUESTS) -> None:
        self.verifier = verifier
        self.mr = verifier.model_runner
        self.cpu = self.mr.device == "cpu"
        table = self.mr.req_to_token_pool.req_to_token
        pool = self.mr.max_total_num_tokens - 1
        self.length = min(TOKENS_CPU if self.cpu else TOKENS_GPU, table.shape[1] - 1, pool // (COMPANIONS + 2))
        self.table_rows = min(table.shape[0], 1 + max(verifier.rows, most_rows))
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randint(0, vocab_size, (COMPANIONS + 1, self.length + 1), generator=generator)
        self.random = torch.Generator().manual_seed(5)

    # ---- prefill --------------------------------------------------------------------------------------------------

    def prefill_holds(self) -> str | None:
        """Return what changed a prompt's bits, or None when nothing did."""
        n = self.length
        if n < 16:
            return f"the K/V pool leaves only {n} tokens to try"
        with lent_table(self.mr, self._own_slots()):
            whole = self._extend([Extend(0, 0, n)])
            cut = n // 3
            trials = {  # the forwards of each, one list of parts a forward
                "chunks": [[Extend(0, 0, cut)], [Extend(0, cut, n)]],
                "a rest of one token": [[Extend(0, 0, n - 1)], [Extend(0, n - 1, n)]],
                "companions": [[Extend(1, 0, n // 2), Extend(0, 0, n), Extend(2, 0, n - 3)]],
                "a cached prefix among companions": [
                    [Extend(3, 0, 5), Extend(2, 0, n // 4), Extend(0, cut, n), Extend(1, n // 2, n)]
                ],
            }
            for name, forwards in trials.items():
                if not same_bits(whole, [self._extend(parts) for parts in forwards][-1]):
                    return name
        return None

    def _extend(self, parts: list[Extend]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run one prefill forward; return row 0's last logits and its columns so far."""
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode

        mr = self.mr
        device = mr.device
        table = mr.req_to_token_pool.req_to_token
        rows = torch.tensor([p.row for p in parts], dtype=torch.int64, device=device)
        ends = torch.tensor([p.end for p in parts], dtype=torch.int64)
        starts, lengths = [p.start for p in parts], [p.end - p.start for p in parts]
        begins = torch.tensor([0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()], dtype=torch.int32)
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(parts),
            input_ids=torch.cat([self.tokens[p.row, p.start : p.end] for p in parts]).to(device),
            req_pool_indices=rows,
            seq_lens=ends.to(device),
            seq_lens_cpu=ends,
            orig_seq_lens=ends.to(device),
            out_cache_loc=torch.cat([table[p.row, p.start : p.end] for p in parts]).long(),
            seq_lens_sum=int(ends.sum()),
            positions=torch.cat([torch.arange(p.start, p.end) for p in parts]).to(device),
            extend_num_tokens=sum(lengths),
            extend_seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            extend_prefix_lens=torch.tensor(starts, dtype=torch.int32, device=device),
            extend_start_loc=begins.to(device),
            extend_prefix_lens_cpu=starts,
            extend_seq_lens_cpu=lengths,
            extend_logprob_start_lens_cpu=lengths,
            return_logprob=False,
            spec_algorithm=mr.spec_algorithm,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            num_token_non_padded_cpu=sum(lengths),
        )
        out = self._run(mr.eager_runner, batch)
        at = next(k for k, p in enumerate(parts) if p.row == 0)
        slots = self.verifier.slots(0, list(range(parts[at].end)))
        return out.next_token_logits[at].clone(), self.verifier.kv.read(slots)

    # ---- decode ---------------------------------------------------------------------------------------------------

    def decode_holds(self, sizes: list[int]) -> str | None:
        """Return at which number of requests a decode step's bits changed, or None. Run after the prefill trials."""
        with lent_table(self.mr, self._shared_slots()):
            wanted = self._verify()
            for rows in sizes:
                for _ in range(DECODE_TRIALS):
                    if not same_bits(wanted, self._decode(rows)):
                        return f"{rows} requests"
        return None

    def _places(self, rows: int) -> tuple[list[int], list[int], list[int], int]:
        lengths = torch.randint(1, self.length, (rows - 1,), generator=self.random).tolist()
        at = int(torch.randint(0, rows, (1,), generator=self.random))
        order = list(range(1, rows))
        order.insert(at, 0)
        positions = [self.length if r == 0 else lengths[r - 1] for r in order]
        tokens = torch.randint(0, int(self.tokens.max()) + 1, (rows,), generator=self.random).tolist()
        tokens[at] = int(self.tokens[0, self.length])
        return order, positions, tokens, at

    def _verify(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        order, positions, tokens, at = self._places(min(self.verifier.rows, self.table_rows))
        self._point(order, positions)
        logits = self.verifier.forward(order, positions, tokens)
        return logits[at].clone(), self.verifier.kv.read(self.verifier.slots(0, [self.length]))

    def _decode(self, rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        order, positions, tokens, at = self._places(rows)
        self._point(order, positions)
        runner = self.mr.eager_runner if self.cpu else self.mr.decode_cuda_graph_runner
        out = self._run(runner, self.verifier.forward_batch(order, positions, tokens, rows))
        return out.next_token_logits[at].clone(), self.verifier.kv.read(self.verifier.slots(0, [self.length]))

    # ---- plumbing -------------------------------------------------------------------------------------------------

    def _run(self, runner: Any, batch: Any) -> Any:
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        if not self.cpu:
            torch.cuda.current_stream().synchronize()  # the last plan's pinned buffer may still be in use
        with torch.no_grad(), forward_context(ForwardContext(attn_backend=self.mr.attn_backend)):
            return runner.execute(batch)

    def _own_slots(self) -> torch.Tensor:
        """Every prompt has slots of its own."""
        return torch.arange(1, (COMPANIONS + 1) * (self.length + 1) + 1).view(COMPANIONS + 1, self.length + 1)

    def _shared_slots(self) -> torch.Tensor:
        """All requests read row 0's prompt; where each writes is set by :meth:`_point`."""
        return torch.arange(1, self.length + 2).repeat(self.table_rows, 1)

    def _point(self, order: list[int], positions: list[int]) -> None:
        """Give each companion a slot of its own for the column that it writes."""
        table = self.mr.req_to_token_pool.req_to_token
        table[: self.table_rows, : self.length + 1] = self._shared_slots().to(table.device, table.dtype)
        free = self.length + 2
        for row, position in zip(order, positions):
            if row:
                table[row, position] = free + row


def try_fast_path(fast: FastPath, verifier: EagerVerifier, vocab_size: int) -> float:
    """Fill in what only a trial can tell; return the seconds it took."""
    start = time.perf_counter()
    if fast.unknown:
        more = f" and {len(fast.unknown) - 1} more" if len(fast.unknown) > 1 else ""
        fast.notes.append(f"the probe does not know {fast.unknown[0]}{more}: everything is gated by its margin")
        return time.perf_counter() - start
    probe = PathProbe(verifier, vocab_size, max([MOST_REQUESTS, *fast.graphs_inside()]))
    broken = probe.prefill_holds() if fast.prefill.sizes else "no class of its linear layers was found"
    fast.batched_prefill = broken is None
    if broken is not None:
        fast.notes.append(f"prefill depends on {broken}: gated prompts are prefilled one at a time, in chunks")
    sizes = _decode_sizes(fast, probe)
    broken = probe.decode_holds(sizes) if fast.decode.sizes and sizes else "every size"
    fast.decode_ok = broken is None
    if broken is not None:
        fast.notes.append(f"decode differs from the verify at {broken}: steps are gated by their margin")
    return time.perf_counter() - start


def _decode_sizes(fast: FastPath, probe: PathProbe) -> list[int]:
    """Numbers of requests to try: each graph full and one above the last, or a spread without graphs."""
    if fast.graphs.sizes:
        inside = fast.graphs_inside()
        wanted = sorted({1, *inside, *(size + 1 for size in inside[:-1])})
    else:
        wanted = [1, 2, 3, 7, 16, 17, 33, 64]
    return [size for size in wanted if size <= probe.table_rows and fast.decode.target(size) is not None]
