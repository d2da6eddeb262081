"""Tries the canonical fast path end to end, with the runners that will serve, before the server takes requests.

The linear map says where GEMMs agree; attention, norms and logits are tried here on made-up requests: one prompt alone
and whole against the same prompt in chunks, with a one-token rest, among companions (that ask for the log-probabilities
of their prompts, too) and behind a cached prefix; one decode step at every size, at other places among other companions,
and as a verify pass. Logits and K/V columns of all layers must be equal bit for bit. Where prefill depends on its shape,
gated prompts keep to the chunk grid, one at a time. That a prompt has the same bits there each time, wherever its columns
lie, is tried in any case (grid_probe.py).
"""

from __future__ import annotations

import time

import torch

from sglang_margingate.canonical.classes import NO_GRAPHS, Classes, DecodeGraphs, Prefill, Trial
from sglang_margingate.canonical.engine import Bits, Engine, Extend, lent_table, same_bits, slots
from sglang_margingate.canonical.grid_probe import grid_holds, grid_note

TOKENS_GPU, TOKENS_CPU = 1200, 200
"""Length of the made-up prompts: several chunks of decode attention on a GPU; the companions' rows are more than one block
of the layer that makes logits."""
COMPANIONS = 3
MOST_REQUESTS = 128
"""Requests of a trial where no decode graph asks for more."""
DECODE_TRIALS = 4


