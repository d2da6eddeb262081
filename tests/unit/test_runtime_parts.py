"""Requests, labels, status page and counters of one server, put together from their parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest

from sglang_margingate.canonical.score_probe import ScoreTrial
from sglang_margingate.config import MarginGateConfig, Policy
from sglang_margingate.gate.audit import AuditSampler
from sglang_margingate.gate.ledger import Counters
from sglang_margingate.runtime.clock import HostClock
from sglang_margingate.runtime.faults import TestKnobs
from sglang_margingate.runtime.labels import Labels
from sglang_margingate.runtime.metrics import Metrics
from sglang_margingate.runtime.prefill import PrefillRules
from sglang_margingate.runtime.record import Recorder
from sglang_margingate.runtime.requests import Ended, Opened, Requests
from sglang_margingate.runtime.status import BatchSizes, Runtime
from sglang_margingate.runtime.step import Step
from sglang_margingate.words import Guarantee


class Sink:
    """A trace that keeps what it is given."""

    path, dropped_rows, write_errors = Path("runs/one"), 3, 1

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] = {}

    def add_steps(self, rows: Any) -> None:
        """Steps are other tests' matter."""

    def add_request(self, row: dict[str, Any]) -> None:
        self.requests.append(row)

    def update_manifest(self, **fields: Any) -> None:
        self.manifest.update(fields)


def a_runtime(writer: Sink | None = None, verifier: Any = None, isolated: bool = True, **config: Any) -> Runtime:
    settings = MarginGateConfig(**config)
    metrics, batches = Metrics(False, "m"), BatchSizes()
    recorder = Recorder(HostClock(), writer, metrics)
    labels = Labels(settings, recorder, metrics, "grid", True, ScoreTrial(True, True))
    requests = Requests(settings, recorder, labels, writer, lambda tokens: "".join(map(chr, tokens)))
    step = Step(
        recorder, PrefillRules(settings.chunk, isolated), verifier, AuditSampler(settings.audit_rate), 16, TestKnobs(),
        metrics, batches.note,
    )  # fmt: skip
    return Runtime(settings, recorder, labels, requests, step, batches, metrics, None, {"model": "tiny"}, writer)


# ---- requests -----------------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_new_request() -> None:
    requests = a_runtime().requests
    first = requests.open(
        Opened("a", {"margingate_return_steps": True, "margingate_dataset": "d"}, True, most_tokens=9)
    )
    assert (first.ledger.request_id, first.ledger.number, first.most_tokens) == ("a", 1, 9)
    assert first.steps == {"margin": [], "verified": [], "flipped": [], "reason": []}
    assert first.plain
    assert not first.hidden
    assert not first.penalised
    second = requests.open(Opened("b", None, True, penalised=True))
    assert (second.ledger.number, second.steps, second.penalised) == (2, None, True)


@pytest.mark.parametrize(
    ("new", "plain", "why"),
    [
        (Opened("r", None, True), True, None),
        (Opened("r", None, False, 0.7), False,
         "sampled at temperature 0.7 without a seed: a sampling_seed (OpenAI: seed) makes it repeatable"),
        (Opened("r", None, False, 1.0, seed=3), True, None),
        (Opened("r", None, True, custom_processor=True), False,
         "a custom logit processor may keep state, so its steps are not verified"),
        (Opened("r", None, False, 1.0, most_tokens=0), True, None),
    ],
)  # fmt: skip
def test_which_requests_are_gated_and_why_others_are_not(new: Opened, plain: bool, why: str | None) -> None:
    state = a_runtime().requests.open(new)
    assert (state.plain, state.ledger.ungated) == (plain, why)


def test_health_checks_are_no_requests_and_wrong_wishes_are_served_without_a_claim(caplog: Any) -> None:
    runtime = a_runtime()
    hidden = runtime.requests.open(Opened("HEALTH_CHECK_1", {"margingate_policy": "always"}, True))
    assert (hidden.hidden, hidden.ledger.number, hidden.ledger.params.policy) == (True, 0, Policy.OFF)
    assert runtime.requests.finish(hidden, Ended(1, "stop")) is None
    assert runtime.recorder.totals.requests == 0
    with caplog.at_level(logging.WARNING):
        state = runtime.requests.open(Opened("r", {"margingate_policy": "maybe"}, True))
    assert (state.hidden, state.ledger.number, state.ledger.params.policy) == (False, 1, Policy.OFF)
    assert "request r: custom_params.margingate_policy" in caplog.text


