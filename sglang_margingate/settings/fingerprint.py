"""``system_fingerprint``: one short text for all that the bits of an answer stand on, and the parts that it is a digest of.

Two servers with equal fingerprints hold the same weights, run the same kernels of the same versions on the same kind of
machine, and keep their forwards in the same classes: a gated request gets the same answer from both. What cannot change a
gated answer (ports, logs, paths, batch limits, the size of the K/V pool) is in no part, so a restart or a replica is equal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from sglang_margingate.canonical.classes import Classes, FastPath
from sglang_margingate.canonical.ranks import digest
from sglang_margingate.config import MarginGateConfig
from sglang_margingate.machine import KERNEL_PACKAGES, kernel_environment, versions
from sglang_margingate.settings.clear import SET, clear_settings
from sglang_margingate.settings.neutral import neutral_fields

PREFIX = "mg-"

OURS = (
    "policy", "repair", "threshold", "profile", "verify_rows", "window", "fast_path", "prefill_graphs", "radix", "chunk",
)  # fmt: skip
"""Fields of our configuration that decide how a token is computed or what is verified."""

NEUTRAL_BUT_FELT = (
    "enable_fp32_lm_head", "sampling_defaults", "preferred_sampling_params", "chat_template", "hf_chat_template_name",
    "completion_template", "default_chat_template_kwargs", "allow_auto_truncate", "context_length", "reasoning_parser",
    "tool_call_parser", "constrained_json_whitespace_pattern", "constrained_json_disable_any_whitespace",
)  # fmt: skip
"""Settings of SGLang that break no claim and still change answers: what a prompt becomes, what a grammar allows, defaults. The
model's files and its tokenizer are parts of their own."""

FELT_ENVIRONMENT = ("SGLANG_RETURN_ORIGINAL_LOGPROB",)
"""Environment variables of SGLang that break no claim and still change answers: log-probabilities before the temperature."""

NOT_FELT = ("cuda_graph_config", "dp_size")
"""Settings that are watched for claims and change no gated answer by themselves: of graphs the back ends are a part of their own, since
their sizes only choose among numbers of rows of one class; and each scheduler gives the same answer."""

WHENCE = ("_name_or_path", "_commit_hash", "transformers_version")
"""Where a model's configuration was read from, and by what; sub-configurations have them as well."""

SURE_ROWS = 64
"""Numbers of rows up to this are probed whatever the largest batch or chunk may be."""

BLOCK_BYTES = 1 << 26
"""Weights are read in blocks of about this size: on a CPU the digest makes copies."""


