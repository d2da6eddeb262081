"""Builds a scheduler process's runtime: checks, verifier, self-test, trial, trace, metrics. Refuses rather than degrades."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_margingate.canonical.classes import NO_GRAPHS, Classes, DecodeGraphs, FastPath
from sglang_margingate.canonical.engine import Engine
from sglang_margingate.canonical.grid_probe import grid_holds, grid_note
from sglang_margingate.canonical.invariance import ROW_COST, RowSizes
from sglang_margingate.canonical.path_probe import try_fast_path
from sglang_margingate.canonical.prefill_graph_probe import drop_slow, try_prefill_graphs
from sglang_margingate.canonical.ranks import digest
from sglang_margingate.canonical.score_probe import NO_SCORES, ScoreTrial, rows_hold
from sglang_margingate.canonical.selftest import SelfTestResult, run_self_test
from sglang_margingate.config import ConfigError, FastPathMode, MarginGateConfig
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.machine import device_name, model_name
from sglang_margingate.runtime.clock import clock_of
from sglang_margingate.runtime.faults import TestKnobs, leak_companions, split_attention
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.logprobs import row_logprobs
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.prefill import PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Requests
from sglang_margingate.runtime.status import BatchSizes, Runtime
from sglang_margingate.runtime.step import Step
from sglang_margingate.runtime.verifier import Verifier, VerifierCounters
from sglang_margingate.serving import attention_hooks, cpu, hooks, sgl, shape_hooks
from sglang_margingate.serving.engines import TrialEngine, make_verifier
from sglang_margingate.serving.layers import decode_graphs
from sglang_margingate.serving.prefill_graphs import capture_prefill_graphs
from sglang_margingate.serving.several import group
from sglang_margingate.serving.several.schedulers import RUN_ENV
from sglang_margingate.settings import support
from sglang_margingate.settings.fingerprint import Fingerprint, model_facts, parts_of, weights_digest
from sglang_margingate.settings.manifest import run_facts, server_facts

log = logging.getLogger(__name__)


class SelfTestError(RuntimeError):
    """The verify shape is not row-invariant on this model and machine."""


def build_runtime(scheduler: Any) -> Runtime:
    """Return the runtime of this scheduler process.

    Raises
    ------
    HookError, ConfigError, SelfTestError, TraceError
        The server must not start; the message is one line and names what broke and the fix.
    """
    config = MarginGateConfig.from_env()
    if config is None:
        raise ConfigError("the configuration did not reach the scheduler; start with sglang_margingate.launch_server")
    attached = hooks.check()
    args, model_runner = sgl.resolved(scheduler.server_args), scheduler.tp_worker.model_runner
    notes = [
        *config.notes,
        *support.check_host(config),
        *support.check_server_args(args, config),
        *support.check_model(model_runner, config),
    ]
    config = replace(config, notes=tuple(dict.fromkeys(notes)))
    shape_hooks.attend(config, model_runner.device)
    canonical = config.fast_path is FastPathMode.CANONICAL
    if canonical:
        config = replace(config, verify_rows=shape_hooks.probed(model_runner, config).verify_rows)
    if config.policy.verifies:
        sgl.one_way_to_prompt_logprobs(model_runner.model)
    verifier, self_test = _verifier(config, model_runner)
    fast = _fast_path(config, scheduler, verifier) if canonical and verifier is not None else None
    if verifier is not None:
        config = replace(
            config, notes=(*config.notes, *prefill_notes(TrialEngine(verifier, model_runner), config.chunk, fast))
        )
        verifier.counters = VerifierCounters()  # the passes of self-test and trials are nobody's cost
    scores = try_scores(model_runner, fast)
    facts = {**server_facts(args, model_runner.dtype, self_test, fast), "logprobs": scores.to_dict()}
    place = sgl.dp_rank(scheduler), int(args.dp_size)
    facts["scheduler"] = {"dp_rank": place[0], "of": place[1], "pid": os.getpid()}
    facts["ranks"] = _ranks(config, model_runner, fast)
    fingerprint = _fingerprint(config, args, scheduler, fast)
    facts["fingerprint"] = fingerprint.to_dict()
    writer = _writer(config, scheduler, facts, attached)
    first = sgl.tp_rank() == 0  # all ranks of a group take the same steps: they are counted once
    several = place[0] if place[1] > 1 else None
    metrics = Metrics(args.enable_metrics and first, args.served_model_name or model_name(args.model_path), several)
    return assemble(
        config, fast, verifier, writer, metrics, facts, model_runner.device, _decoder(config, scheduler), scores, place,
        fingerprint,
    )  # fmt: skip


def _fingerprint(config: MarginGateConfig, args: Any, scheduler: Any, fast: FastPath | None) -> Fingerprint:
    """Return the fingerprint of this server: the same on all of its ranks."""
    runner = scheduler.tp_worker.model_runner

    def weights() -> str:
        return digest(group.ranks().exchange("the weights", weights_digest(runner.model)))

    model = model_facts(runner.dtype, runner.model_config.hf_config, scheduler.tokenizer)
    parts = parts_of(config, args, model, runner.device, fast)
    if fast is None and runner.device != "cpu":
        parts["prefill_attention"] = attention_hooks.prefill_kind(runner)
    found = Fingerprint(parts, weights)
    log.info("margingate: system_fingerprint %s", found.value)
    return found


def try_scores(model_runner: Any, fast: FastPath | None) -> ScoreTrial:
    """Return which log-probabilities depend on their row alone; those of prompts were tried with the fast path."""
    broken = rows_hold(row_logprobs, model_runner.model_config.vocab_size, model_runner.device)
    output = group.ranks().agree("rows of log-probabilities", broken is None)
    notes = () if output else (f"log-probabilities depend on the rows beside them: {broken or 'on another rank'}",)
    for note in notes:
        log.warning("margingate: %s; none is called exact", note)
    # Without the canonical fast path a gated prompt is prefilled alone: the same shapes each time.
    return ScoreTrial(output, fast is None or fast.trial.prompt_scores, notes)


def _ranks(config: MarginGateConfig, model_runner: Any, fast: FastPath | None) -> list[dict[str, Any]]:
    """Check that every rank will decide alike; return what each runs on.

    Raises
    ------
    RankError
        A trial, an attention kernel or a threshold differs.
    """
    ranks, decided = group.ranks(), _decided(config, fast)
    decided["attention"] = group.attention_names(model_runner)
    ranks.same("what was chosen", decided)
    if fast is not None:  # all ranks of a forward replay one size
        ranks.same("prefill graphs", {"prefill graphs": list(fast.trial.prefill_graphs.sizes)})
    about = {
        "rank": ranks.rank,
        "pid": os.getpid(),
        "device": device_name(model_runner.device),
        "decides": digest(decided),
    }
    if fast is not None:
        about["map"] = fast.classes.map.origin()
    return ranks.exchange("about each rank", about)


def _decided(config: MarginGateConfig, fast: FastPath | None) -> dict[str, Any]:
    """Return what all ranks and schedulers of a server must have in common.

    Sizes of prefill graphs are not of it: time chose among sizes of one class, so a scheduler on another GPU may have others.
    """
    decided: dict[str, Any] = {"notes": list(config.notes), "verify rows": config.verify_rows, "chunk": config.chunk}
    if fast is not None:
        trial, classes = fast.trial, fast.classes
        decided |= {
            "sizes": digest([classes.decode.sizes, classes.prefill.sizes, classes.head.sizes]),
            "decode graphs": list(trial.graphs.sizes), "rows of their layers": list(trial.graphs.widest.items()),
            "decode in class": trial.decode_ok,
            "prefill": trial.prefill, "trial": list(trial.notes), "decode attention": trial.decode_attention,
            "prefill attention": trial.prefill_attention,
        }  # fmt: skip
    return decided


def assemble(
    config: MarginGateConfig, fast: FastPath | None, verifier: Verifier | None, writer: Any, metrics: Metrics,
    facts: dict[str, Any], device: Any, text: Callable[[list[int]], str | None] = lambda _: None,
    scores: ScoreTrial = NO_SCORES, schedulers: tuple[int, int] = (0, 1), fingerprint: Fingerprint | None = None,
) -> Runtime:  # fmt: skip
    """Put the parts of one scheduler process together; they need no SGLang."""
    knobs, batches = TestKnobs(), BatchSizes()
    told = config.trace and config.trace_text
    recorder = Recorder(clock_of(device), writer, metrics, (lambda token: text([token])) if told else None)
    trial = None if fast is None else fast.trial
    prefill = "grid" if trial is None else trial.prefill
    labels = Labels(config, recorder, metrics, prefill, trial is not None and trial.decode_ok, scores)
    requests = Requests(config, recorder, labels, writer, text, schedulers)
    step = Step(
        recorder, PrefillRules(config.chunk, prefill != "batched"), verifier, AuditSampler(config.audit_rate),
        config.window or config.verify_rows, knobs, metrics, batches.note,
    )  # fmt: skip
    runtime = Runtime(config, recorder, labels, requests, step, batches, metrics, fast, facts, writer, fingerprint)
    labels.fingerprint = None if fingerprint is None else fingerprint.value
    if knobs.active:
        runtime.lower(f"test knobs are set ({', '.join(knobs.active)}): faults are injected on purpose")
    return runtime


def _decoder(config: MarginGateConfig, scheduler: Any) -> Callable[[list[int]], str | None]:
    """Return what turns tokens into the trace's text; None where the run records none."""
    tokenizer = scheduler.tokenizer
    if not (config.trace and config.trace_text) or tokenizer is None:
        return lambda _: None
    return lambda tokens: tokenizer.decode(tokens)


