"""Which SGLang and which of its configurations are supported, and what happens with the others.

Everything outside what was tested is refused with the reason and the flag that overrides it at guarantee `none`. The tables
stand in :mod:`~sglang_margingate.settings.rules` and :mod:`~sglang_margingate.settings.neutral`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from packaging.tags import parse_tag, sys_tags

from sglang_margingate.config import ConfigError, MarginGateConfig, Policy, Radix
from sglang_margingate.settings import models
from sglang_margingate.settings.clear import clear_value, declared_defaults
from sglang_margingate.settings.neutral import neutral_fields
from sglang_margingate.settings.rules import ENVIRONMENT, RULES, EnvRule, Rule, ruled_fields

OVERRIDE = "--margingate-allow-untested"

TESTED = ("0.5.17", "0.5.20", "0.5.23")
"""Versions of SGLang that every test of this project ran on."""

PLUGIN = "margingate"
"""Our own name among SGLang's plugins."""

ATTENTION_FLAGS = ("--attention-backend", "--prefill-attention-backend", "--decode-attention-backend")

OLDEST_GPU = (8, 0)
"""Compute capability: the first with bf16 matrix units, which FlashInfer's tensor-core decode needs."""

_ABSENT = object()
_UNREAD = "what it changes was not reviewed"


def check_host(config: MarginGateConfig) -> list[str]:
    """Check what stands around SGLang: its version, other plugins, and variables that choose kernels.

    Needs no import of SGLang, so that a version that cannot even be imported is refused in one line.

    Returns
    -------
    list of str
        Notes that lower every guarantee of this server to none.

    Raises
    ------
    ConfigError
        The host is outside what was tested and the override flag was not given.
    """
    if config.policy is Policy.OFF:
        return []
    version = version_trouble()
    if version and not config.allow_untested:
        raise ConfigError(f"{version}. Install one of them, or add {OVERRIDE} to serve at guarantee none")
    wrong = [(rule, name) for rule in ENVIRONMENT for name in rule.names if _is_set(rule, name)]
    for rule, name in wrong:
        if rule.absolute:
            raise ConfigError(f"{name}={_shown(os.environ[name])}: {rule.why}. Unset it")
    if not config.policy.verifies:
        return [version] if version else []
    broken = [f"{name}: {rule.why}" for rule, name in wrong]  # no value: notes are written down
    if wrong and not config.allow_untested:
        name = wrong[0][1]
        raise ConfigError(
            f"{name}={_shown(os.environ[name])}: {wrong[0][0].why}. Unset it, or add {OVERRIDE} to serve it at guarantee none{_more(broken)}"
        )
    others = _other_plugins()
    if others:
        broken.append(f"SGLang plugin {others[0]}: what it changes was not reviewed")
        if not config.allow_untested:
            raise ConfigError(
                f"{broken[-1]}. Set SGLANG_PLUGINS={PLUGIN} to load ours alone, or add {OVERRIDE} to serve at guarantee none"
            )
    return [version, *broken] if version else broken


def version_trouble() -> str | None:
    """Return why the SGLang that would be imported is not one of the tested, or None."""
    tested = f"tested: {', '.join(TESTED)}"
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return f"SGLang is not installed here ({tested})"
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    try:
        found = metadata.distribution("sglang")
    except metadata.PackageNotFoundError:
        return f"the SGLang in {folder} has no metadata, so its version is unknown ({tested})"
    if Path(str(found.locate_file("sglang"))).resolve() != folder:
        return (
            f"two SGLangs are on the path: {folder} is imported, but the metadata, {found.version}, is of another in "
            f"{Path(str(found.locate_file(''))).resolve()} ({tested})"
        )
    if not _fits_this_python(found):
        return (
            f"SGLang {found.version} in {folder.parent} was made for another Python than this {platform.python_version()} "
            f"({tested})"
        )
    return None if found.version in TESTED else f"SGLang {found.version} is not among the versions tested ({tested})"


def _fits_this_python(found: metadata.Distribution) -> bool:
    """Return whether a SGLang, which brings compiled parts, was installed for this Python: an overlay may be another's."""
    required = SpecifierSet((found.metadata.get_all("Requires-Python") or [""])[0])
    if not required.contains(platform.python_version(), prereleases=True):
        return False
    wheel = (found.read_text("WHEEL") or "").splitlines()
    made_for = {tag for line in wheel if line.startswith("Tag: ") for tag in parse_tag(line.removeprefix("Tag: "))}
    here = {(tag.interpreter, tag.abi) for tag in sys_tags()}
    return not made_for or any((tag.interpreter, tag.abi) in here for tag in made_for)


def _other_plugins() -> list[str]:
    """Name the plugins other than ours that SGLang will load."""
    allowed = {name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()}
    names = {entry.name for entry in metadata.entry_points(group="sglang.srt.plugins")} - {PLUGIN}
    return sorted(names & allowed if allowed else names)


