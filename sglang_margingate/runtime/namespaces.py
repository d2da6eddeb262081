"""Names of the radix backend and of its name spaces, importable before SGLang is."""

from __future__ import annotations

import json
from typing import Any

from sglang_margingate.config import MarginGateConfig, Radix

BACKEND_NAME = "margingate"

GATED, UNGATED = "gated", "ungated"


def uses_backend(config: MarginGateConfig) -> bool:
    """Return whether this configuration serves with the canonical radix cache."""
    return config.policy.verifies and config.radix in (Radix.CANONICAL, Radix.PROMPT_ONLY)


def namespace(gated: bool, extra_key: Any, lora_id: str | None = None, weights: int = 0) -> str:
    """Return the name space of one request, SGLang's ``extra_key``.

    Every request gets one made here, whatever its client sent, and JSON escapes what the client sent: no key of a client
    can name the other side, another adapter or other weights.

    Parameters
    ----------
    gated
        Whether the request was opened as one that asks for determinism.
    extra_key
        The client's key, with the adapter's id behind it as SGLang puts it there.
    lora_id
        The adapter's id.
    weights
        How often the server's weights were changed: columns of other weights are never shared between gated requests.
    """
    key = extra_key
    if lora_id and isinstance(key, str):
        key = key.removesuffix(lora_id)
    return json.dumps([GATED if gated else UNGATED, weights if gated else 0, lora_id, key or None])


def opened_gated(name: str | None) -> bool:
    """Return whether a name space made by :func:`namespace` is one of gated requests."""
    return name is not None and name.startswith(f'["{GATED}"')