def test_a_request_that_ends_tells_client_and_trace_the_same() -> None:
    sink = Sink()
    runtime = a_runtime(sink)
    state = runtime.requests.open(
        Opened("r", {"margingate_repeat": 4, "margingate_threshold": 0.25}, True, most_tokens=8)
    )
    state.ledger.note_prefill(None)
    state.prompt_tokens, state.cached_tokens, state.floored_tokens, state.prefill_chunks = 3, 2, 1, 5
    state.arrival, state.first_token_time, state.last_token_time, state.prefill_ms = 100.0, 100.5, 102.5, 7.0
    state.max_batch_rows = 6
    state.ledger.counters = Counters(steps=5, verify_ms=12.3456, audited=2, repaired=4)
    ended = Ended(5, "length", 2, lambda: [72, 105], lambda: [1, 2, 3], lambda: "abc", "output")
    summary = runtime.requests.finish(state, ended)
    assert summary is not None
    (row,) = sink.requests
    shared = {
        "request": 1, "policy": "gate", "repair": "window", "threshold": 0.25, "dataset": "", "triggers": 0,
        "structural": 0, "verified": 0, "audited": 2, "flips": 0, "missed": 0, "cached_tokens": 2, "floored_tokens": 1,
        "prefill_chunks": 5, "retractions": 2, "max_batch_rows": 6, "temperature": 0.0, "seed": None, "guarantee": "structural",
        "guarantee_note": "the prefill and 0 of 4 decode steps ran inside the probed class, and so did the verify of the rest",
        "logprobs": "batch",
    }  # fmt: skip
    told = {"steps": 5, "repaired": 4, "verify_ms": 12.346, "kv_digest": "abc"}
    assert {name: summary[name] for name in (*shared, *told)} == {**shared, **told}
    assert not {"prompt_tokens", "output_tokens"} & set(summary), "SGLang tells them itself"
    traced = {
        "prompt_tokens": 3, "output_tokens": 5, "verify_ms": 12.3456, "time": 100.0, "ttft_ms": 500.0, "tpot_ms": 500.0,
        "e2e_ms": 2500.0, "prefill_ms": 7.0, "hold_ms": 0.0, "overhead_ms": 12.3456, "overhead_share": 12.3456 / 2500,
        "request_id": "r", "prompt_digest": row["prompt_digest"], "output_digest": row["output_digest"], "steps": 5, "greedy": True,
        "max_tokens": 8, "repeat": 4, "finish_reason": "length", "prompt_text": "Hi",
    }  # fmt: skip
    assert {name: row[name] for name in (*shared, *traced)} == {**shared, **traced}
    assert runtime.recorder.totals.requests == 1
    assert runtime.requests.finish(state, ended) is None, "it was closed before"
    assert len(sink.requests) == 1


def test_times_that_nobody_saw_are_not_made_up() -> None:
    sink = Sink()
    requests = a_runtime(sink).requests
    for shown, first in ((0, None), (1, 100.0)):
        state = requests.open(Opened("r", None, True))
        state.arrival, state.first_token_time, state.last_token_time = 100.0, first, first
        requests.finish(state, Ended(shown, "abort"))
    nothing, one = sink.requests
    assert (nothing["ttft_ms"], nothing["tpot_ms"], nothing["max_tokens"]) == (None, None, None)
    assert nothing["e2e_ms"] > 0, "it lasted until now"
    assert (one["ttft_ms"], one["tpot_ms"], one["e2e_ms"], one["overhead_share"]) == (0.0, None, 0.0, 0.0)
    assert nothing["guarantee"] == "none"


# ---- labels -------------------------------------------------------------------------------------------------------------


def test_a_server_that_was_lowered_claims_nothing_and_says_it_once(caplog: Any) -> None:
    sink = Sink()
    runtime = a_runtime(sink, notes=("from the start",))
    with caplog.at_level(logging.WARNING):
        for reason in ("a", "b", "a"):
            runtime.lower(reason)
    assert runtime.labels.notes == ("from the start", "a", "b")
    assert sink.manifest == {"notes": ["from the start", "a", "b"]}
    assert len(caplog.records) == 2
    assert "margingate: a; responses claim nothing from now on" in caplog.text
    state = runtime.requests.open(Opened("r", None, True))
    assert runtime.labels.label(state, 1, False) == (Guarantee.NONE, "from the start; a; b")
    runtime.recorder.structural_flips = 2
    assert (
        runtime.labels.notes[-1] == "the audit found 2 flipped step(s) inside the probed class: the class does not hold"
    )


