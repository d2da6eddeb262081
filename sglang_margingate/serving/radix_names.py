"""Names of the radix backend, importable before SGLang is."""

from __future__ import annotations

from sglang_margingate.config import MarginGateConfig, Radix

BACKEND_NAME = "margingate"

FAST_NAMESPACE = "margingate:fast"
"""Name space of requests that did not ask for determinism."""


def uses_backend(config: MarginGateConfig) -> bool:
    """Return whether this configuration serves with the canonical radix cache."""
    return config.policy.verifies and config.radix in (Radix.CANONICAL, Radix.PROMPT_ONLY)


def namespace(extra_key: str | None) -> str:
    """Return the name space of a request that did not ask for determinism, within its own ``extra_key``."""
    return FAST_NAMESPACE if extra_key is None else f"{FAST_NAMESPACE}:{extra_key}"
