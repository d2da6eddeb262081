"""How one summary of a request travels through SGLang's ``customized_info``, which is a list of values per token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FIELD = "margingate"
"""Name of the summary in ``customized_info``, in ``meta_info`` and in OpenAI answers."""


FINGERPRINT = "system_fingerprint"
"""Name of the fingerprint in a summary, and of OpenAI's own field."""


class PerRequest(list[Any]):
    """One value for the whole request where SGLang expects one value per token.

    SGLang sends the slice of the tokens that it has not sent yet. With a request's last message that slice may be empty:
    no token was asked for, the request was aborted, or a stop string took tokens back. Every slice of this list is the
    value.
    """

    def __getitem__(self, index: Any) -> Any:
        """Return the value for any slice of tokens."""
        return list(self) if isinstance(index, slice) else super().__getitem__(index)


def last_of(values: Iterable[Any]) -> dict[str, Any] | None:
    """Return the summary among the values that arrived so far, None before the request has ended."""
    return next((value for value in reversed(list(values)) if value is not None), None)