class PathProbe:
    """Made-up requests in the free pool: table row r holds tokens and slots of its own.

    Parameters
    ----------
    engine
        The server's runners; their verify is the reference.
    most_rows
        Largest number of requests to try.
    most_tokens
        Largest prefill forward to try, in tokens; None: as large as the prompts make it.
    """

    def __init__(self, engine: Engine, most_rows: int = MOST_REQUESTS, most_tokens: int | None = None) -> None:
        self.engine = engine
        table = engine.table
        wanted = TOKENS_CPU if engine.device == "cpu" else TOKENS_GPU
        self.length = min(wanted, table.shape[1] - 1, engine.capacity // (COMPANIONS + 2))
        if most_tokens is not None:
            self.length = min(self.length, most_tokens // (COMPANIONS + 1))
        self.most_running = table.shape[0] - 1
        """One row of the table is SGLang's padding, and its buffers hold as many requests as the others."""
        self.table_rows = min(table.shape[0], 1 + max(engine.rows, most_rows))
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randint(0, engine.vocab_size, (COMPANIONS + 1, self.length + 1), generator=generator)
        self.random = torch.Generator().manual_seed(5)

    # ---- prefill --------------------------------------------------------------------------------------------------

    def prefill_holds(self) -> str | None:
        """Return what changed a prompt's bits, or None when nothing did."""
        n = self.length
        if self.most_running <= COMPANIONS:
            return f"what could not be tried: only {self.most_running} may run at once"
        if n < 16:
            return f"what could not be tried: pool and chunks leave only {n} tokens a prompt"
        with lent_table(self.engine.table, self._own_slots()):
            whole = self._extend([Extend(0, 0, n)])
            cut = n // 3 | 1
            # A kernel's blocks may hide what a cut on their border changes: on a CPU the same chunks hold at 64 tokens.
            cuts = [c for c in (3, 17, 33, cut, n // 2 + 2, n - 33) if 0 < c < n]
            trials: list[tuple[str, list[list[Extend]]]] = [  # the forwards of each, one list of parts a forward
                *(("chunks", [[Extend(0, 0, c)], [Extend(0, c, n)]]) for c in cuts),
                ("a rest of one token", [[Extend(0, 0, n - 1)], [Extend(0, n - 1, n)]]),
                ("companions", [[Extend(1, 0, n // 2), Extend(0, 0, n), Extend(2, 0, n - 3)]]),
                (
                    "companions that ask for the log-probabilities of their prompts",
                    [[Extend(r, 0, n, logprobs=r > 0) for r in (1, 0, 2, 3)]],
                ),
                (
                    "a cached prefix among companions",
                    [
                        [Extend(0, 0, n)],
                        [Extend(3, 0, 5), Extend(2, 0, n // 4), Extend(0, cut, n), Extend(1, n // 2, n)],
                    ],
                ),
            ]
            changed = [
                name
                for name, forwards in trials
                if not self._same(f"prefill with {name}", whole, [self._extend(parts) for parts in forwards][-1])
            ]
        return ", ".join(dict.fromkeys(changed)) or None

    def scores_hold(self) -> str | None:
        """Return what changed the log-probabilities of a prompt, or None. Run where :meth:`prefill_holds`."""
        n, cut = self.length, self.length // 3 | 1
        trials = {  # odd numbers of rows before the prompt's: a row of logits may begin at any alignment
            "companions": [
                Extend(1, 0, n // 2 | 1, logprobs=True),
                Extend(0, 0, n, logprobs=True),
                Extend(2, 0, n - 3),
            ],
            "a cached prefix": [Extend(3, 0, 6, logprobs=True), Extend(0, cut, n, logprobs=True), Extend(2, 0, 5)],
        }
        with lent_table(self.engine.table, self._own_slots()):
            whole = self._scores([Extend(0, 0, n, logprobs=True)])
            changed = [
                name
                for name, parts in trials.items()
                if not self.engine.agree(name, torch.equal(whole[parts[1].start :], self._scores(parts)))
            ]
        return ", ".join(changed) or None

    def _scores(self, parts: list[Extend]) -> torch.Tensor:
        """Run one prefill forward; return the log-probabilities of row 0's part."""
        found = self.engine.scores(parts, self.tokens)
        begin = 0
        for part in parts:
            end = begin + (part.end - part.start if part.logprobs else 0)
            if part.row == 0:
                return found[begin:end].clone()
            begin = end
        raise ValueError("no part of row 0")

    def _extend(self, parts: list[Extend]) -> Bits:
        """Run one prefill forward; return row 0's last logits and its columns so far."""
        logits = self.engine.extend(parts, self.tokens)
        at = next(k for k, p in enumerate(parts) if p.row == 0)
        return logits[at].clone(), self._columns(range(parts[at].end))

    # ---- decode ---------------------------------------------------------------------------------------------------

    def decode_holds(self, sizes: list[int]) -> str | None:
        """Return at which number of requests a decode step's bits changed, or None. Run after the prefill trials."""
        with lent_table(self.engine.table, self._shared_slots()):
            wanted = self._verify()
            for rows in sizes:
                for _ in range(DECODE_TRIALS):
                    if not self._same(f"decode of {rows} requests", wanted, self._decode(rows)):
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

    def _verify(self) -> Bits:
        order, positions, tokens, at = self._places(min(self.engine.rows, self.table_rows))
        self._point(order, positions)
        logits = self.engine.verify(order, positions, tokens)
        return logits[at].clone(), self._columns([self.length])

    def _decode(self, rows: int) -> Bits:
        order, positions, tokens, at = self._places(rows)
        self._point(order, positions)
        logits = self.engine.decode(order, positions, tokens)
        return logits[at].clone(), self._columns([self.length])

    def _same(self, what: str, wanted: Bits, found: Bits) -> bool:
        return self.engine.agree(what, same_bits(wanted, found))

    # ---- plumbing -------------------------------------------------------------------------------------------------

    def _columns(self, positions: range | list[int]) -> list[torch.Tensor]:
        return self.engine.read(slots(self.engine, 0, positions))

    def _own_slots(self) -> torch.Tensor:
        """Every prompt has slots of its own."""
        return torch.arange(1, (COMPANIONS + 1) * (self.length + 1) + 1).view(COMPANIONS + 1, self.length + 1)

    def _shared_slots(self) -> torch.Tensor:
        """All requests read row 0's prompt; where each writes is set by :meth:`_point`."""
        return torch.arange(1, self.length + 2).repeat(self.table_rows, 1)

    def _point(self, order: list[int], positions: list[int]) -> None:
        """Give each companion a slot of its own for the column that it writes."""
        table = self.engine.table
        table[: self.table_rows, : self.length + 1] = self._shared_slots().to(table.device, table.dtype)
        free = self.length + 2
        for row, position in zip(order, positions):
            if row:
                table[row, position] = free + row


def try_fast_path(
    classes: Classes,
    engine: Engine,
    chunk: int,
    graphs: DecodeGraphs = NO_GRAPHS,
    decode_attention: str = "sglang",
    notes: tuple[str, ...] = (),
) -> Trial:
    """Return what only a trial can tell.

    Parameters
    ----------
    classes
        What the probe found.
    engine
        The server's runners.
    chunk
        The canonical grid, for prompts that must keep to it.
    graphs
        The decode graphs.
    decode_attention
        What attends in them.
    notes
        What was said when they were captured.
    """
    start = time.perf_counter()
    said = list(notes)
    batched = decode_ok = scores = False
    if classes.unknown:
        more = f" and {len(classes.unknown) - 1} more" if len(classes.unknown) > 1 else ""
        said.append(f"the probe does not know {classes.unknown[0]}{more}: everything is gated by its margin")
    else:
        largest = max(classes.prefill.sizes, default=0)
        probe = PathProbe(engine, max([MOST_REQUESTS, *graphs.inside()]), largest or None)
        broken = (
            probe.prefill_holds() if largest and classes.head.sizes else "every shape: no class of its layers was found"
        )
        batched = broken is None
        if broken is not None:
            said.append(f"prefill depends on {broken}; gated prompts are prefilled one at a time, in chunks")
        else:
            broken = probe.scores_hold()
            scores = broken is None
            if broken is not None:
                said.append(f"log-probabilities of a prompt depend on {broken}")
        most = min(probe.table_rows, probe.most_running)
        broken = _try_decode(probe, classes, graphs, most)
        whole = graphs.whole()
        if broken is not None and whole.inside() and whole.sizes != graphs.sizes:
            said.append(
                f"decode with layers padded by themselves differs from the verify at {broken}: it is padded as a whole"
            )
            engine.keep_graphs(whole.sizes)
            graphs, broken = whole, _try_decode(probe, classes, whole, most)
        decode_ok = broken is None
        if broken is not None:
            said.append(f"decode differs from the verify at {broken}: steps are gated by their margin")
    # Also where prompts are batched: the trials above keep to one place in the pool.
    broken = grid_holds(engine, chunk)
    prefill: Prefill | None = "batched" if batched else "grid"
    if broken is not None:
        prefill = None
        said.append(grid_note(chunk, broken))
    # A prompt that is prefilled alone, in the same chunks, meets the same shapes each time.
    return Trial(
        graphs,
        decode_ok,
        prefill,
        tuple(said),
        decode_attention,
        seconds=time.perf_counter() - start,
        prompt_scores=scores or prefill == "grid",
    )


def _try_decode(probe: PathProbe, classes: Classes, graphs: DecodeGraphs, most: int) -> str | None:
    """Return at which number of requests, of at most ``most``, a decode step's bits changed, or None."""
    sizes = _decode_sizes(classes, graphs, most)
    return probe.decode_holds(sizes) if sizes else "every size"


def _decode_sizes(classes: Classes, graphs: DecodeGraphs, most: int) -> list[int]:
    """Numbers of requests to try: each graph full and one above the last, or a spread without graphs."""
    if graphs.sizes:
        inside = graphs.inside()
        wanted = [rows for rows in {1, *inside, *(size + 1 for size in inside[:-1])} if graphs.target(rows) in inside]
    else:
        wanted = [rows for rows in (1, 2, 3, 7, 16, 17, 33, 64) if classes.decode.target(rows) is not None]
    return sorted(rows for rows in wanted if rows <= most)
