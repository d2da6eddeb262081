"""Tries the canonical grid: a prompt that is prefilled alone, in chunks of C tokens, must have the same bits each time.

Every guarantee of a server that does not batch its prefills stands on this, also without the canonical fast path: a verify
recomputes steps, not prompts.
"""

from __future__ import annotations

import torch

from sglang_margingate.canonical.engine import Bits, Engine, Extend, lent_table, same_bits, slots

GRID_TRIALS = 3
"""Times that the prompt is prefilled again."""

LEAST_TOKENS, MOST_TOKENS = 16, 4096

BLOCK = 512
"""Slots that are filled at once, so that the noise takes little memory."""


def grid_holds(engine: Engine, chunk: int) -> str | None:
    """Return what changed a prompt's bits, or None when nothing did.

    The prompt is prefilled alone, its chunks on the grid, then again: in other slots of the pool, as another request, with
    other columns all around.

    Parameters
    ----------
    engine
        The server's runners, before they take requests.
    chunk
        The grid's C. The prompt has two whole chunks and a rest, as far as MOST_TOKENS
        and a pool that holds it twice allow.
    """
    n = min(2 * chunk + chunk // 3 + 1, MOST_TOKENS, engine.capacity // 2, engine.table.shape[1] - 1)
    if n < LEAST_TOKENS:
        return f"what could not be tried: the K/V pool leaves only {n} tokens"
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(0, engine.vocab_size, (n + 1,), generator=generator)
    wanted: Bits | None = None
    for trial in range(1 + GRID_TRIALS):
        # Drawn from all of the pool's first 2n slots, in any order; the first time, in order.
        places = torch.arange(1, n + 1) if trial == 0 else 1 + torch.randperm(2 * n, generator=generator)[:n]
        _fill(engine, 2 * n, trial)
        found = _prefill(engine, trial % engine.table.shape[0], prompt, places, chunk)
        if wanted is None:
            wanted = found
        elif not engine.agree("the canonical grid", same_bits(wanted, found)):
            return "the slots it has, or the columns around them"
    return None


def grid_note(chunk: int, broken: str) -> str:
    """Return the sentence that costs a server its guarantees."""
    return f"a prompt that is prefilled alone in chunks of {chunk} depends on {broken}, so no column of it is canonical"


def _fill(engine: Engine, count: int, seed: int) -> None:
    """Put random columns into the pool's first slots."""
    generator = torch.Generator(engine.table.device).manual_seed(seed)
    for places in torch.arange(1, count + 1, device=engine.table.device).split(BLOCK):
        found = engine.read(places)
        engine.write(places, [torch.randn(c.shape, generator=generator, device=c.device).to(c.dtype) for c in found])


def _prefill(engine: Engine, row: int, prompt: torch.Tensor, places: torch.Tensor, chunk: int) -> Bits:
    """Prefill the prompt as table row ``row`` into the slots ``places``; return its last logits and all its columns."""
    n = len(places)
    with lent_table(engine.table, torch.cat([torch.zeros(row, n, dtype=torch.int64), places[None]])):
        tokens = prompt.repeat(row + 1, 1)
        for start in range(0, n, chunk):
            logits = engine.extend([Extend(row, start, min(start + chunk, n))], tokens)
        return logits[0].clone(), engine.read(slots(engine, row, range(n)))
