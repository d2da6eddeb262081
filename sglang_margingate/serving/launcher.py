"""Hook functions that run in SGLang's launcher process: attestation, status page, request checks, response summary."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.request import RequestRules
from sglang_margingate.machine import versions

log = logging.getLogger(__name__)

_rules: RequestRules | None = None


class AttestationError(RuntimeError):
    """A scheduler started without margingate in it."""


def before_http_server(
    server_args: Any,
    tokenizer_manager: Any,
    template_manager: Any,
    port_args: Any,
    scheduler_infos: Any,
    *_: Any,
    **__: Any,
) -> None:
    """Refuse to serve unless every scheduler attested its hooks and self-test; add the status page."""
    config = _config()
    silent = [i for i, info in enumerate(scheduler_infos) if "margingate" not in info]
    if config.policy is not Policy.OFF and silent:
        raise AttestationError(
            f"scheduler {silent[0]} of {len(scheduler_infos)} runs without margingate: its plugin did not load. "
            "Check SGLANG_PLUGINS, and that sglang-margingate is installed where the scheduler runs"
        )
    _add_routes(tokenizer_manager, config)


def _config() -> MarginGateConfig:
    config = MarginGateConfig.from_env()
    if config is None:
        raise AttestationError(
            "the configuration is gone from the environment; start with sglang_margingate.launch_server"
        )
    return config


def _add_routes(tokenizer_manager: Any, config: MarginGateConfig) -> None:
    from sglang.srt.entrypoints.http_server import app

    async def status() -> dict[str, Any]:
        """Policy, thresholds, self-test, counters and versions of the running gate."""
        states = [] if config.policy is Policy.OFF else await tokenizer_manager.get_internal_state()
        ranks = [s["margingate"] for s in states if "margingate" in s]
        head = ranks[0] if ranks else {"policy": config.policy.value}
        return {**head, "ranks": len(ranks), "versions": versions()}

    app.add_api_route("/margingate/status", status, methods=["GET"])


def validate_request(_manager: Any, obj: Any, _input_ids: Any) -> None:
    """Check the margingate parameters of one request; SGLang answers a ValueError with HTTP 400."""
    global _rules
    if _rules is None:
        _rules = RequestRules(_config())
    params = getattr(obj, "sampling_params", None)
    if isinstance(params, dict):
        _rules.parse(params.get("custom_params"))


async def unpack_summary(original: Any, manager: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
    """Turn ``meta_info.margingate`` from SGLang's list per token into the request's one summary.

    The scheduler puts the summary on the last token; every other entry is None. Until it arrives, streamed chunks
    carry no ``margingate`` field.
    """
    async for out in original(manager, *args, **kwargs):
        meta = out.get("meta_info") if isinstance(out, dict) else None
        if meta is not None and isinstance(meta.get("margingate"), list):
            summaries = [item for item in meta["margingate"] if item is not None]
            if summaries:
                meta["margingate"] = summaries[-1]
            else:
                del meta["margingate"]
        yield out
