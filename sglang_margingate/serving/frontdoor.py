"""The front door's work: our flags, sensible SGLang defaults for this machine, and a start that fails closed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sglang_margingate import config as cfg
from sglang_margingate.config import ConfigError, FastPathMode, MarginGateConfig, Policy, Radix, Repair
from sglang_margingate.serving.cpu import is_cpu_host

ON_OFF = ("on", "off")

CPU_POOL_TOKENS = 65536
"""K/V pool on a CPU; SGLang's own choice would take 17 GB of memory."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(message)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our own flags."""
    p = _Parser(
        prog="python -m sglang_margingate.launch_server",
        description="Serve a model with stock SGLang and margingate's plugin. Any SGLang flag may be added; "
        "SGLang's own list follows ours.",
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument_group("margingate").add_argument
    add(
        "--margingate-policy",
        choices=[m.value for m in Policy],
        default=Policy.GATE.value,
        help="off: stock SGLang. log: record margins. gate: verify steps with margin <= threshold. always: verify every step",
    )
    add(
        "--margingate-repair",
        choices=[m.value for m in Repair],
        default=Repair.WINDOW.value,
        help="K/V columns that a verify puts in place: the current one, or all since the request's last verify",
    )
    add(
        "--margingate-threshold",
        type=float,
        metavar="LOGITS",
        default=None,
        help=f"threshold on the top-1/top-2 margin, in logits; without it and without a profile {cfg.DEFAULT_THRESHOLD}",
    )
    add("--margingate-profile", metavar="FILE", default=None,
        help="thresholds per dataset, from `margingate calibrate`; an entry whose sample is too small is not used")  # fmt: skip
    add("--margingate-audit-rate", type=float, metavar="SHARE", default=0.0,
        help="share of untriggered steps, 0 to 1, that are verified for the record to bound the missed-flip rate")  # fmt: skip
    add(
        "--margingate-max-miss",
        type=float,
        metavar="SHARE",
        default=None,
        help="drop the guarantee to none when the audit's 95%% upper bound of missed flips exceeds this share; needs the "
        "policy gate and an audit rate above 0",
    )
    add(
        "--margingate-verify-rows",
        type=int,
        metavar="ROWS",
        default=None,
        help=f"rows of every verify pass (the canonical M): {cfg.DEFAULT_VERIFY_ROWS_CPU} on a CPU, "
        f"{cfg.DEFAULT_VERIFY_ROWS_GPU} on a GPU",
    )
    add(
        "--margingate-window",
        type=int,
        metavar="ROWS",
        default=None,
        help="most columns of a request that stand open before a verify is forced (reason `limit`); without it the verify "
        "rows: fewer cost more passes, more cost a longer wait at the next trigger",
    )
    add(
        "--margingate-fast-path",
        choices=[m.value for m in FastPathMode],
        default=None,
        help="canonical: run ordinary forwards only at shapes probed to give a row the same bits (tried at start-up); "
        "steps inside them need no verify. Without it: canonical on a GPU with the policy gate, else stock",
    )
    add("--margingate-prefill-graphs", choices=ON_OFF, default="on",
        help="on a GPU, replay prefills of the canonical fast path from CUDA graphs; off: run them eagerly, with the same bits")  # fmt: skip
    add("--margingate-prefill-attention", choices=[m.value for m in cfg.PrefillKind], default="auto",
        help="what attends in prefills on a GPU: FlashAttention-3 (fa3) or our kernel; auto: fa3 where it was tried and holds")  # fmt: skip
    add(
        "--margingate-map-dir",
        metavar="DIR",
        default=cfg.default_map_dir(),
        help="folder that keeps what the canonical fast path probed, one readable JSON file per machine, layer shapes and "
        "probed rows; a kept map is spot-checked at every start, and probed anew where hardware or versions differ. "
        f"{cfg.MAP_DIR_OFF}: probe at every start",
    )
    add(
        "--margingate-radix",
        choices=[m.value for m in Radix],
        default=None,
        help="what the prefix cache may share. canonical: what was probed to be canonical. prompt-only: whole prompt chunks. "
        "stock: SGLang's cache, at guarantee none. off: nothing, as --disable-radix-cache. Without it canonical",
    )
    add(
        "--margingate-chunk",
        type=int,
        metavar="TOKENS",
        default=None,
        help="tokens of a canonical prefill chunk (C); prefix hits are floored to multiples of it: "
        f"{cfg.DEFAULT_CHUNK_CPU} on a CPU, {cfg.DEFAULT_CHUNK_GPU} on a GPU",
    )
    add("--margingate-trace-dir", metavar="DIR", default="traces", help="folder that gets one folder per run")
    add("--margingate-trace", choices=ON_OFF, default="on", help="write the trace of every step")
    add("--margingate-trace-text", choices=ON_OFF, default="off", help="also record prompts and token texts")
    add(
        "--margingate-trace-keep",
        metavar="KEEP",
        default=cfg.DEFAULT_KEEP,
        help="what is kept of finished runs in the trace folder: an age (h, d, w), a size (MB, GB, TB), or both with a comma; "
        f"{cfg.KEEP_OFF}: everything",
    )
    add(
        "--margingate-allow-untested",
        action="store_true",
        help="serve versions of SGLang, settings and models outside what was tested, at guarantee none",
    )
    add("-h", "--help", action="store_true", help="show this and SGLang's flags")
    return p


def parse(argv: list[str]) -> tuple[MarginGateConfig, list[str], bool]:
    """Split the command line into our configuration and SGLang's flags; the third value asks for help.

    Raises
    ------
    ConfigError
        One line that names the flag, the value and the fix.
    """
    ours, rest = build_parser().parse_known_args(argv)
    stray = [a for a in rest if a.startswith("--margingate-")]
    if stray:
        raise ConfigError(f"{stray[0]}: unknown flag; see --help")
    if ours.help:
        return MarginGateConfig(), rest, True
    cpu = _on_cpu(rest)
    profile = None
    if ours.margingate_profile is not None:
        from sglang_margingate.gate.profile import load_profile

        profile = load_profile(ours.margingate_profile).to_dict()
    rows, chunk = ours.margingate_verify_rows, ours.margingate_chunk
    if cpu and ours.margingate_prefill_attention != "auto":
        raise ConfigError("--margingate-prefill-attention: a CPU has SGLang's own attention only; leave it out")
    config = MarginGateConfig(
        policy=ours.margingate_policy,
        repair=ours.margingate_repair,
        threshold=ours.margingate_threshold,
        profile=profile,
        audit_rate=ours.margingate_audit_rate,
        max_miss=ours.margingate_max_miss,
        verify_rows=rows if rows is not None else cfg.DEFAULT_VERIFY_ROWS_CPU if cpu else cfg.DEFAULT_VERIFY_ROWS_GPU,
        fast_path=FastPathMode(ours.margingate_fast_path or default_fast_path(ours.margingate_policy, cpu)),
        prefill_graphs=ours.margingate_prefill_graphs == "on",
        prefill_attention=ours.margingate_prefill_attention,
        map_dir=_map_dir(ours.margingate_map_dir),
        window=ours.margingate_window,
        radix=_radix(ours.margingate_radix, rest),
        chunk=chunk if chunk is not None else cfg.DEFAULT_CHUNK_CPU if cpu else cfg.DEFAULT_CHUNK_GPU,
        trace=ours.margingate_trace == "on",
        trace_dir=str(Path(ours.margingate_trace_dir).resolve()),
        trace_text=ours.margingate_trace_text == "on",
        trace_keep=cfg.parse_keep(ours.margingate_trace_keep),
        allow_untested=ours.margingate_allow_untested,
    )
    return config, sglang_flags(config, rest, cpu), False


def _radix(given: str | None, flags: list[str]) -> Radix:
    """Return what may be shared; SGLang's own flag says nothing is, as ours does."""
    off = _has(flags, "--disable-radix-cache")
    if off and given not in (None, Radix.OFF.value):
        raise ConfigError(
            f"--margingate-radix: {given!r} shares prefixes and --disable-radix-cache shares none; leave one of them out"
        )
    return Radix.OFF if off else Radix(given or Radix.CANONICAL.value)


def _map_dir(given: str) -> str | None:
    if not given.strip():  # an unset shell variable would keep maps in the working folder
        raise ConfigError(f"--margingate-map-dir: {given!r} is not a folder; name one, or {cfg.MAP_DIR_OFF}")
    return None if given == cfg.MAP_DIR_OFF else str(Path(os.path.expanduser(given)).resolve())


def default_fast_path(policy: str, cpu: bool) -> FastPathMode:
    """Return the fast path of a server that was not told: the cheaper one that keeps the policy's promise.

    On a GPU decoding in one class costs a few percent and verifies nearly nothing, where the gate alone costs a second
    forward. On a CPU the gate stays in view: that is where people look at flips.
    """
    canonical = not cpu and policy == Policy.GATE.value
    return FastPathMode.CANONICAL if canonical else FastPathMode.STOCK


def _has(flags: list[str], *names: str) -> bool:
    return any(a == n or a.startswith(n + "=") for a in flags for n in names)


def _value(flags: list[str], name: str) -> str | None:
    for i, a in enumerate(flags):
        if a.startswith(name + "="):
            return a.split("=", 1)[1]
        if a == name and i + 1 < len(flags):
            return flags[i + 1]
    return None


def _check_model_path(path: str | None) -> None:
    """Find a mistyped folder before SGLang asks a hub for it."""
    if path is not None and path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise ConfigError(f"--model-path: {path} is not a folder; name a model folder or a hub id, or leave it out")


def _on_cpu(flags: list[str]) -> bool:
    device = _value(flags, "--device")
    return is_cpu_host() if device is None else device == "cpu"


def sglang_flags(config: MarginGateConfig, given: list[str], cpu: bool) -> list[str]:
    """Add the SGLang flags that this machine and policy need, never overriding a given one."""
    from sglang_margingate.runtime.namespaces import BACKEND_NAME, uses_backend
    from sglang_margingate.settings import several, support

    flags = list(given)

    def default(name: str, *value: str) -> None:
        if not _has(flags, name):
            flags.extend([name, *value])

    if not _has(flags, "--model-path", "--model", "--config"):
        from sglang_margingate.demo.paths import check_model_dir, model_path

        check_model_dir(model_path())
        flags += ["--model-path", str(model_path())]
    _check_model_path(_value(flags, "--model-path") or _value(flags, "--model"))
    if cpu:
        default("--device", "cpu")
        default("--disable-cuda-graph")
        default("--max-total-tokens", str(CPU_POOL_TOKENS))
        default("--sleep-on-idle")  # an idle scheduler spins otherwise, and the cores are few
    if config.policy.verifies:
        if config.radix is Radix.OFF:
            default("--disable-radix-cache")
        elif uses_backend(config):
            if _has(flags, "--radix-cache-backend"):
                raise ConfigError(
                    "--radix-cache-backend: the gate brings its own; use --margingate-radix off or stock instead"
                )
            flags += ["--radix-cache-backend", BACKEND_NAME]
        if cpu and config.fast_path is FastPathMode.CANONICAL:
            default("--chunked-prefill-size", str(cfg.CANONICAL_PREFILL_CPU))
        if not cpu:
            if not _has(flags, *support.ATTENTION_FLAGS):
                flags += [support.ATTENTION_FLAGS[0], "flashinfer"]  # SGLang itself takes fa3 on Hopper
            # The prefill graphs pad chunks to sizes of their own, which would take them off the canonical shape.
            default("--cuda-graph-backend-prefill", "disabled")
            flags += several.fusion_flags(flags)
    return flags


def _print_help() -> None:
    build_parser().print_help()
    print("\nSGLang's flags:\n")
    sys.stdout.flush()
    from sglang.srt.server_args import prepare_server_args

    prepare_server_args(["--help"])


def _announce(config: MarginGateConfig, cpu: bool) -> None:
    if cpu:
        print("margingate: no GPU in use: serving on the CPU (torch_native attention, no CUDA graphs, "
              f"K/V pool of {CPU_POOL_TOKENS} tokens unless set)", file=sys.stderr)  # fmt: skip
    if config.policy.verifies and config.fast_path is FastPathMode.STOCK:
        print("margingate: --margingate-fast-path canonical may make most verifies unnecessary on this machine; "
              "`margingate probe` shows its map", file=sys.stderr)  # fmt: skip
    if config.fast_path is FastPathMode.CANONICAL:
        print("margingate: canonical fast path: forwards stay at shapes that give a row the same bits; the gate guards "
              "the rest (--margingate-fast-path stock: the gate alone)", file=sys.stderr)  # fmt: skip
    if config.policy is Policy.GATE and config.threshold is None and config.profile is None:
        print(f"margingate: no calibrated threshold: using the conservative default of {cfg.DEFAULT_THRESHOLD} logits; "
              "run `margingate calibrate` for your model and datasets", file=sys.stderr)  # fmt: skip


def _warn_profile(config: MarginGateConfig, model_path: str, device: str) -> None:
    from sglang_margingate.gate.profile import parse_profile
    from sglang_margingate.gate.request import RequestRules
    from sglang_margingate.machine import device_name, model_name, versions

    if config.profile is None:
        return
    profile = parse_profile(config.profile)
    found = versions()
    name = model_name(model_path)
    if profile.model != name:
        raise ConfigError(
            f"--margingate-profile: calibrated for model {profile.model!r}, this server runs {name!r}; "
            "calibrate this model or leave the flag out"
        )
    differs = profile.mismatches(
        repair=config.repair.value, device=device_name(device),
        sglang_version=found.get("sglang", ""), torch_version=found.get("torch", ""),
    )  # fmt: skip
    for line in differs:
        print(f"margingate: WARNING: the profile was calibrated elsewhere: {line}", file=sys.stderr)
    rules = RequestRules(config)
    for line in profile.ignored():
        print(f"margingate: WARNING: --margingate-profile: {line}", file=sys.stderr)
    print(f"margingate: requests that name no dataset are gated at {rules.threshold_for(''):g} logits", file=sys.stderr)


def run(argv: list[str]) -> int:
    """Start the server and serve until it ends; return the exit status."""
    try:
        config, flags, wants_help = parse(argv)
        if wants_help:
            _print_help()
            return 0
        return _serve(config, flags)
    except ValueError as error:
        # ConfigError and ModelFilesError are one-line messages for the user.
        print(f"margingate: error: {error}", file=sys.stderr)
        return 2


def _serve(config: MarginGateConfig, flags: list[str]) -> int:
    cpu = _on_cpu(flags)
    if cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads collapse when cores are shared
    from sglang_margingate.settings import support

    support.check_host(config)
    with config.handed_over():
        return _serve_handed_over(config, flags, cpu)


def _serve_handed_over(config: MarginGateConfig, flags: list[str], cpu: bool) -> int:
    from sglang_margingate.serving import hooks, plugin, sgl
    from sglang_margingate.serving.several import launch
    from sglang_margingate.settings import support

    os.environ[hooks.LAUNCHER_PID_ENV] = str(os.getpid())
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    plugin.load()
    load_plugins()
    try:
        hooks.check()
        server_args = prepare_server_args(flags)
        args = sgl.resolve(server_args)
        support.check_server_args(args, config)
        if config.policy is not Policy.OFF:
            launch.prepare(server_args, args, config.policy.verifies)
        _warn_profile(config, args.model_path, args.device)
        if config.trace and config.policy is not Policy.OFF:
            _check_trace_dir(config.trace_dir)
    except hooks.HookError as error:
        raise ConfigError(str(error)) from None
    _announce(config, cpu)
    from sglang.launch_server import run_server

    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0


def _check_trace_dir(trace_dir: str) -> None:
    """Find out now, with a one-line message, what the scheduler would find after loading the model."""
    path = Path(trace_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".margingate-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--margingate-trace-dir: cannot write to {path} ({error.strerror or error}); "
            "name a folder you may write to, or --margingate-trace off"
        ) from None
