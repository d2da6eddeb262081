"""What a run's manifest says of the server that wrote it: enough to repeat the run, nothing that opens a door."""

from __future__ import annotations

import json
from typing import Any

from sglang_margingate.canonical.classes import FastPath
from sglang_margingate.canonical.selftest import SelfTestResult
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.machine import device_name, model_name, versions
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.settings.clear import clear_settings, clear_value, without_credentials


def server_facts(
    args: Any, dtype: object, self_test: SelfTestResult | None = None, fast: FastPath | None = None
) -> dict[str, Any]:
    """Return what the start of a server found, for the status page and the manifest.

    Parameters
    ----------
    args
        SGLang's ``ServerArgs``, resolved.
    dtype
        Of the loaded model.
    self_test, fast
        The self-test's result and the canonical fast path.
    """
    return {
        "model": model_name(without_credentials(str(args.model_path))),
        "dtype": str(dtype).removeprefix("torch."),
        "attention_backend": clear_value("attention_backend", args.attention_backend),
        "device": device_name(args.device),
        "self_test": None if self_test is None else self_test.to_dict(),
        "invariance": None if fast is None else fast.to_dict(),
    }


def run_facts(config: MarginGateConfig, args: Any, facts: dict[str, Any], attached: list[str]) -> dict[str, Any]:
    """Return the manifest of a run, but for what the writer itself adds.

    Parameters
    ----------
    config
        Ours; its paths and its profile are written as they are.
    args
        SGLang's settings, written by :func:`~sglang_margingate.settings.clear.clear_settings`.
    facts
        :func:`server_facts`.
    attached
        The hooks in place.
    """
    return {
        **facts,
        "model_path": without_credentials(str(args.model_path)),
        "policy": config.policy.value,
        "repair": config.repair.value,
        "threshold": config.threshold,
        "versions": versions(),
        "flags": {"margingate": json.loads(config.to_json()), "sglang": clear_settings(args)},
        "profile": config.profile,
        "hooks": attached,
        "notes": list(config.notes),
        "test_knobs": TestKnobs().active,
    }