def _fast_path(config: MarginGateConfig, scheduler: Any, verifier: Verifier) -> FastPath:
    """Try the canonical fast path out; what does not hold is left to the gate."""
    model_runner = scheduler.tp_worker.model_runner
    classes, captured, graphs = shape_hooks.probed(model_runner, config), shape_hooks.captured(), NO_GRAPHS
    if model_runner.device != "cpu":
        graphs = decode_graphs.graphs_of(model_runner.decode_cuda_graph_runner.capture_bs)
    knobs = TestKnobs()
    rows = knobs.split_attention
    if rows and knobs.hits(sgl.tp_rank()):
        log.warning("margingate: decode attention of up to %d rows rounds otherwise on purpose", rows)
        split_attention(model_runner.attn_backend, rows)
    engine = TrialEngine(verifier, model_runner)
    prefill_sizes, notes = _prefill_graphs(config, model_runner, classes, engine)
    attends, prefills = captured.decode_attention, attention_hooks.prefill_kind(model_runner)
    if model_runner.device == "cpu":
        attends = prefills = cpu.attention_kind(model_runner)
    if odd := [str(size) for size in captured.inside if size not in graphs.widest]:
        notes += (f"decode graphs of {', '.join(odd)} rows: not every layer was seen inside its class",)
    trial = try_fast_path(classes, engine, config.chunk, graphs, attends, (*captured.notes, *notes))
    fast = FastPath(classes, replace(trial, prefill_graphs=prefill_sizes, prefill_attention=prefills))
    if trial.prefill == "batched" and isinstance(getattr(scheduler.tree_cache, "chunk", None), int):
        scheduler.tree_cache.chunk = 1  # any prompt column is canonical, so hits need no floor
    for note in trial.notes:
        log.warning("margingate: fast path: %s", note)
    log.info("margingate: canonical fast path tried in %.1f s: decode %s, prefill %s, attended to by %s", trial.seconds,
             "in class" if trial.decode_ok else "GATED", "batched" if trial.prefill == "batched" else "one at a time",
             prefills)  # fmt: skip
    inside = trial.graphs.inside()
    if trial.decode_ok and inside:
        log.info("margingate: recommended on this machine: policy gate on this fast path. A batch of 1 decodes at %s, one of "
                 "more than %d is gated by margin; --cuda-graph-max-bs-decode sets what the class must hold",
                 _first_graph(trial.graphs), inside[-1])  # fmt: skip
    return fast


