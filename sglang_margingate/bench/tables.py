"""Tables of results, as plain text or as Markdown that is aligned as plain text, too; never cut, whatever the terminal."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

from rich.box import MARKDOWN, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 10_000


def text(head: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """Return a table as plain text.

    Parameters
    ----------
    left
        Columns whose cells begin at the left; the others hold numbers and end at the right.
    """
    return "\n".join(_lines(head, rows, left, None))


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int] = (0,)) -> str:
    """Return a table as Markdown; ``left`` as in :func:`text`."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = _lines(head, cells, left, MARKDOWN)
    # rich's rule has no colons, which make Markdown's readers align numbers, and no space beside the bars.
    widths = [len(dashes) - 2 for dashes in lines[1].strip("|").split("|")]
    marks = ["-" * w if i in left else "-" * max(1, w - 1) + ":" for i, w in enumerate(widths)]
    lines[1] = f"| {' | '.join(marks)} |"
    return "\n".join(lines)


def _lines(head: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int], box: Box | None) -> list[str]:
    table = Table(box=box, show_edge=box is not None, pad_edge=box is not None, padding=(0, 1), collapse_padding=False)
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    out = io.StringIO()
    Console(file=out, width=WIDE, color_system=None, legacy_windows=False).print(table)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
