"""What one forward did, as it was seen: a value of that forward, which travels on its batch."""

from __future__ import annotations

from typing import NamedTuple


class ForwardShape(NamedTuple):
    """The shape that one forward really ran at.

    Parameters
    ----------
    rows
        Requests of a decode, tokens of a prefill.
    padded
        Rows of its widest linear layer or bank of experts; None where nobody saw it.
    in_class
        Whether every layer of it was seen to run inside its class.
    """

    rows: int
    padded: int | None
    in_class: bool
