"""What a calibration belongs to: model, dtype, back end, device and versions of the server that it was made on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from sglang_margingate.bench.servers.client import Client, ServerError


class Binding(NamedTuple):
    """The facts that a profile is bound to; ``unknown`` where a remote server does not tell."""

    model: str
    dtype: str
    attention_backend: str
    device: str
    sglang_version: str
    torch_version: str
    repair: str


def read_binding(client: Client, status: dict[str, Any]) -> Binding:
    """Return the running server's facts: from its status, its run's manifest where the folder is here, or SGLang."""
    manifest = _manifest(status)
    try:
        info = client.get("/server_info")
    except ServerError:
        info = {}
    versions = status.get("versions") or {}

    def fact(name: str, fallback: Any) -> str:
        return str(status.get(name) or manifest.get(name) or fallback or "unknown")

    return Binding(
        model=fact("model", _model(info)),
        dtype=fact("dtype", info.get("dtype")),
        attention_backend=fact("attention_backend", info.get("attention_backend")),
        device=fact("device", info.get("device")),
        sglang_version=str(versions.get("sglang") or info.get("version") or "unknown"),
        torch_version=str(versions.get("torch") or "unknown"),
        repair=str(status.get("repair") or "unknown"),
    )


def _manifest(status: dict[str, Any]) -> dict[str, Any]:
    path = (status.get("trace") or {}).get("path")
    if not path or not Path(path).is_dir():
        return {}
    from sglang_margingate.trace import read_manifest
    from sglang_margingate.trace.errors import TraceError

    try:
        return read_manifest(path)
    except TraceError:
        return {}


def _model(info: dict[str, Any]) -> str:
    from sglang_margingate.bench.prompts.template import EMBEDDED_MODEL, is_embedded

    path = str(info.get("model_path") or "")
    return EMBEDDED_MODEL if path and is_embedded(path) else path.rstrip("/").rpartition("/")[2]