def _first_graph(graphs: DecodeGraphs) -> str:
    """Return in words at how many rows a batch of 1 decodes."""
    size = graphs.inside()[0]
    if size > 1:
        return f"{size} rows (at most about {100 * ROW_COST * (size - 1):.0f}% of a step)"
    return "1 row" + (f", some of its layers at up to {graphs.widest[1]}" if graphs.widest[1] > 1 else "")


def _prefill_graphs(
    config: MarginGateConfig, model_runner: Any, classes: Classes, engine: Engine
) -> tuple[RowSizes, tuple[str, ...]]:
    """Capture prefill graphs and try them against eager forwards; return the sizes in use, and what is not in words."""
    if model_runner.device == "cpu":
        return RowSizes(), ()
    if not config.prefill_graphs:
        log.info(
            "margingate: prefill graphs are off (--margingate-prefill-graphs off): prefills run eagerly, with the same bits"
        )
        return RowSizes(), ()
    graphs, notes = capture_prefill_graphs(model_runner, classes)
    if graphs is None:
        return RowSizes(), notes
    shape_hooks.replay_prefills(graphs)
    start = time.perf_counter()
    if slow := drop_slow(graphs, group.ranks()):
        told = ", ".join(f"{size} ({ms:.1f} ms)" for size, ms in slow.items())
        log.info("margingate: prefill graphs that take longer than a larger one are not used: %s", told)
    notes += try_prefill_graphs(engine, graphs)
    sizes = RowSizes(graphs.sizes)
    log.info("margingate: prefill graphs tried against eager forwards in %.1f s: %s tokens in use",
             time.perf_counter() - start, sizes.describe())  # fmt: skip
    return sizes, notes


