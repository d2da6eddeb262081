"""Margin bins that respect the bf16 grid, so that a histogram shows the data and not the rounding."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LOGARITHMIC = "log"
LINEAR = "linear"


class Bins(NamedTuple):
    """Edges, and where each bin is drawn; with the log scale, exact ties have the first bin for themselves."""

    edges: np.ndarray
    """``n + 1`` rising numbers in logits; bin i holds margins in ``[edges[i], edges[i + 1])``."""
    centres: np.ndarray
    drawn: np.ndarray
    """The edges as drawn: a logarithmic axis has no zero, so the ties' bin gets a place left of the others."""
    grid: float
    """Spacing of the margins in the data; 0 where they lie on no grid (fp32 logits)."""


def margin_grid(margins: np.ndarray) -> float:
    """Return the largest power of two in [2**-12, 1] of which nearly all low margins are multiples, or 0.

    bf16 has 8 significant bits: logits in [8, 16) are 2**-4 apart, and so are their differences. Only low margins tell
    the grid: a runner-up far below the top lies on a finer grid of its own.
    """
    positive = margins[np.isfinite(margins) & (margins > 0)]
    if positive.size == 0:
        return 0.0
    count = min(positive.size, max(200, positive.size // 50))
    low = np.partition(positive, count - 1)[:count].astype(np.float64)
    for power in range(0, -13, -1):
        grid = 2.0**power
        if np.mean(np.abs(low / grid - np.round(low / grid)) < 1e-6) >= 0.9:
            return grid
    return 0.0


def margin_bins(margins: np.ndarray, scale: str = LOGARITHMIC, count: int = 64) -> Bins:
    """Return bins for a histogram of margins.

    Parameters
    ----------
    margins
        Margins in logits, 0 or more, in any order.
    scale
        ``"log"``: one bin for exact ties, then equal ratios. ``"linear"``: equal widths up to the 99.5th percentile,
        the rest in the last bin.
    count
        About how many bins.

    Notes
    -----
    Where the data lie on a grid, every edge lies midway between two grid points and no bin is narrower than the grid:
    otherwise bins would hold one grid value here and two there, and the histogram would look like a comb.
    """
    finite = margins[np.isfinite(margins)]
    grid = margin_grid(finite)
    top = float(finite.max()) if finite.size else 1.0
    top = max(top, 4 * grid, 1e-3)
    if scale == LINEAR:
        body = max(float(np.quantile(finite, 0.995)) if finite.size else 1.0, 4 * grid, 1e-3)
        width = body / count
        if grid:
            width = max(1, round(width / grid)) * grid
            edges = np.arange(-grid / 2, body + width, width)
        else:
            edges = np.arange(0.0, body + width, width)
        edges[-1] = max(edges[-1], np.nextafter(top, np.inf))
        centres = edges[:-1] + width / 2
        return Bins(edges, centres, edges, grid)
    positive = finite[finite > 0]
    low = grid if grid else max(float(np.quantile(positive, 0.001)) if positive.size else 1e-3, 1e-4)
    edges = np.geomspace(low, max(top, 2 * low) * 1.001, count + 1)
    if grid:
        edges = (np.unique(np.round(edges / grid)) - 0.5) * grid
        edges = np.append(edges, edges[-1] + max(grid, edges[-1] - edges[-2])) if edges[-1] <= top else edges
    # One bin for exact ties, [0, half a grid step) or [0, smallest positive), and one for what lies below `low`.
    ties = edges[0] if grid else np.nextafter(0.0, 1.0)
    rest = edges[1:] if grid else edges
    edges = np.concatenate([[0.0, ties], rest])
    drawn = np.concatenate([[ties / 2, ties] if grid else [low / 4, low / 2], rest])
    return Bins(edges, np.sqrt(drawn[:-1] * drawn[1:]), drawn, grid)


def counts(bins: Bins, margins: np.ndarray) -> np.ndarray:
    """Return how many of these rising margins fall into each bin; the outer bins are open."""
    below = np.searchsorted(margins, bins.edges[1:-1], side="left")
    return np.diff(np.concatenate([[0], below, [margins.size]]))