class Fingerprint:
    """The fingerprint of one server; it changes with the weights.

    Parameters
    ----------
    parts
        What it is a digest of, but for the weights: plain types.
    weights
        Returns the digest of the weights that are loaded now.
    """

    def __init__(self, parts: dict[str, Any], weights: Callable[[], str]) -> None:
        self._weights = weights
        self.parts: dict[str, Any] = {"weights": weights(), **parts}
        self.value = PREFIX + digest(self.parts)

    def changed(self, why: str, readable: bool = True) -> None:
        """Read the weights again, and keep ``why``: nothing of the start-up checks was made with these.

        Parameters
        ----------
        why
            What happened to the weights, or to what is added to them.
        readable
            Whether there are any: their memory may have been given back.
        """
        try:
            weights = self._weights() if readable else "released"
        except Exception as error:  # whatever an update left half-way, no answer may carry the old fingerprint
            weights = f"unreadable ({type(error).__name__})"
        self.parts = {**self.parts, "weights": weights, "changes": [*self.parts.get("changes", ()), why]}
        self.value = PREFIX + digest(self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for status page and manifest."""
        return {"system_fingerprint": self.value, "parts": self.parts}


def parts_of(
    config: MarginGateConfig, args: Any, model: dict[str, Any], device: str, fast: FastPath | None
) -> dict[str, Any]:
    """Return the parts of a fingerprint, but for the weights.

    Parameters
    ----------
    config
        Ours, as the start-up left it.
    args
        SGLang's settings, resolved.
    model
        What is known of the model beside its weights: dtype, digests of its configuration and tokenizer.
    device
        ``cpu`` or ``cuda``.
    fast
        The canonical fast path.
    """
    found = kernel_environment(device)
    packages = {name: found[name] for name in KERNEL_PACKAGES if name in found}
    neutral = {*neutral_fields(), *NOT_FELT} - set(NEUTRAL_BUT_FELT)
    settings = {
        name: hidden(getattr(args, name)) if value == SET else value
        for name, value in clear_settings(args).items()
        if name not in neutral
    }
    return {
        "model": model,
        "machine": {name: value for name, value in found.items() if name not in packages},
        "versions": {**versions(), **packages},
        "classes": None if fast is None else classes_of(fast),
        "margingate": {name: plain(getattr(config, name)) for name in OURS},
        "sglang": settings | graph_backends(args) | {n: os.environ[n] for n in FELT_ENVIRONMENT if n in os.environ},
    }


def graph_backends(args: Any) -> dict[str, str]:
    """Return what captures the graphs of decodes and of prefills: another back end may run other kernels."""
    config = getattr(args, "cuda_graph_config", None)
    phases = {name: getattr(config, name, None) for name in ("decode", "prefill")}
    found = {name: getattr(phase, "backend", None) for name, phase in phases.items()}
    return {f"cuda_graph_backend_{name}": str(plain(value)) for name, value in found.items() if value is not None}


def classes_of(fast: FastPath) -> dict[str, Any]:
    """Return which classes forwards keep to, and what was found of them; nothing of when or how far it was probed.

    A layer's class is known by its smallest number of rows: how far the others go depends on the largest chunk and batch, and
    changes no bit. Captured sizes are numbers of rows of a class, or outside it, where nothing is promised of their bits.
    """
    classes, trial = fast.classes, fast.trial
    layers = [
        [
            layer.shape,
            layer.count,
            layer.head,
            layer.kind,
            _shared({m: k for m, k in layer.labels.items() if m <= SURE_ROWS}),
        ]
        for layer in classes.map.layers
    ]
    return {
        "map": digest(layers),
        "decode_class": _smallest(classes, decode=True),
        "prefill_class": _smallest(classes, decode=False),
        "head_class": min(classes.head.sizes, default=None),
        "verify_rows": classes.verify_rows,
        "decode_attention": trial.decode_attention,
        "prefill_attention": trial.prefill_attention,
        "decode_ok": trial.decode_ok,
        "prefill": trial.prefill,
    }


def _smallest(classes: Classes, decode: bool) -> list[int | None]:
    """Return the smallest number of rows of each layer's class; the head has one for decodes and prefills, which is told apart."""
    pairs = zip(classes.map.layers, classes.own(decode))
    return [min(own.sizes, default=None) for layer, own in pairs if not layer.head]


def _shared(labels: dict[int, int | None]) -> list[list[int | None]]:
    """Return each number of rows with the smallest one that shares its bits, None where it shares none: no matter how classes are numbered."""
    smallest: dict[int, int] = {}
    return [[m, k if k is None else smallest.setdefault(k, m)] for m, k in sorted(labels.items())]


def hidden(value: Any) -> str:
    """Return a digest in the place of a setting that is not shown, of a file what it holds; of an object without a text, its type."""
    text = str(value)
    if isinstance(value, str) and os.path.isfile(value):
        with open(value, "rb") as file:  # a template: where it lies makes no difference
            text = file.read().decode(errors="replace")
    return type(value).__name__ if " at 0x" in text else f"<{digest(text)}>"


def plain(value: Any) -> Any:
    """Return a value of our configuration as JSON holds it; a profile by its digest."""
    value = getattr(value, "value", value)
    return digest(value) if isinstance(value, dict) else value


def model_facts(dtype: object, config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what is known of a model beside its weights.

    Parameters
    ----------
    dtype
        Of the loaded model.
    config
        The model's configuration (a Hugging Face ``PretrainedConfig``); where it was read from makes no difference.
    tokenizer
        What turns prompts into tokens; None where requests bring tokens.
    """
    about = _without(config.to_dict() if hasattr(config, "to_dict") else {}, WHENCE)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else repr(sorted(getattr(tokenizer, "get_vocab", dict)().items()))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "config": digest(about),
        "tokenizer": None if tokenizer is None else digest([words, getattr(tokenizer, "chat_template", None)]),
    }


def _without(value: Any, names: Sequence[str]) -> Any:
    """Return plain types without the named fields, at any depth; of an object that describes itself, its type.

    SGLang puts a model's configuration into the description of its own quantisation.
    """
    if isinstance(value, dict):
        return {name: _without(part, names) for name, part in value.items() if name not in names}
    if isinstance(value, (list, tuple)):
        return [_without(part, names) for part in value]
    return type(value).__name__ if hasattr(value, "to_dict") else value


def weights_digest(model: Any) -> str:
    """Return a digest of every parameter and buffer of a model: name, type, shape and bits; the same on any device."""
    import torch
    from margingate_kernels import row_digest

    named = [*model.named_parameters(), *model.named_buffers()]
    about = [(name, str(tensor.dtype), list(tensor.shape)) for name, tensor in named]
    with torch.no_grad():
        values = [row_digest(_rows_digest(tensor)[None]) for _, tensor in named]
        bits = torch.cat([value.cpu() for value in values]).tolist() if values else []
    return digest([about, bits])


def _rows_digest(tensor: Any) -> Any:
    """Return the digest of each row of a tensor, [rows] int64; a vector and a number are one row."""
    import torch
    from margingate_kernels import row_digest

    rows = tensor.detach().contiguous()
    rows = rows.reshape(1, -1) if rows.dim() < 2 else rows.flatten(1)
    size = max(1, rows.shape[1] * rows.element_size())
    return torch.cat([row_digest(block) for block in rows.split(max(1, BLOCK_BYTES // size))])


def differing(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Return what differs between two fingerprints' parts, a line each: ``machine.driver: 570.1, here 580.2``."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = sorted({*theirs, *ours})
        return [line for n in names for line in differing(theirs.get(n), ours.get(n), f"{path}.{n}" if path else n)]
    return [] if theirs == ours else [f"{path}: {_short(theirs)}, here {_short(ours)}"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
