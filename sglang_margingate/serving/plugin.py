"""Entry point ``sglang.srt.plugins``: registers the hooks of this process. Inert without a configuration."""

from __future__ import annotations

import logging

from sglang_margingate.config import MarginGateConfig

log = logging.getLogger(__name__)

_loaded = False


def load() -> None:
    """Register this process's hooks with SGLang. Idempotent.

    Without :data:`~sglang_margingate.config.CONFIG_ENV` nothing happens: having the package installed must not change
    a server that did not ask for it.
    """
    global _loaded
    config = MarginGateConfig.from_env()
    if _loaded or config is None:
        return
    _loaded = True
    from sglang_margingate.serving import hook_table, hooks, radix

    hooks.install(hook_table.wanted(config, hooks.role()))
    radix.register(config)