def test_the_audits_bound_costs_the_guarantee_while_it_is_over_the_limit(caplog: Any) -> None:
    runtime = a_runtime(audit_rate=0.5, max_miss=0.01)
    with caplog.at_level(logging.INFO):
        note = runtime.labels.claims().gated_note
        assert note is not None
        assert note.startswith("--margingate-max-miss: missed flips 0/0 (nothing observed) of audited steps")
        runtime.labels.claims()
        for _ in range(300):
            runtime.recorder.audit.add_untriggered(audited=True)
        assert runtime.labels.claims().gated_note is None
        runtime.labels.claims()
    levels = [(record.levelname, record.message.rpartition("; ")[2]) for record in caplog.records]
    assert levels == [
        ("WARNING", "responses with unverified steps claim no guarantee"),
        ("INFO", "responses with unverified steps claim their guarantee again"),
    ]
    assert a_runtime(audit_rate=0.5).labels.claims().gated_note is None, "no limit was set"


def test_log_probabilities_that_nobody_asked_for_are_not_labelled() -> None:
    runtime = a_runtime()
    state = runtime.requests.open(Opened("r", None, True, most_tokens=0))
    state.ledger.counters.scored = 1
    for asked, expected in ((None, None), ("output", "exact"), ("prompt", "exact")):
        assert runtime.labels.logprobs(state, Guarantee.STRUCTURAL, 1, asked) == expected  # type: ignore[arg-type]
    more = runtime.requests.open(Opened("r", None, True, most_tokens=2))
    more.ledger.counters.scored = 1
    assert runtime.labels.logprobs(more, Guarantee.STRUCTURAL, 2, "output") == "batch", "one of two was seen"


# ---- status -------------------------------------------------------------------------------------------------------------


def test_the_status_page() -> None:
    counters = SimpleNamespace(counters=Counters(steps=3))
    runtime = a_runtime(Sink(), counters, False, threshold=0.25, audit_rate=0.1)
    runtime.batches.note(2)
    runtime.batches.note(16)
    runtime.batches.note(2)
    page = runtime.status()
    assert page["batch_rows"] == {"now": 2, "max": 16, "steps_by_rows": {"2": 2, "16": 1}}
    assert page["missed"] == {"missed": 0, "checked": 0, "upper_95": None}
    assert page["trace"] == {"path": "runs/one", "dropped_rows": 3, "write_errors": 1}
    assert page["verifier"]["steps"] == 3
    assert page["totals"]["untriggered_checked"] == 0
    some = ("model", "policy", "repair", "threshold", "thresholds", "window", "radix", "chunk", "fast_path", "audit_rate",
            "notes", "test_knobs", "weight_changes", "verify_rows")  # fmt: skip
    assert {name: page[name] for name in some} == {
        "model": "tiny", "policy": "gate", "repair": "window", "threshold": 0.25, "thresholds": {}, "window": 16,
        "radix": "canonical", "chunk": 1, "fast_path": "stock", "audit_rate": 0.1, "notes": [], "test_knobs": [],
        "weight_changes": 0, "verify_rows": 16,
    }  # fmt: skip
    assert 0 <= page["uptime_seconds"] < 60


def test_the_status_page_of_a_server_whose_weights_changed() -> None:
    runtime = a_runtime()
    for _ in range(2):
        runtime.recorder.audit.add_untriggered(audited=True, flipped=True)
    runtime.weights_changed("after an update")
    runtime.weights_changed("after an update")
    page = runtime.status()
    assert (page["weight_changes"], page["notes"]) == (2, ["after an update"])
    assert page["model"] == "tiny (weights changed since the start)"
    assert page["missed"] == {"missed": 2, "checked": 2, "upper_95": 1.0}
    assert page["chunk"] == runtime.config.chunk
    assert not {"verifier", "trace"} & set(page)
    assert BatchSizes().to_dict() == {"now": 0, "max": 0, "steps_by_rows": {}}


# ---- counters -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    before = set(prometheus_client.REGISTRY._collector_to_names)
    yield Metrics(True, "m")
    for collector in set(prometheus_client.REGISTRY._collector_to_names) - before:
        prometheus_client.REGISTRY.unregister(collector)


def test_counters_on_the_metrics_page(metrics: Metrics) -> None:
    metrics.step(True, True, False)
    metrics.step(False, True, True)
    metrics.step(False, False, False)
    metrics.verify(2, 20, 0.5)
    metrics.verify(1, 3, 0.25)
    metrics.trace(5, 1)
    metrics.trace(7, 1)
    metrics.missed_bound(0.25)
    shown = {"steps": 3, "triggers": 1, "flips": 2, "missed": 1, "verify_passes": 3, "verify_rows": 23,
             "verify_seconds": 0.75, "trace_dropped_rows": 7, "trace_write_errors": 1}  # fmt: skip
    read = prometheus_client.REGISTRY.get_sample_value
    assert {name: read(f"margingate_{name}_total", {"model_name": "m"}) for name in shown} == shown
    assert read("margingate_missed_bound", {"model_name": "m"}) == 0.25


