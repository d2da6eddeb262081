"""Draws the tokens of seeded rows, among greedy ones, on the fast path and of a verify.

What a draw is stands in :mod:`margingate_kernels.seeded`. A row's noise belongs to the position of the token that it chooses, so
a verify, a retraction and a request that is asked again draw with the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from margingate_kernels import Workspace, top2_margin
from margingate_kernels.seeded import Draw, Drawn, draw, pack

from sglang_margingate.runtime.state import StepRow


def reach(threshold: float) -> float:
    """Return how far a margin looks for what top-p would change, in logits: beyond twice the threshold it decides nothing."""
    return 2 * threshold + 1 / 16


def any_seeded(rows: Sequence[StepRow]) -> bool:
    """Return whether some row is drawn."""
    return bool([row for row in rows if row.state.draw is not None])  # a generator costs a call a row


def packed(draws: Sequence[Draw | None], positions: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the rows' parameters on a device, without a wait for what runs there; positions are the tokens'."""
    made = pack(draws, positions)
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)


class Drawer:
    """Draws the rows of one process's forwards."""

    def __init__(self) -> None:
        self._draws: list[Draw | None] = []
        self._next: list[int] = []
        self._packed = torch.empty(0)

    def into(self, logits: torch.Tensor, rows: Sequence[StepRow], work: Workspace, out: Drawn) -> None:
        """Draw every row of a forward on its device; those that are not among ``rows``, or not seeded, as greedy ones.

        Parameters
        ----------
        logits
            [B, V], processed.
        rows
            The observed rows.
        work
            The step's, with room for B rows.
        out
            Takes the result, [B] each.
        """
        draws: list[Draw | None] = [None] * len(logits)
        positions = [0] * len(logits)
        for row in rows:
            draws[row.index], positions[row.index] = row.state.draw, row.position + 1
        filtered = any(d is not None and d.filtered for d in draws)
        draw(logits, self._on_device(draws, positions, logits.device), filtered, work, out)

    def _on_device(self, draws: list[Draw | None], positions: list[int], device: torch.device) -> torch.Tensor:
        """Return the rows' parameters; from one decode to the next of the same requests only the positions move on."""
        if draws == self._draws and positions == self._next and self._packed.device == device:
            self._packed[:, 0].add_(1)
        else:
            self._draws, self._packed = draws, packed(draws, positions, device)
        self._next = [position + (d is not None) for d, position in zip(draws, positions)]
        return self._packed

    @staticmethod
    def on_host(
        logits: torch.Tensor, rows: Sequence[StepRow], best: torch.Tensor, second: list[int], margin: list[float]
    ) -> None:
        """Put the draws of the seeded rows of CPU logits in the place of their argmax, runner-up and margin."""
        mine = [row for row in rows if row.state.draw is not None]
        found = _draw(logits[[row.index for row in mine]], mine)
        for row, token, other, gap in zip(mine, found.token, found.second.tolist(), found.margin.tolist()):
            best[row.index], second[row.index], margin[row.index] = token, other, gap

    @staticmethod
    def verified(logits: torch.Tensor, rows: Sequence[StepRow]) -> tuple[list[int], list[float]]:
        """Return token and margin of verified rows, on the host.

        Parameters
        ----------
        logits
            [len(rows), V], processed: row i is that of ``rows[i]``.
        rows
            What was verified.
        """
        if not any_seeded(rows):
            top = top2_margin(logits, torch.zeros(len(rows), device=logits.device))
            return top.token.tolist(), top.margin.tolist()
        found = _draw(logits, rows)
        return found.token.tolist(), found.margin.tolist()


def _draw(logits: torch.Tensor, rows: Sequence[StepRow]) -> Drawn:
    draws = [row.state.draw for row in rows]
    return draw(logits, packed(draws, [row.position + 1 for row in rows], logits.device))


def mislead(logits: torch.Tensor, row: StepRow) -> None:
    """Let the token that a seeded row would draw fall to the last place, in its logits [V]: another one is drawn."""
    found = _draw(logits.unsqueeze(0), [row])
    logits[found.token] = logits[torch.isfinite(logits)].min()