def prefill_notes(engine: Engine, chunk: int, fast: FastPath | None) -> tuple[str, ...]:
    """Return what costs every response its guarantee: prompt columns that are neither batch-invariant nor repeatable.

    Parameters
    ----------
    engine
        The server's runners.
    chunk
        The canonical grid.
    fast
        The canonical fast path, whose trials said so already; None: the grid is tried here.
    """
    if fast is not None:
        notes: tuple[str, ...] = fast.trial.notes[-1:] if fast.trial.prefill is None else ()  # the grid was tried last
    else:
        broken = grid_holds(engine, chunk)
        notes = () if broken is None else (grid_note(chunk, broken),)
    for note in notes:
        log.warning("margingate: no response of this server has a guarantee: %s", note)
    return notes


def _verifier(config: MarginGateConfig, model_runner: Any) -> tuple[Verifier | None, SelfTestResult | None]:
    if not config.policy.verifies:
        return None, None
    capacity = model_runner.max_total_num_tokens
    if config.verify_rows > capacity:
        raise ConfigError(
            f"--margingate-verify-rows: {config.verify_rows} rows do not fit the K/V pool of {capacity} tokens; "
            f"give at most {capacity} or raise --max-total-tokens"
        )
    knobs = TestKnobs()
    if knobs.active:
        log.warning("margingate: TEST KNOBS ARE SET: %s", ", ".join(knobs.active))
    if knobs.break_linear and knobs.hits(sgl.tp_rank()):
        log.warning(
            "margingate: %s leaks its companions on purpose", leak_companions(model_runner.model, knobs.break_linear)
        )
    verifier = make_verifier(model_runner, config.verify_rows)
    result = run_self_test(TrialEngine(verifier, model_runner))
    if not result.passed:
        raise SelfTestError(
            f"self-test failed: at {result.rows} rows a row's bits depend on its companions; first layer that differs: "
            f"{result.broken_layer}. Try another --margingate-verify-rows; this model cannot be gated here otherwise"
        )
    log.info("margingate: self-test passed: %d trials at %d rows in %.1f s", result.trials, result.rows, result.seconds)
    return verifier, result


def _writer(config: MarginGateConfig, scheduler: Any, facts: dict[str, Any], attached: list[str]) -> Any:
    if not config.trace or sgl.tp_rank() != 0:
        return None
    from sglang_margingate.trace import TraceWriter  # with the trace off the server needs no pyarrow

    manifest = run_facts(config, sgl.resolved(scheduler.server_args), facts, attached)
    shared = {"stamp": os.environ[RUN_ENV], "part": facts["scheduler"]["dp_rank"]} if RUN_ENV in os.environ else {}
    return TraceWriter(Path(config.trace_dir), manifest, keep=config.trace_keep, **shared)