def test_a_server_that_lost_its_guarantee_shows_it(metrics: Metrics) -> None:
    read = prometheus_client.REGISTRY.get_sample_value
    labels = Labels(MarginGateConfig(), Recorder(HostClock(), None, metrics), metrics)
    assert read("margingate_lowered", {"model_name": "m"}) == 0
    labels.lower("the weights were changed")
    assert read("margingate_lowered", {"model_name": "m"}) == 1
    metrics.answer("gated")
    metrics.answer("none")
    metrics.answer("none")
    counts = {g: read("margingate_answers_total", {"model_name": "m", "guarantee": g}) for g in ("gated", "none")}
    assert counts == {"gated": 1, "none": 2}


def test_no_counter_is_made_where_sglang_shows_none() -> None:
    off = Metrics(False, "m")
    off.step(True, True, True)
    off.verify(1, 1, 1.0)
    off.trace(1, 1)
    off.missed_bound(1.0)
    assert prometheus_client.REGISTRY.get_sample_value("margingate_steps_total", {"model_name": "m"}) is None


def test_every_counter_says_what_it_counts(metrics: Metrics) -> None:
    ours = {m.name: m for m in prometheus_client.REGISTRY.collect() if m.name.startswith("margingate_")}
    counters = {
        "steps", "triggers", "flips", "missed", "verify_passes", "verify_rows", "verify_seconds", "trace_dropped_rows",
        "trace_write_errors", "host_seconds", "host_forwards", "answers",
    }  # fmt: skip
    assert {name for name, family in ours.items() if family.type == "counter"} == {f"margingate_{n}" for n in counters}
    assert {name for name, family in ours.items() if family.type == "gauge"} == {
        "margingate_missed_bound", "margingate_lowered",
    }  # fmt: skip
    for family in ours.values():
        text = family.documentation
        assert text[:1].isupper(), text
        assert not text.isupper()
        assert text.endswith((".", "audited.")), text
        assert "XX" not in text
    kinds = {
        sample.labels.get("kind", sample.labels.get("forward")) for sample in ours["margingate_host_seconds"].samples
    }
    assert kinds == {"decode", "prefill"}


def test_a_scoring_request_and_one_that_was_cut_off_are_labelled_as_such() -> None:
    runtime = a_runtime()
    scoring = runtime.requests.open(Opened("r", None, True, most_tokens=0))
    scoring.ledger.note_prefill(None)
    scoring.ledger.counters.scored = 1
    summary = runtime.requests.finish(scoring, Ended(0, "length", asked="prompt"))
    assert summary is not None
    assert (summary["guarantee"], summary["logprobs"]) == ("structural", "exact")
    assert summary["guarantee_note"].startswith("no token was asked for")
    cut = runtime.requests.open(Opened("r", None, True, most_tokens=5))
    cut.ledger.note_prefill(None)
    cut.ledger.counters.steps = 1
    summary = runtime.requests.finish(cut, Ended(1, "abort"))
    assert summary is not None
    assert summary["guarantee_note"] == "the answer was cut off (aborted)"


def test_a_seeded_draw_is_what_the_request_asked_for() -> None:
    new = Opened("r", {"margingate_threshold": 0.25}, False, 0.75, 7, top_k=5, top_p=0.5, min_p=0.125)
    draw = a_runtime().requests.open(new).draw
    assert draw is not None
    assert (draw.seed, draw.temperature, draw.top_k, draw.top_p, draw.min_p) == (7, 0.75, 5, 0.5, 0.125)


def test_a_server_of_which_nothing_is_known_claims_nothing(caplog: Any) -> None:
    runtime = a_runtime(max_miss=0.5, audit_rate=0.5)
    shown: list[float] = []
    runtime.metrics.missed_bound = shown.append  # type: ignore[method-assign]
    bare = Labels(runtime.config, runtime.recorder, runtime.metrics).claims()
    assert (bare.prefill, bare.decode, bare.output_scores, bare.prompt_scores) == (None, False, False, False)
    assert shown == [1.0]
    for _ in range(100):
        runtime.recorder.audit.add_untriggered(audited=True)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        within = Labels(runtime.config, runtime.recorder, runtime.metrics)
        assert within.claims().gated_note is None
    assert caplog.records == [], "nothing has changed, so there is nothing to say"
    assert shown[1] == pytest.approx(0.0295, abs=1e-4)
