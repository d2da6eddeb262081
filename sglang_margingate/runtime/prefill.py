"""Prefill rules: what keeps prompt columns canonical, and what is noted when it was not.

The canonical recipe (``isolated``): a gated request's prompt is prefilled alone, in chunks of C tokens on a fixed grid,
so that chunk j always has the same rows and the same prefix [0, jC), whatever else waits and whatever was cached::

    prompt of 150, C = 64      [0, 64) [64, 128) [128, 150)

Re-prefill after a retraction stops at the prompt's end too, so the prompt's chunks keep their shapes; the generated
columns behind it are recomputed by a verify (:attr:`Reason.RESUME`). Requests that did not ask for determinism are
batched as usual.

Where the canonical fast path has shown that prefill depends on neither companions, chunking nor prefix hits (``batched``),
SGLang batches and chunks as it likes, hits are used in full, and a request is only noted when a forward left the class.
"""

from __future__ import annotations

from typing import NamedTuple

from sglang_margingate.canonical.shape import ForwardShape


class Chunk(NamedTuple):
    """One request's part of a prefill forward: positions [prefix, end)."""

    prefix: int
    end: int
    prompt: int
    """Tokens of the request's prompt; what lies behind was generated before a retraction."""
    generated: tuple[int, ...] = ()
    """Tokens of the output so far: empty but for a retracted request."""
    cached: int = 0
    """Prompt tokens taken from the prefix cache."""

    @property
    def last(self) -> bool:
        """Whether the request's prefill ends with it, so that its logits choose a token."""
        return self.end >= self.prompt + len(self.generated)


class PrefillRules:
    """Keeps gated requests' prefill chunks on the canonical grid, and says what left it.

    Parameters
    ----------
    chunk
        Tokens of a canonical chunk, C.
    isolated
        Whether gated prompts keep to the grid, one at a time; False: they are batched.
    """

    def __init__(self, chunk: int, isolated: bool = True) -> None:
        self.chunk, self.isolated = chunk, isolated

    def chunk_limit(self, prefix: int, prompt: int) -> int | None:
        """Return the most tokens the next chunk may have, or None where any number is fine.

        Parameters
        ----------
        prefix
            Tokens already in K/V.
        prompt
            Tokens of the prompt; what lies behind was generated before a retraction.
        """
        if prefix >= prompt:
            return None
        return min(self.chunk - prefix % self.chunk, prompt - prefix)

    def why_not_canonical(self, chunk: Chunk, requests: int, shape: ForwardShape | None) -> str | None:
        """Return why a chunk's columns are not canonical, or None where they are.

        Parameters
        ----------
        chunk
            The request's part of the forward.
        requests
            Requests that the forward held.
        shape
            What the forward ran at; None where nobody saw it.
        """
        if not self.isolated:
            inside = shape is not None and shape.in_class
            return None if inside else "a prefill forward ran outside the canonical class"
        if requests > 1:
            return "a prompt chunk shared its forward with another request"
        limit = self.chunk_limit(chunk.prefix, chunk.prompt)
        if limit is not None and (chunk.prefix % self.chunk or chunk.end - chunk.prefix != limit):
            # Memory pressure may shrink a chunk (PrefillAdder.add_chunked_req).
            return f"prompt chunk [{chunk.prefix}, {chunk.end}) left the grid of {self.chunk}"
        return None
