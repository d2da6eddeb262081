"""What holds of any map, any logits, any sample and any list of verify jobs."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margingate_kernels import Workspace, top2_margin
from margingate_kernels.choice.top2_margin import top2_host

from sglang_margingate.canonical.classes import Classes, DecodeGraphs, FastPath, Trial
from sglang_margingate.canonical.invariance import InvarianceMap, LayerClasses, MapError, RowSizes, spans
from sglang_margingate.canonical.map_store import readable
from sglang_margingate.gate.calibration import threshold_for, trade_off
from sglang_margingate.runtime.verifier import KvAccess, Verifier, VerifyJob

few = settings(max_examples=100, deadline=None)

# ---- maps and classes --------------------------------------------------------------------------------------------------

probed_rows = st.sets(st.integers(1, 300), min_size=1, max_size=40)


@st.composite
def maps(draw: Any) -> InvarianceMap:
    """Maps whose layers were probed at the same rows, as those of one model are; the last is the head."""
    rows, layers = sorted(draw(probed_rows)), []
    names = [*(f"layers.0.{i}" for i in range(draw(st.integers(1, 3)))), "lm_head"]
    for name in names:
        labels = draw(st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=len(rows), max_size=len(rows)))
        shape = (draw(st.integers(1, 4096)), draw(st.integers(1, 4096)))
        layers.append(
            LayerClasses(name, shape, draw(st.integers(1, 80)), dict(zip(rows, labels)), name == "lm_head", "bfloat16")
        )
    return InvarianceMap(layers, {"device": draw(st.text(max_size=8)), "threads": 1})


@given(maps())
@few
def test_a_map_is_read_as_it_was_written(found: InvarianceMap) -> None:
    read = InvarianceMap.from_dict(json.loads(readable(found.to_dict())))
    assert read == found
    assert [layer.runs() for layer in read.layers] == [layer.runs() for layer in found.layers]


@given(maps(), st.data())
@few
def test_a_map_whose_classes_do_not_fit_its_rows_is_refused(found: InvarianceMap, data: Any) -> None:
    written = found.to_dict()
    layer = data.draw(st.sampled_from(written["layers"]))
    at = data.draw(st.integers(0, len(layer["classes"]) - 1))
    layer["classes"][at][data.draw(st.integers(0, 1))] += 1000
    with pytest.raises(MapError):
        InvarianceMap.from_dict(written)


@given(probed_rows)
@few
def test_spans_hold_the_rows_they_were_made_of(rows: set[int]) -> None:
    made = [m for first, last, step in spans(sorted(rows)) for m in range(first, last + 1, step)]
    assert made == sorted(rows)


@given(st.sets(st.integers(1, 200), max_size=20), st.integers(1, 220))
@few
def test_rows_are_padded_to_the_next_size(sizes: set[int], rows: int) -> None:
    larger = [size for size in sizes if size >= rows]
    assert RowSizes(tuple(sorted(sizes))).target(rows) == (min(larger) if larger else None)


@given(maps(), st.integers(1, 300), st.integers(1, 64))
@few
def test_rows_of_one_class_have_one_label_in_every_layer(found: InvarianceMap, largest: int, verify_rows: int) -> None:
    classes = Classes.of(found, largest, verify_rows, [], apart=True)
    for layer in found.layers:
        assert len({layer.labels[m] for m in classes.decode.sizes}) <= 1
        assert None not in {layer.labels[m] for m in classes.decode.sizes}
        if not layer.head:
            assert len({layer.labels[m] for m in classes.prefill.sizes}) <= 1
    if classes.decode.target(verify_rows) is not None:
        assert classes.verify_rows in classes.decode.sizes, "a verify gives the class's bits"
    sizes = classes.decode_graph_sizes(range(1, 80), 1000)
    own = classes.own(decode=True)
    for size in sizes:
        wider = {layer.name: rows.target(size) for layer, rows in zip(found.layers, own)}
        for layer in found.layers:
            rows = wider[layer.name]
            assert rows is not None
            assert layer.labels[rows] == layer.labels[classes.decode.sizes[0]], "padded by itself into its own class"
    graphs = DecodeGraphs(tuple(sizes), {size: size for size in sizes})
    for rows in range(1, 80):
        size = graphs.target(rows)
        assert (size is None) is (rows > max(sizes, default=0))
        if size is None:
            assert classes.decode.target(rows) is None
            continue
        seen = graphs.shape(rows, size)
        assert seen.in_class
        assert FastPath(classes, Trial(graphs, decode_ok=True)).judged(seen) == seen
        assert not FastPath(classes, Trial(graphs, decode_ok=False)).judged(seen).in_class


# ---- top-2 -------------------------------------------------------------------------------------------------------------

on_a_grid = st.integers(-8, 8).map(lambda n: n * 0.0625 + 8)
"""Neighbouring bf16 numbers between 8 and 16: most rows hold ties."""
logit = st.one_of(on_a_grid, st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0]))
rows_of_logits = st.integers(2, 12).flatmap(
    lambda vocab: st.lists(st.lists(logit, min_size=vocab, max_size=vocab), min_size=1, max_size=5)
)


def naive(row: list[float]) -> tuple[int, int, float]:
    """Return token, runner-up and margin: NaN is -inf, and the lowest index wins a tie."""
    clean = [-math.inf if math.isnan(x) else x for x in row]
    token = max(range(len(clean)), key=lambda i: (clean[i], -i))
    second = max((i for i in range(len(clean)) if i != token), key=lambda i: (clean[i], -i))
    return token, second, clean[token] - clean[second]


@given(rows_of_logits, st.sampled_from([torch.float32, torch.bfloat16]), st.floats(0, 1))
@few
def test_the_best_two_of_any_row(rows: list[list[float]], dtype: torch.dtype, threshold: float) -> None:
    logits = torch.tensor(rows, dtype=dtype)
    want = [naive(row) for row in logits.float().tolist()]
    thresholds = torch.full((len(rows),), threshold)
    workspace = Workspace(8, logits.shape[1], "cpu")
    for found in (top2_margin(logits, thresholds), top2_margin(logits, thresholds, workspace=workspace)):
        assert list(zip(found.token.tolist(), found.second.tolist())) == [(a, b) for a, b, _ in want]
        np.testing.assert_array_equal(found.margin.numpy(), np.array([m for *_, m in want], dtype=np.float32))
        at = thresholds[0].item()
        assert found.trigger.tolist() == [not m > at for *_, m in want], "ties and NaN always trigger"
    token, second, margin = top2_host(logits)
    assert list(zip(token.tolist(), second)) == [(a, b) for a, b, _ in want]
    np.testing.assert_array_equal(np.float32(margin), np.array([m for *_, m in want], dtype=np.float32))


@given(rows_of_logits, st.randoms(use_true_random=False))
@few
def test_a_rows_best_two_depend_on_that_row_alone(rows: list[list[float]], rng: Any) -> None:
    order = rng.sample(range(len(rows)), len(rows))
    together = top2_margin(torch.tensor([rows[i] for i in order]), torch.zeros(len(rows)))
    for place, i in enumerate(order):
        alone = top2_margin(torch.tensor([rows[i]]), torch.zeros(1))
        assert (together.token[place], together.second[place]) == (alone.token[0], alone.second[0])


# ---- calibration -------------------------------------------------------------------------------------------------------

samples = st.lists(
    st.tuples(st.one_of(st.integers(0, 40).map(lambda n: n / 16), st.just(math.nan)), st.booleans()), min_size=1
)


@given(samples, st.sampled_from([0.0, 0.01, 0.2, 0.9]), st.sampled_from([0.5, 0.95]))
@few
def test_a_threshold_is_the_smallest_that_keeps_its_promise(
    sample: list[tuple[float, bool]], target: float, confidence: float
) -> None:
    margins, flipped = map(list, zip(*sample))
    c = threshold_for(margins, flipped, target, confidence, tail=False)
    missed = sum(f and m > c.threshold for m, f in sample)
    assert c.missed.numerator == missed
    assert c.triggered.numerator == sum(not m > c.threshold for m, _ in sample)
    assert c.missed.value <= c.miss_upper <= 1
    if not target or not c.met:
        assert missed == 0
    else:
        assert c.miss_upper <= target
    # A threshold above 0 is some flip's margin: without that flip the same number of misses would need none of it.
    assert c.threshold == 0 or any(f and m == c.threshold for m, f in sample)


@given(samples, st.integers(1, 4))
@few
def test_more_of_the_same_evidence_lowers_the_bound(sample: list[tuple[float, bool]], times: int) -> None:
    margins, flipped = map(list, zip(*sample))
    once = threshold_for(margins, flipped, tail=False)
    again = threshold_for(margins * (times + 1), flipped * (times + 1), tail=False)
    assert again.threshold == once.threshold
    assert again.miss_upper < once.miss_upper


@given(samples)
@few
def test_a_higher_threshold_costs_more_and_misses_less(sample: list[tuple[float, bool]]) -> None:
    table = trade_off(*map(list, zip(*sample)))
    assert table["threshold"].is_monotonic_increasing
    assert table["triggered"].is_monotonic_increasing
    assert table["missed"].is_monotonic_decreasing
    assert table["miss_upper"].is_monotonic_decreasing
    assert table["missed"].iloc[-1] == 0


# ---- verify jobs -------------------------------------------------------------------------------------------------------

TABLE, VOCAB = 12, 32


class Pool:
    """K/V of one layer, one number a column."""

    start_layer, layer_num = 0, 1

    def __init__(self, slots: int) -> None:
        self.k, self.v = torch.arange(slots * 2, dtype=torch.float32).view(2, slots, 1, 1)

    def get_key_buffer(self, _: int) -> torch.Tensor:
        return self.k

    def get_value_buffer(self, _: int) -> torch.Tensor:
        return self.v


class Engine:
    """A column becomes its token plus the column before it, so that the order of rows shows; logits peak at the token."""

    device = "cpu"

    def __init__(self, pool: Pool, table: torch.Tensor, rows: int) -> None:
        self.pool, self.table, self.kv, self.rows = pool, table, KvAccess.of(pool), rows
        self.passes: list[int] = []

    def prepare(self, pools: list[int], positions: list[int], tokens: list[int], real: int) -> Any:
        assert len(pools) == len(positions) == len(tokens) == self.rows
        slots = self.table[pools, positions].long()
        slots[real:] = 0
        return SimpleNamespace(out_cache_loc=slots, pools=pools, positions=positions, tokens=tokens, real=real)

    def run(self, batch: Any) -> torch.Tensor:
        self.passes.append(batch.real)
        for pool, position, token in list(zip(batch.pools, batch.positions, batch.tokens))[: batch.real]:
            self.pool.k[self.table[pool, position]] = token + self.pool.k[self.table[pool, position - 1]]
        return torch.nn.functional.one_hot(torch.tensor(batch.tokens), VOCAB).float()


jobs_of_requests = st.lists(
    st.tuples(st.integers(1, 4), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=TABLE - 5), st.booleans()),
    min_size=1, max_size=6,
)  # fmt: skip


@given(jobs_of_requests, st.integers(1, 9))
@few
def test_any_list_of_jobs_gives_what_one_by_one_would(asked: list[tuple[int, list[int], bool]], m: int) -> None:
    table = 1 + torch.arange(len(asked) * TABLE).view(len(asked), TABLE)
    jobs = [
        VerifyJob(r, [(start + k, token) for k, token in enumerate(tokens)], shadow)
        for r, (start, tokens, shadow) in enumerate(asked)
    ]
    pool = Pool(len(asked) * TABLE + 1)
    want, deltas = pool.k.clone(), []
    for job in jobs:
        column = want.clone()
        for position, token in job.rows:
            column[table[job.pool_index, position]] = token + column[table[job.pool_index, position - 1]]
        newest = table[job.pool_index, job.rows[-1][0]]
        deltas.append(abs(float(column[newest] - want[newest])))
        if not job.shadow:
            want = column
    engine = Engine(pool, table, m)
    verifier = Verifier(engine, m)
    found = verifier.verify(jobs)
    assert torch.equal(pool.k, want)
    assert found.logits.argmax(1).tolist() == [job.rows[-1][1] for job in jobs]
    assert [d.first for d in found.kv_delta] == [d.last for d in found.kv_delta] == deltas
    rows = sum(len(job.rows) for job in jobs)
    assert found.rows == sum(engine.passes) == verifier.counters.rows == rows
    assert found.passes == len(engine.passes) == verifier.counters.passes
    assert verifier.counters.padded_rows == found.passes * m - rows
    if not any(job.shadow for job in jobs):
        assert found.passes == -(-rows // m), "no more passes than the rows need"