def _is_set(rule: EnvRule, name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in rule.fine and name in os.environ


def check_server_args(args: Any, config: MarginGateConfig) -> list[str]:
    """Return the notes that lower every guarantee of this server to none; raise where it must not start.

    Raises
    ------
    ConfigError
        The configuration is outside what was tested and the override flag was not given.
    """
    if config.policy is Policy.OFF:
        return []
    broken = [(rule, name) for rule in RULES for name in rule.fields if not _fine(rule, name, args, config)]
    for rule, name in broken:
        if rule.absolute:
            raise ConfigError(f"{_flag(name, args)}: {rule.why}. {rule.fix.capitalize() or 'Leave it out'}")
    if not config.policy.verifies:
        return []
    unreviewed = _unreviewed(args)
    notes = [f"{_noted(name, args)}: {rule.why}" for rule, name in broken]
    notes += [f"{_noted(name, args)}: {_UNREAD}" for name in unreviewed]
    if notes and not config.allow_untested:
        name, why = (broken[0][1], broken[0][0].why) if broken else (next(iter(unreviewed)), _UNREAD)
        fix = (broken[0][0].fix if broken else "") or "leave it out"
        raise ConfigError(
            f"{_flag(name, args)}: {why}. {fix[0].upper()}{fix[1:]}, or add {OVERRIDE} to serve it at guarantee none"
            f"{_more(notes)}"
        )
    size = args.chunked_prefill_size
    if size is not None and 0 < size < config.chunk:
        raise ConfigError(
            f"--chunked-prefill-size {size} is smaller than --margingate-chunk {config.chunk}: chunks would leave their "
            f"grid; raise it to {config.chunk} or lower --margingate-chunk"
        )
    if config.radix is Radix.STOCK:
        notes.append("--margingate-radix stock: a prefix hit may change output")
    return notes


def _fine(rule: Rule, name: str, args: Any, config: MarginGateConfig) -> bool:
    value = getattr(args, name, _ABSENT)  # another version of SGLang may lack the setting
    return value is _ABSENT or rule.accepts(value, args, config)


def _unreviewed(args: Any) -> list[str]:
    """Name the settings that no list knows and that are not at their default: those of a newer SGLang."""
    known = neutral_fields().union(ruled_fields())
    declared = declared_defaults(args) or {}
    return [name for name, default in declared.items() if name not in known and getattr(args, name) != default]


def _flag(name: str, args: Any) -> str:
    """Return the flag with its value, for the one who just gave it."""
    value = getattr(args, name)
    shown = f" {_shown(value)}" if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    return f"--{name.replace('_', '-')}{shown}"


def _noted(name: str, args: Any) -> str:
    """Return the flag for notes, which are written down: with its value only where that cannot hold a secret."""
    value = clear_value(name, getattr(args, name))
    return f"--{name.replace('_', '-')}" + ("" if value is None or isinstance(value, bool) else f" {value}")


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _more(broken: list[str]) -> str:
    return f" ({len(broken) - 1} more like it)" if len(broken) > 1 else ""


def check_model(model_runner: Any, config: MarginGateConfig) -> list[str]:
    """Check what only the loaded model tells: its kind and dtype. Same contract as :func:`check_server_args`."""
    hf = model_runner.model_config.hf_config
    broken: list[str] = []
    method = models.quantised_by(hf, getattr(model_runner.model_config, "quantization", None))
    broken += models.experts_trouble(hf, method)
    broken += models.quantised_trouble(hf, method, model_runner.device)
    dtype = str(model_runner.dtype).removeprefix("torch.")
    if dtype != "bfloat16":
        broken.append(f"a model served in {dtype}: only bfloat16 was tested (--dtype bfloat16)")
    if getattr(model_runner.model_config, "is_multimodal", False):
        broken.append("a model of images or sound: its prompts were never tested")
    if type(model_runner.model).__name__.startswith("Transformers"):
        broken.append("a model that SGLang serves with transformers' layers: they are neither padded nor probed")
    if model_runner.is_hybrid_swa or type(model_runner.token_to_kv_pool).__name__ != "MHATokenToKVPool":
        broken.append(f"K/V pool {type(model_runner.token_to_kv_pool).__name__}: only MHATokenToKVPool was tested")
    if model_runner.device != "cpu":
        found = torch.cuda.get_device_capability()
        if found < OLDEST_GPU:
            broken.append(
                f"a GPU of compute capability {found[0]}.{found[1]}: the gate's kernels need 8.0 (Ampere) or newer"
            )
    if broken and config.policy.verifies and not config.allow_untested:
        raise ConfigError(f"{broken[0]}. Add {OVERRIDE} to serve it at guarantee none")
    return broken if config.policy.verifies else []
